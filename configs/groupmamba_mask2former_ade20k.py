"""Mask2Former with a GroupMamba-T backbone on ADE20K: 160k iterations, 512x512 crops, 16 images a step.

mmseg's recipe of Mask2Former: the backbone's rates are a tenth of the head's. We know of no published result. It needs
mmdet, too. Without a GPU, mmcv computes the deformable attention in PyTorch.
"""

_base_ = "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["mmvssm", "mmdet.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.GroupMamba",
        arch="tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="mmvssm://groupmamba_tiny", prefix="backbone."),
    ),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
)
# Of the keys in a parameter's name the longest counts, and "backbone" decays all: these spare norms and what a scan learns.
spared = dict(lr_mult=0.1, decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            ".norm.weight": spared,
            ".norm.bias": spared,
            "embed.conv.1.": spared,  # the stem's BatchNorms
            "embed.conv.4.": spared,
            "embed.conv.7.": spared,
            "scan.A_log": spared,
            "mixer.scan.D": spared,
        }
    )
)
