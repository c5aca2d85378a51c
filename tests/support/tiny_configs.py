"""Configs of tiny models that build and run quickly, on a few generated images."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Those for mmpretrain are in tests/whole/pretraining/test_configs.py.
DENSE = sorted(
    path for path in CONFIGS.glob("*.py") if not path.stem.endswith(("_imagenet", "_cifar10"))
)
_HEADS = {
    "groupmamba": "fasterrcnn cascade_maskrcnn retinanet rtmdet mask2former segformer",
    "plainmamba": "fasterrcnn retinanet segformer",
}
# Heads other than Mask R-CNN's and UperNet's, each with its backbone; of each pair there are two sizes.
OTHER_HEADS = [(backbone, head) for backbone, heads in _HEADS.items() for head in heads.split()]
SIZE = dict(num_train=4, num_val=2, image_size=64, seed=0)
_ARCH = "dict(_delete_=True, stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)"
_DATA = """
prepare_data = None
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root="ROOT/"))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root="ROOT/"))
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root="ROOT/"))
default_hooks = dict(visualization=dict(draw=False))
"""

DETECTOR = f"""
_base_ = ["{CONFIGS}/groupmamba_maskrcnn_shapes.py"]
{_DATA}
model = dict(backbone=dict(arch={_ARCH}), neck=dict(in_channels=[16] * 4))
val_evaluator = dict(ann_file="ROOT/annotations/instances_val2017.json")
test_evaluator = dict(ann_file="ROOT/annotations/instances_val2017.json")
train_cfg = dict(max_epochs=1, val_interval=9)
"""

SEGMENTER = f"""
_base_ = ["{CONFIGS}/groupmamba_upernet_shapes.py"]
{_DATA}
model = dict(
    backbone=dict(arch={_ARCH}),
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),
)
train_cfg = dict(max_iters=2, val_interval=9)
default_hooks = dict(checkpoint=dict(interval=1))
"""

PRUNED_SEGMENTER = f"""
_base_ = ["{CONFIGS}/plainmamba_pruned_upernet_shapes.py"]
{_DATA}
"""

MODELS_OF = {"detector": DETECTOR, "segmenter": SEGMENTER, "pruned": PRUNED_SEGMENTER}
