"""The table of published models: what is where, and what its authors report of it."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from ..errors import UserError

_GROUPMAMBA = "https://huggingface.co/Abdelrahman-shaker"
_PLAINMAMBA = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main"
_SPATIALMAMBA = "https://github.com/EdwardChasel/Spatial-Mamba"
_VIM = "https://huggingface.co/hustvl"
_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download"
_VMAMBA_ADE20K = f"{_VMAMBA}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512"
_NON_COMMERCIAL = "model card: MIT in its header, non-commercial in its text"
_NON_COMMERCIAL_APACHE = "model card: Apache-2.0 in its header, non-commercial in its text"


class PublishedModel(NamedTuple):
    """Weights that the authors of a model published.

    Attributes:
        name: Ours.
        address: Of the authors' file, or of their page that links it; see :attr:`on_page`.
        backbone: Type of the backbone.
        arch: Its ``arch``.
        config: The config of the whole model, without ``.py``.
        result: As published: top-1 accuracy on ImageNet-1k, box and mask AP on COCO, or mIoU on ADE20K.
        licence: As the authors state it for the weights.
    """

    name: str
    address: str
    backbone: str
    arch: str
    config: str
    result: str
    licence: str

    @property
    def on_page(self) -> bool:
        """Whether the file has to be downloaded by hand, since ``address`` is a page that links it."""
        return not self.address.endswith(".pth")

    @property
    def task(self) -> str:
        """``"classification"``, ``"detection"`` or ``"segmentation"``."""
        data_set = self.config.rpartition("_")[2]
        return {"coco": "detection", "ade20k": "segmentation"}.get(data_set, "classification")


# fmt: off
_ROWS = (
    ("groupmamba_tiny", f"{_GROUPMAMBA}/GroupMamba-Tiny/resolve/main/groupmamba_tiny_ema.pth",
     "GroupMamba", "tiny", "groupmamba_distilled_imagenet", "83.3 top-1", _NON_COMMERCIAL),
    ("groupmamba_small", f"{_GROUPMAMBA}/GroupMamba-Small/resolve/main/groupmamba_small_ema.pth",
     "GroupMamba", "small", "groupmamba_small_distilled_imagenet", "83.9 top-1", _NON_COMMERCIAL),
    ("groupmamba_base", f"{_GROUPMAMBA}/GroupMamba-Base/resolve/main/groupmamba_base_ema.pth",
     "GroupMamba", "base", "groupmamba_base_distilled_imagenet", "84.5 top-1", _NON_COMMERCIAL),
    ("plainmamba_l1", f"{_PLAINMAMBA}/l1.pth",
     "PlainMamba", "L1", "plainmamba_imagenet", "77.9 top-1", "Apache-2.0"),
    ("plainmamba_adapter_l1_maskrcnn_1x_coco", f"{_PLAINMAMBA}/detection/maskrcnn/l1_1x.pth",
     "PlainMambaAdapter", "L1", "plainmamba_adapter_maskrcnn_coco", "44.1 box AP, 39.1 mask AP", "Apache-2.0"),
    ("plainmamba_adapter_l1_retinanet_1x_coco", f"{_PLAINMAMBA}/detection/retinanet/l1_1x.pth",
     "PlainMambaAdapter", "L1", "plainmamba_adapter_retinanet_coco", "41.7 box AP", "Apache-2.0"),
    ("plainmamba_l1_upernet_160k_ade20k", f"{_PLAINMAMBA}/segmentation/l1_upernet.pth",
     "PlainMamba", "L1", "plainmamba_upernet_published_ade20k", "44.1 mIoU", "Apache-2.0"),
    ("plainmamba_l2", f"{_PLAINMAMBA}/l2.pth",
     "PlainMamba", "L2", "plainmamba_l2_imagenet", "81.6 top-1", "Apache-2.0"),
    ("plainmamba_adapter_l2_maskrcnn_1x_coco", f"{_PLAINMAMBA}/detection/maskrcnn/l2_1x.pth",
     "PlainMambaAdapter", "L2", "plainmamba_adapter_l2_maskrcnn_coco", "46.0 box AP, 40.6 mask AP", "Apache-2.0"),
    ("plainmamba_adapter_l2_retinanet_1x_coco", f"{_PLAINMAMBA}/detection/retinanet/l2_1x.pth",
     "PlainMambaAdapter", "L2", "plainmamba_adapter_l2_retinanet_coco", "43.9 box AP", "Apache-2.0"),
    ("plainmamba_l2_upernet_160k_ade20k", f"{_PLAINMAMBA}/segmentation/l2_upernet.pth",
     "PlainMamba", "L2", "plainmamba_l2_upernet_published_ade20k", "46.8 mIoU", "Apache-2.0"),
    ("plainmamba_l3", f"{_PLAINMAMBA}/l3.pth",
     "PlainMamba", "L3", "plainmamba_l3_imagenet", "82.3 top-1", "Apache-2.0"),
    ("plainmamba_adapter_l3_maskrcnn_1x_coco", f"{_PLAINMAMBA}/detection/maskrcnn/l3_1x.pth",
     "PlainMambaAdapter", "L3", "plainmamba_adapter_l3_maskrcnn_coco", "46.8 box AP, 41.2 mask AP", "Apache-2.0"),
    ("plainmamba_adapter_l3_retinanet_1x_coco", f"{_PLAINMAMBA}/detection/retinanet/l3_1x.pth",
     "PlainMambaAdapter", "L3", "plainmamba_adapter_l3_retinanet_coco", "44.8 box AP", "Apache-2.0"),
    ("plainmamba_l3_upernet_160k_ade20k", f"{_PLAINMAMBA}/segmentation/l3_upernet.pth",
     "PlainMamba", "L3", "plainmamba_l3_upernet_published_ade20k", "49.1 mIoU", "Apache-2.0"),
    ("spatialmamba_tiny", _SPATIALMAMBA,
     "SpatialMamba", "T", "spatialmamba_imagenet", "83.5 top-1", "Apache-2.0"),
    ("spatialmamba_tiny_maskrcnn_1x_coco", _SPATIALMAMBA,
     "SpatialMamba", "T", "spatialmamba_maskrcnn_coco", "47.6 box AP, 42.9 mask AP", "Apache-2.0"),
    ("spatialmamba_tiny_maskrcnn_3x_coco", _SPATIALMAMBA,
     "SpatialMamba", "T", "spatialmamba_maskrcnn_3x_coco", "49.3 box AP, 43.6 mask AP", "Apache-2.0"),
    ("spatialmamba_tiny_upernet_160k_ade20k", _SPATIALMAMBA,
     "SpatialMamba", "T", "spatialmamba_upernet_ade20k", "48.6 mIoU", "Apache-2.0"),
    ("spatialmamba_small", _SPATIALMAMBA,
     "SpatialMamba", "S", "spatialmamba_small_imagenet", "84.6 top-1", "Apache-2.0"),
    ("spatialmamba_small_maskrcnn_1x_coco", _SPATIALMAMBA,
     "SpatialMamba", "S", "spatialmamba_small_maskrcnn_coco", "49.2 box AP, 44.0 mask AP", "Apache-2.0"),
    ("spatialmamba_small_maskrcnn_3x_coco", _SPATIALMAMBA,
     "SpatialMamba", "S", "spatialmamba_small_maskrcnn_3x_coco", "50.5 box AP, 44.6 mask AP", "Apache-2.0"),
    ("spatialmamba_small_upernet_160k_ade20k", _SPATIALMAMBA,
     "SpatialMamba", "S", "spatialmamba_small_upernet_ade20k", "50.6 mIoU", "Apache-2.0"),
    ("spatialmamba_base", _SPATIALMAMBA,
     "SpatialMamba", "B", "spatialmamba_base_imagenet", "85.3 top-1", "Apache-2.0"),
    ("spatialmamba_base_maskrcnn_1x_coco", _SPATIALMAMBA,
     "SpatialMamba", "B", "spatialmamba_base_maskrcnn_coco", "50.4 box AP, 45.1 mask AP", "Apache-2.0"),
    ("spatialmamba_base_upernet_160k_ade20k", _SPATIALMAMBA,
     "SpatialMamba", "B", "spatialmamba_base_upernet_ade20k", "51.8 mIoU", "Apache-2.0"),
    ("vim_tiny", f"{_VIM}/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth",
     "Vim", "T", "vim_imagenet", "76.1 top-1", _NON_COMMERCIAL_APACHE),
    ("vim_tiny_plus", f"{_VIM}/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc.pth",
     "Vim", "T+", "vim_plus_imagenet", "78.3 top-1", _NON_COMMERCIAL_APACHE),
    ("vim_small", f"{_VIM}/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth",
     "Vim", "S", "vim_small_imagenet", "80.5 top-1", _NON_COMMERCIAL_APACHE),
    ("vim_small_plus", f"{_VIM}/Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth",
     "Vim", "S+", "vim_small_plus_imagenet", "81.6 top-1", _NON_COMMERCIAL_APACHE),
    ("vim_base", f"{_VIM}/Vim-base-midclstok",
     "Vim", "B", "vim_base_imagenet", "81.9 top-1", _NON_COMMERCIAL_APACHE),
    ("vmamba_tiny", f"{_VMAMBA}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
     "VMamba", "T", "vmamba_imagenet", "82.6 top-1", "MIT"),
    ("vmamba_tiny_maskrcnn_1x_coco", f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth",
     "VMamba", "T", "vmamba_maskrcnn_coco", "47.3 box AP, 42.7 mask AP", "MIT"),
    ("vmamba_tiny_maskrcnn_3x_coco", f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth",
     "VMamba", "T", "vmamba_maskrcnn_3x_coco", "48.8 box AP, 43.7 mask AP", "MIT"),
    ("vmamba_tiny_upernet_160k_ade20k", f"{_VMAMBA_ADE20K}_tiny_s_iter_160000.pth",
     "VMamba", "T", "vmamba_upernet_ade20k", "47.9 mIoU", "MIT"),
    ("vmamba_small", f"{_VMAMBA}/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth",
     "VMamba", "S", "vmamba_small_imagenet", "83.6 top-1", "MIT"),
    ("vmamba_small_maskrcnn_1x_coco", f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth",
     "VMamba", "S", "vmamba_small_maskrcnn_coco", "48.7 box AP, 43.7 mask AP", "MIT"),
    ("vmamba_small_maskrcnn_3x_coco", f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth",
     "VMamba", "S", "vmamba_small_maskrcnn_3x_coco", "49.9 box AP, 44.2 mask AP", "MIT"),
    ("vmamba_small_upernet_160k_ade20k", f"{_VMAMBA_ADE20K}_small_iter_144000.pth",
     "VMamba", "S", "vmamba_small_upernet_ade20k", "50.6 mIoU", "MIT"),
    ("vmamba_base", f"{_VMAMBA}/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth",
     "VMamba", "B", "vmamba_base_imagenet", "83.9 top-1", "MIT"),
    ("vmamba_base_maskrcnn_1x_coco", f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth",
     "VMamba", "B", "vmamba_base_maskrcnn_coco", "49.2 box AP, 44.1 mask AP", "MIT"),
    ("vmamba_base_upernet_160k_ade20k", f"{_VMAMBA_ADE20K}_base_iter_160000.pth",
     "VMamba", "B", "vmamba_base_upernet_ade20k", "51.0 mIoU", "MIT"),
)
# fmt: on

PUBLISHED: dict[str, PublishedModel] = {row[0]: PublishedModel(*row) for row in _ROWS}
"""Published models by our name of them."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of published models, for ``mmvssm://NAME`` and :func:`mmvssm.get_model`.

    Args:
        pattern: As in file names, such as ``"vmamba*coco"``.
    """
    return [name for name in PUBLISHED if fnmatch.fnmatchcase(name, pattern)]


def find_model(name: str) -> PublishedModel:
    """The published model of a name.

    Raises:
        UserError: If there is none; the message lists those that there are.
    """
    if name not in PUBLISHED:
        raise UserError(
            f"there are no published weights called {name!r}; known are {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]
