"""Published weights by name: ``mmvssm://NAME`` wherever a checkpoint may be named.

A file is looked for in the folder, or at the address, that the environment variable ``MMVSSM_WEIGHTS`` names, then in
the cache of ``torch.hub``, and downloaded into that cache otherwise. We host no weights: addresses are the authors'.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from ..errors import UserError
from ..files import write_whole
from ..safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely
from .backbones.common import WRAPPINGS
from .published import convert_whole, inert_globals, unwrap

SCHEME = "mmvssm://"
VARIABLE = "MMVSSM_WEIGHTS"

_GROUPMAMBA = "https://huggingface.co/Abdelrahman-shaker"
_PLAINMAMBA = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main"
_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download"
_NON_COMMERCIAL = "model card: MIT in its header, non-commercial in its text"


class PublishedModel(NamedTuple):
    """Weights that the authors of a model published.

    Attributes:
        name: Ours.
        address: Of the authors' file.
        backbone: Type of the backbone.
        arch: Its ``arch``.
        config: The config of the whole model, without ``.py``.
        task: ``"classification"``, ``"detection"`` or ``"segmentation"``.
        result: As published: top-1 accuracy on ImageNet-1k, box and mask AP on COCO, or mIoU on ADE20K.
        licence: As the authors state it for the weights.
    """

    name: str
    address: str
    backbone: str
    arch: str
    config: str
    task: str
    result: str
    licence: str


_TABLE = (
    PublishedModel(
        "groupmamba_tiny",
        f"{_GROUPMAMBA}/GroupMamba-Tiny/resolve/main/groupmamba_tiny_ema.pth",
        "GroupMamba",
        "tiny",
        "groupmamba_distilled_imagenet",
        "classification",
        "83.3 top-1",
        _NON_COMMERCIAL,
    ),
    PublishedModel(
        "groupmamba_small",
        f"{_GROUPMAMBA}/GroupMamba-Small/resolve/main/groupmamba_small_ema.pth",
        "GroupMamba",
        "small",
        "groupmamba_small_distilled_imagenet",
        "classification",
        "83.9 top-1",
        _NON_COMMERCIAL,
    ),
    PublishedModel(
        "groupmamba_base",
        f"{_GROUPMAMBA}/GroupMamba-Base/resolve/main/groupmamba_base_ema.pth",
        "GroupMamba",
        "base",
        "groupmamba_base_distilled_imagenet",
        "classification",
        "84.5 top-1",
        _NON_COMMERCIAL,
    ),
    PublishedModel(
        "plainmamba_l1",
        f"{_PLAINMAMBA}/l1.pth",
        "PlainMamba",
        "L1",
        "plainmamba_imagenet",
        "classification",
        "77.9 top-1",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l1_maskrcnn_1x_coco",
        f"{_PLAINMAMBA}/detection/maskrcnn/l1_1x.pth",
        "PlainMambaAdapter",
        "L1",
        "plainmamba_adapter_maskrcnn_coco",
        "detection",
        "44.1 box AP, 39.1 mask AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l1_retinanet_1x_coco",
        f"{_PLAINMAMBA}/detection/retinanet/l1_1x.pth",
        "PlainMambaAdapter",
        "L1",
        "plainmamba_adapter_retinanet_coco",
        "detection",
        "41.7 box AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_l1_upernet_160k_ade20k",
        f"{_PLAINMAMBA}/segmentation/l1_upernet.pth",
        "PlainMamba",
        "L1",
        "plainmamba_upernet_published_ade20k",
        "segmentation",
        "44.1 mIoU",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_l2",
        f"{_PLAINMAMBA}/l2.pth",
        "PlainMamba",
        "L2",
        "plainmamba_l2_imagenet",
        "classification",
        "81.6 top-1",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l2_maskrcnn_1x_coco",
        f"{_PLAINMAMBA}/detection/maskrcnn/l2_1x.pth",
        "PlainMambaAdapter",
        "L2",
        "plainmamba_adapter_l2_maskrcnn_coco",
        "detection",
        "46.0 box AP, 40.6 mask AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l2_retinanet_1x_coco",
        f"{_PLAINMAMBA}/detection/retinanet/l2_1x.pth",
        "PlainMambaAdapter",
        "L2",
        "plainmamba_adapter_l2_retinanet_coco",
        "detection",
        "43.9 box AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_l2_upernet_160k_ade20k",
        f"{_PLAINMAMBA}/segmentation/l2_upernet.pth",
        "PlainMamba",
        "L2",
        "plainmamba_l2_upernet_published_ade20k",
        "segmentation",
        "46.8 mIoU",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_l3",
        f"{_PLAINMAMBA}/l3.pth",
        "PlainMamba",
        "L3",
        "plainmamba_l3_imagenet",
        "classification",
        "82.3 top-1",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l3_maskrcnn_1x_coco",
        f"{_PLAINMAMBA}/detection/maskrcnn/l3_1x.pth",
        "PlainMambaAdapter",
        "L3",
        "plainmamba_adapter_l3_maskrcnn_coco",
        "detection",
        "46.8 box AP, 41.2 mask AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_adapter_l3_retinanet_1x_coco",
        f"{_PLAINMAMBA}/detection/retinanet/l3_1x.pth",
        "PlainMambaAdapter",
        "L3",
        "plainmamba_adapter_l3_retinanet_coco",
        "detection",
        "44.8 box AP",
        "Apache-2.0",
    ),
    PublishedModel(
        "plainmamba_l3_upernet_160k_ade20k",
        f"{_PLAINMAMBA}/segmentation/l3_upernet.pth",
        "PlainMamba",
        "L3",
        "plainmamba_l3_upernet_published_ade20k",
        "segmentation",
        "49.1 mIoU",
        "Apache-2.0",
    ),
    PublishedModel(
        "vmamba_tiny",
        f"{_VMAMBA}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
        "VMamba",
        "T",
        "vmamba_imagenet",
        "classification",
        "82.6 top-1",
        "MIT",
    ),
    PublishedModel(
        "vmamba_tiny_maskrcnn_1x_coco",
        f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth",
        "VMamba",
        "T",
        "vmamba_maskrcnn_coco",
        "detection",
        "47.3 box AP, 42.7 mask AP",
        "MIT",
    ),
    PublishedModel(
        "vmamba_tiny_maskrcnn_3x_coco",
        f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth",
        "VMamba",
        "T",
        "vmamba_maskrcnn_3x_coco",
        "detection",
        "48.8 box AP, 43.7 mask AP",
        "MIT",
    ),
    PublishedModel(
        "vmamba_tiny_upernet_160k_ade20k",
        f"{_VMAMBA}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth",
        "VMamba",
        "T",
        "vmamba_upernet_ade20k",
        "segmentation",
        "47.9 mIoU",
        "MIT",
    ),
    PublishedModel(
        "vmamba_small",
        f"{_VMAMBA}/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth",
        "VMamba",
        "S",
        "vmamba_small_imagenet",
        "classification",
        "83.6 top-1",
        "MIT",
    ),
    PublishedModel(
        "vmamba_small_maskrcnn_1x_coco",
        f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth",
        "VMamba",
        "S",
        "vmamba_small_maskrcnn_coco",
        "detection",
        "48.7 box AP, 43.7 mask AP",
        "MIT",
    ),
    PublishedModel(
        "vmamba_small_maskrcnn_3x_coco",
        f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth",
        "VMamba",
        "S",
        "vmamba_small_maskrcnn_3x_coco",
        "detection",
        "49.9 box AP, 44.2 mask AP",
        "MIT",
    ),
    PublishedModel(
        "vmamba_small_upernet_160k_ade20k",
        f"{_VMAMBA}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth",
        "VMamba",
        "S",
        "vmamba_small_upernet_ade20k",
        "segmentation",
        "50.6 mIoU",
        "MIT",
    ),
    PublishedModel(
        "vmamba_base",
        f"{_VMAMBA}/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth",
        "VMamba",
        "B",
        "vmamba_base_imagenet",
        "classification",
        "83.9 top-1",
        "MIT",
    ),
    PublishedModel(
        "vmamba_base_maskrcnn_1x_coco",
        f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth",
        "VMamba",
        "B",
        "vmamba_base_maskrcnn_coco",
        "detection",
        "49.2 box AP, 44.1 mask AP",
        "MIT",
    ),
    PublishedModel(
        "vmamba_base_upernet_160k_ade20k",
        f"{_VMAMBA}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth",
        "VMamba",
        "B",
        "vmamba_base_upernet_ade20k",
        "segmentation",
        "51.0 mIoU",
        "MIT",
    ),
)

PUBLISHED: dict[str, PublishedModel] = {model.name: model for model in _TABLE}
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


def locate(name: str) -> Path:
    """The file of a published model, downloaded if it is nowhere on this machine.

    The SHA-256 of a download is recorded beside it, and compared whenever the file is used.

    Raises:
        UserError: If there is no such model, if its file can neither be found nor downloaded, or if it has changed.
    """
    model = find_model(name)
    place, file = os.environ.get(VARIABLE, ""), f"{name}.pth"
    address = model.address
    if "://" in place:
        address = f"{place.rstrip('/')}/{file}"
    elif place:
        path = Path(place).expanduser() / file
        if path.is_file():
            return path
    path = Path(torch.hub.get_dir()) / "mmvssm" / file
    record = path.with_suffix(".sha256")
    if not path.is_file():
        _download(model, address, path)
        write_whole(record, _sha256(path) + "\n")
    elif record.is_file() and record.read_text().strip() != _sha256(path):
        raise UserError(
            f"{path} is not the file that was downloaded (its SHA-256 differs from the one in {record}); remove both "
            "to download it again"
        )
    return path


def _download(model: PublishedModel, address: str, path: Path) -> None:
    """Download a file that takes its name when it is known to be whole and to hold nothing but weights."""
    print_log(f"Downloading {address} (licence of the weights: {model.licence})", "current")
    partial = path.with_suffix(f".{os.getpid()}.download")  # of several processes each has its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(partial))
        with inert_globals():
            load_checkpoint_safely(partial)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # urllib's are OSErrors, and so is a timeout
        why = str(error).replace(str(partial), "what came")
        raise UserError(
            f"cannot download {model.name} from {address} ({why}); download the file by hand and put it at {path}, "
            f"or as {path.name} into the folder that the environment variable {VARIABLE} names; or train from random "
            "weights with init_cfg=None"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_published(
    name: str, key: Optional[str] = None, map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a published model's weights under our names.

    Args:
        name: One of :func:`list_models`.
        key: Where in the file the weights are, such as ``"model"``; by default averaged (EMA) weights where there are
            any.
        map_location: As for :func:`torch.load`.

    Returns:
        A checkpoint: ``state_dict`` and ``meta``.

    Raises:
        UserError: If they cannot be found, downloaded or read.
    """
    path = locate(name)
    try:
        with inert_globals():
            checkpoint = load_checkpoint_safely(path, map_location)
        converted = convert_checkpoint(checkpoint, str(path), key)
    except (UnsafeCheckpointError, ValueError) as error:
        raise UserError(str(error)) from error
    if converted is None:
        raise UserError(f"{path} does not hold the weights of a published model, as {name} should")
    return converted


