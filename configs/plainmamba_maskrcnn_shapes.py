"""The GroupMamba demo on the generated data set, with a small PlainMamba."""

_base_ = ["./groupmamba_maskrcnn_shapes.py"]
custom_imports = dict(imports=["mmvssm"], allow_failed_imports=False)

embed_dims = 64
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.PlainMamba",
        arch=dict(
            embed_dims=embed_dims,
            num_layers=6,
            patch_size=8,
            num_convs_patch_embed=1,
            layers_with_dwconv=[0],
            d_state=8,
        ),
        img_size=160,
        out_indices=(1, 3, 4, 5),
    ),
    neck=[
        dict(type="mmvssm.TokenRestoration"),
        dict(
            type="mmvssm.FeaturePyramid",
            in_channels=embed_dims,
            rescales=[2, 1, 0.5, 0.25],
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
        dict(
            type="FPN",
            in_channels=[embed_dims] * 4,
            out_channels=64,
            num_outs=5,
            norm_cfg=dict(type="BN", requires_grad=True),
        ),
    ],
)
