"""The backbones and prunings that dense.py compares."""

from dataclasses import dataclass, field, replace
from typing import Any, Optional

from results import NOT_TUNED

# -------------------------------------------------------------------------------------- backbones


@dataclass(frozen=True)
class Backbone:
    """A backbone as configs name it.

    Attributes:
        settings: Its config.
        channels: Of its maps at strides 4, 8, 16 and 32; one number for maps of one stride, which a neck makes into a
            pyramid.
        package: Python package that it needs beyond mmdet and mmseg.
    """

    settings: dict[str, Any]
    channels: Any
    package: Optional[str] = None


_PLAIN = dict(num_layers=8, patch_size=8, d_state=8)
_CONVS = dict(num_convs_patch_embed=0, layers_with_dwconv=[0])
_CROP = (256, 320)  # for which position embeddings are made
BACKBONES = {
    "GroupMamba": Backbone(
        dict(
            type="mmvssm.GroupMamba",
            arch=dict(
                stem_hidden_dim=16,
                embed_dims=[48, 96, 160, 256],
                depths=[1, 1, 3, 1],
                mlp_ratios=[4, 4, 4, 4],
            ),
        ),
        [48, 96, 160, 256],
    ),
    "VMamba": Backbone(
        dict(
            type="mmvssm.VMamba",
            arch=dict(embed_dims=[48, 96, 160, 256], depths=[1, 1, 4, 1], ssm_ratio=1, mlp_ratio=4),
        ),
        [48, 96, 160, 256],
    ),
    "Spatial-Mamba": Backbone(
        dict(
            type="mmvssm.SpatialMamba",
            arch=dict(embed_dims=[32, 64, 128, 192], depths=[1, 1, 3, 1], mlp_ratio=4),
        ),
        [32, 64, 128, 192],
    ),
    "PlainMamba": Backbone(
        dict(
            type="mmvssm.PlainMamba",
            arch=dict(embed_dims=56, **_PLAIN, **_CONVS),
            img_size=_CROP,
            out_indices=(1, 3, 5, 7),
        ),
        56,
    ),
    "PlainMamba-Adapter": Backbone(
        dict(
            type="mmvssm.PlainMambaAdapter",
            arch={**dict(embed_dims=72, **_PLAIN, **_CONVS), "patch_size": 16},
            img_size=_CROP,
            conv_inplane=16,
            deform_num_heads=4,
            interaction_indexes=((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        [72] * 4,
    ),
    "Vim": Backbone(
        dict(
            type="mmvssm.Vim",
            arch=dict(embed_dims=88, stride=8, **_PLAIN),
            img_size=_CROP,
            out_indices=(1, 3, 5, 7),
        ),
        88,
    ),
    "ResNet-18": Backbone(
        dict(type="ResNet", depth=18, stem_channels=34, base_channels=34, norm_cfg=dict(type="BN")),
        [34, 68, 136, 272],
    ),
    "Swin": Backbone(
        dict(type="SwinTransformer", embed_dims=32, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8)),
        [32, 64, 128, 256],
    ),
    "ConvNeXt": Backbone(
        dict(
            type="mmpretrain.ConvNeXt",
            arch=dict(depths=[2, 2, 4, 2], channels=[44, 88, 176, 352]),
            out_indices=(0, 1, 2, 3),
            gap_before_final_norm=False,
        ),
        [44, 88, 176, 352],
        package="mmpretrain",
    ),
}
"""Backbones of about the same FLOPs, and as wide as that makes them."""

# ------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained.

    Attributes:
        backbone: Its name in :data:`BACKBONES`.
        options: Settings changed in the config, by dotted key.
        start: Arm whose weights, of the same seed, it starts from.
        tuned: Whether it trains; otherwise it is ``start`` evaluated with these options.
        length: Length of its training, in those of :attr:`DataSet.length`.
        saving: Share of the backbone's FLOPs that its pruning is to save.
        taught: Weights of the losses by which it learns from ``start``, see ``candidates.Distilled``.
        seeds: Default seeds.
    """

    backbone: str
    options: dict[str, Any] = field(default_factory=dict)
    start: Optional[str] = None
    tuned: bool = True
    length: float = 1.0
    saving: float = 0.0
    taught: dict[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)


DENSE = "PlainMamba, long"
"""What is pruned. It trains longer, so that tuning does not end what training had left to do."""

TUNING = dict(length=0.4, seeds=(0, 1))
"""Fine-tuning is shorter, with a third of the learning rate; so is the dense model that is trained on."""

DEFAULT = dict(layers=(0, 2, 4), keep_ratio=(0.6, 0.5, 0.65))
"""40 % of the backbone's FLOPs. With these ratios ``alignment='none'`` finds a grid for what is kept."""


def pruned(
    saving: float = 0.4,
    neck: Optional[dict[str, Any]] = None,
    candidate: Optional[dict[str, Any]] = None,
    taught: Optional[dict[str, float]] = None,
    tuned: bool = True,
    **options: Any,
) -> Arm:
    """Return a pruned PlainMamba that starts from :data:`DENSE`.

    None of them warms up unless it says so, since ``alignment='none'`` packs only certain numbers of tokens.

    Args:
        saving: See :class:`Arm`.
        neck: Settings of ``TokenRestoration``; it fills with the last values by default.
        candidate: Settings of ``candidates.CandidatePlainMamba``, or of another type there, that differ from
            PlainMamba's.
        taught: See :class:`Arm`.
        tuned: See :class:`Arm`.
        options: Settings of the pruning that differ from :data:`DEFAULT`.
    """
    settings = {"model.backbone.pruning": {**DEFAULT, **options}}
    settings.update({f"model.neck.0.{key}": value for key, value in (neck or {}).items()})
    if candidate:
        settings["model.backbone.type"] = "mmvssm.CandidatePlainMamba"
        settings.update({f"model.backbone.{key}": value for key, value in candidate.items()})
    return Arm(
        *("PlainMamba", settings, DENSE, tuned),
        saving=saving,
        taught=taught or {},
        **TUNING,
    )


_REJOINING = dict(layers=(0, 2), keep_ratio=(0.3, 0.6), rejoin=7)
# The four maps go to strides 4, 8, 16 and 32: the later a layer, the fewer tokens its map needs.
_PYRAMID = dict(layers=(1, 3, 5), keep_ratio=(0.45, 0.4, 0.35))
_SPREAD = dict(spread=True)
_PRUNINGS: dict[str, dict[str, Any]] = {
    "decay": {},
    "hold": dict(alignment="hold"),
    "none": dict(alignment="none"),
    "random choice": dict(metric="random"),
    "merging": dict(reduction="merge"),
    "filled with zeros": dict(neck=dict(fill="zero")),
    "earlier layers": dict(layers=(0, 1, 2), keep_ratio=(0.65, 0.6, 0.7)),
    "later layers": dict(layers=(1, 3), keep_ratio=(0.4, 0.4)),
    "rejoining": _REJOINING,
    "following": dict(saving=0.36, follow=True),
    "merging, following": dict(saving=0.36, reduction="merge", follow=True),
    "by the update": dict(candidate=dict(score="update")),
    "by step size": dict(candidate=dict(score="step")),
    "by what is written": dict(candidate=dict(score="write")),
    "mean over layers": dict(candidate=dict(over_layers=True)),
    "units of 2x2": dict(candidate=dict(unit=2)),
    "shared budget": dict(candidate=dict(type="mmvssm.BudgetCandidate")),
    "pyramid": _PYRAMID,
    "pyramid, random choice": dict(metric="random", **_PYRAMID),
    "pyramid, spread": dict(candidate=_SPREAD, **_PYRAMID),
    # Following has its own cost in so small a model, so fewer tokens are kept.
    "pyramid, spread, following": dict(
        candidate=_SPREAD, layers=(1, 3, 5), keep_ratio=(0.38, 0.36, 0.3), follow=True
    ),
    "pyramid, merging, following": dict(
        layers=(1, 2, 3, 5), keep_ratio=0.5, reduction="merge", follow=True
    ),
    "25 %": dict(saving=0.25, keep_ratio=(0.8, 0.75, 0.75)),
    "55 %": dict(saving=0.55, layers=(0, 1, 2), keep_ratio=(0.25, 0.5, 0.5)),
}
"""Arguments of :func:`pruned` that differ from the method's."""

_REFINED = dict(refine=True, in_channels=56)
# tools/train.py shortens it with the training, to a third of it.
_WARM_UP = dict(custom_hooks=[dict(type="mmvssm.KeepRatioWarmup", num_iters=500)])
_THREE = (0, 1, 2)
ARMS = {
    "GroupMamba": Arm("GroupMamba", seeds=_THREE),
    "VMamba": Arm("VMamba", seeds=_THREE),
    "Spatial-Mamba": Arm("Spatial-Mamba", seeds=_THREE),
    "ResNet-18": Arm("ResNet-18", seeds=_THREE),
    "PlainMamba": Arm("PlainMamba"),
    "PlainMamba-Adapter": Arm("PlainMamba-Adapter"),
    "Vim": Arm("Vim"),
    "Swin": Arm("Swin"),
    "ConvNeXt": Arm("ConvNeXt"),
    "GroupMamba, long": Arm("GroupMamba", length=4.0),
    DENSE: Arm("PlainMamba", length=2.5, seeds=(0, 1)),
    "dense, trained on": Arm("PlainMamba", start=DENSE, **TUNING),
    **{
        f"pruned, {name}{NOT_TUNED * (not tuned)}": pruned(tuned=tuned, **options)
        for name, options in _PRUNINGS.items()
        for tuned in (True, False)
    },
    # Untuned, what is learned would be random.
    "pruned, learned filling": pruned(neck=dict(fill="mask_token", **_REFINED)),
    "pruned, refined filling": pruned(neck=_REFINED),
    "pruned, warming up": replace(pruned(), options={**pruned().options, **_WARM_UP}),
    "pruned from the start": replace(pruned(), start=None, length=2.9),
    "pruned, taught": pruned(taught=dict(map_weight=1.0)),
    "pruned, rejoining, taught": pruned(taught=dict(map_weight=1.0), **_REJOINING),
}