def convert_checkpoint(
    checkpoint: Mapping[str, Any], path: str, key: Optional[str] = None
) -> Optional[dict[str, Any]]:
    """Convert what a checkpoint file holds, if that is a published model.

    Args:
        checkpoint: Weights by name, or such a mapping under a key of :data:`.WRAPPINGS`.
        path: Its file, for the log.
        key: Under which key to look instead.

    Returns:
        ``state_dict`` under our names, with ``backbone.`` before the backbone's, and ``meta``; None if the weights are
        of no published model.

    Raises:
        ValueError: If ``key`` is given and holds no weights.
    """
    keys = [k for k in WRAPPINGS if isinstance(checkpoint.get(k), Mapping)]
    try:
        weights = unwrap(checkpoint, key)
    except ValueError:
        if key is not None:
            raise
        return None
    conversion = convert_whole(weights)
    if conversion is None:
        return None
    if len(keys) > 1:
        print_log(
            f"{path} holds weights under {', '.join(keys)}; taken: {key or keys[0]}", "current"
        )
    if conversion.unused:
        print_log(f"{path}: used nowhere: {', '.join(conversion.unused)}", "current")
    meta = {"arch": conversion.arch, "published": path}
    return {"state_dict": conversion.state_dict, "meta": meta}


def _load_by_name(filename: str, map_location: Any = "cpu") -> dict[str, Any]:
    """What mmengine calls for ``mmvssm://NAME``, or ``mmvssm://NAME#KEY`` with the key of the weights to take."""
    name, _, key = filename.removeprefix(SCHEME).partition("#")
    return load_published(name, key or None, map_location)


_load_by_name.loads_weights_only = True  # type: ignore[attr-defined]


def register_scheme() -> None:
    """Let mmengine load ``mmvssm://NAME``. Idempotent; other addresses are loaded as before."""
    CheckpointLoader.register_scheme(SCHEME, _load_by_name, force=True)
