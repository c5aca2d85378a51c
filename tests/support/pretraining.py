"""Requirements of tests of classification: mmpretrain, and images in ImageNet's layout."""

import importlib.util

import numpy as np
import pytest
from PIL import Image


def require_mmpretrain():
    """Skip the tests of a module where mmpretrain does not work."""
    if importlib.util.find_spec("mmpretrain") is None:
        pytest.skip(
            "mmpretrain is not installed here (make setup-pretrain)", allow_module_level=True
        )
    try:
        import mmpretrain.models  # noqa: F401
    except Exception as error:  # torchvision's operators and torch's may not match
        pytest.skip(
            f"mmpretrain does not load here ({error:.100}; make setup-pretrain)",
            allow_module_level=True,
        )
    import mmvssm.pretraining  # noqa: F401


def write_class_folders(root, classes=("cat", "dog"), train=4, val=2, size=32):
    """Write images of noise in ImageNet's layout, as bright as their class is late."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (size, size, 3)) + 100 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    return root


ARCH = "dict(_delete_=True, stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)"

CLASSIFIER = f"""
_base_ = ["CONFIGS/groupmamba_cifar10.py"]
model = dict(
    backbone=dict(arch={ARCH}), neck=dict(in_channels=16, mlp_ratio=2), head=dict(in_channels=16)
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type="ConstantLR", factor=1.0)]
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""

TEACHER = """dict(
    _delete_=True,
    type="ImageClassifier",
    backbone=dict(type="ResNet_CIFAR", depth=18, base_channels=4, stem_channels=4),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=32),
)"""

DISTILLED = (
    CLASSIFIER.replace("groupmamba_cifar10", "groupmamba_distilled_cifar10")
    + f"""
model["teacher"] = {TEACHER}
model["teacher_checkpoint"] = "teacher.pth"
model["train_cfg"] = dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)])
custom_hooks = [dict(type="EMAHook", momentum=0.1, update_buffers=True)]
"""
)
