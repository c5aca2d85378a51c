"""Which checkpoint to use, and whether it fits the model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ..engine.safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely
from .errors import UserError

_KEYS_SHOWN = 3


def is_url(path: str) -> bool:
    """Whether ``path`` names something to download (``https://``, ``open-mmlab://`` ...)."""
    return "://" in path


def load_local(path: str) -> dict[str, Any]:
    """:func:`load_checkpoint_safely` for tools.

    Raises:
        UserError: If the file cannot or must not be loaded.
    """
    try:
        return load_checkpoint_safely(path)
    except UnsafeCheckpointError as error:
        raise UserError(str(error)) from error


def find_resumable(work_dir: str) -> Optional[str]:
    """The newest checkpoint of a training run that loads.

    That is the one ``last_checkpoint`` names unless the run was killed while writing it or
    before it could be named.

    Args:
        work_dir: Where the run wrote.

    Returns:
        A path, or None if there is no checkpoint at all.

    Raises:
        UserError: If there are checkpoints but none of them loads.
    """
    candidates = list(_by_recency(Path(work_dir)))
    for path in candidates:
        try:
            if "optimizer" in load_checkpoint_safely(path):
                return str(path)
        except UnsafeCheckpointError:
            continue
    if candidates:
        raise UserError(
            f"none of the {len(candidates)} checkpoints in {work_dir} can be resumed from; name "
            "another with --resume FILE, or train afresh in another --work-dir"
        )
    return None


def _by_recency(work_dir: Path) -> Iterator[Path]:
    """Training checkpoints, the one the run itself called the last first, then by step."""
    named = None
    marker = work_dir / "last_checkpoint"
    if marker.is_file():
        named = Path(marker.read_text().strip() or ".")
        # A work dir that was moved or mounted elsewhere still holds the file of that name.
        named = named if named.is_file() else work_dir / named.name
        if named.is_file():
            yield named
    steps = {
        path: int(match.group(1))
        for path in work_dir.glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem))
    }
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        if named is None or path.name != named.name:
            yield path


def check_resumable(checkpoint: dict[str, Any], path: str) -> None:
    """Check that ``checkpoint`` holds the state of a training run, not only weights.

    Raises:
        UserError: If it does not.
    """
    missing = [key for key in ("meta", "optimizer", "message_hub") if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} cannot be resumed from because it lacks the state of a training run "
            f"({', '.join(missing)}); to start from its weights use --cfg-options load_from={path}"
        )


def check_fits(model: nn.Module, checkpoint: dict[str, Any], path: str) -> None:
    """Load ``checkpoint`` into ``model`` and insist that every key and shape matches.

    mmengine only warns, and would then train or test a model that is partly random.

    Args:
        model: Built for this check; its weights are overwritten.
        checkpoint: With or without the wrapping ``state_dict``.
        path: Its file, for the message.

    Raises:
        UserError: If the checkpoint belongs to another model.
    """
    state_dict = weights_of(checkpoint)
    try:
        load_state_dict(model, state_dict, strict=True)
    except RuntimeError as error:
        raise UserError(_misfit(model, state_dict, checkpoint, path)) from error


def check_shares_weights(model: nn.Module, checkpoint: dict[str, Any], path: str) -> None:
    """Check that a checkpoint to start from (``load_from``) has anything for ``model``.

    Raises:
        UserError: If no key of the right shape is found.
    """
    own = model.state_dict()
    shared = [
        key
        for key, value in weights_of(checkpoint).items()
        if key in own and getattr(value, "shape", None) == own[key].shape
    ]
    if not shared:
        raise UserError(f"none of the weights in {path} fits this model")


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights in a checkpoint, without the ``module.`` of distributed training."""
    state_dict = checkpoint.get("state_dict", checkpoint)
    renamed = type(state_dict)((re.sub(r"^module\.", "", k), v) for k, v in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        renamed._metadata = metadata
    return renamed


def classes_of(checkpoint: dict[str, Any]) -> Optional[list[str]]:
    """The class names a checkpoint was trained on, if it tells."""
    meta = checkpoint.get("meta")
    dataset_meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
    classes = dataset_meta.get("classes") if isinstance(dataset_meta, dict) else None
    return [str(name) for name in classes] if classes else None


def _misfit(
    model: nn.Module, state_dict: dict[str, Any], checkpoint: dict[str, Any], path: str
) -> str:
    """One sentence on how ``state_dict`` differs from what ``model`` has."""
    own = model.state_dict()
    missing = [k for k in own if k not in state_dict and "num_batches_tracked" not in k]
    unexpected = [k for k in state_dict if k not in own]
    reshaped = [
        f"{k} is {tuple(state_dict[k].shape)} there and {tuple(own[k].shape)} here"
        for k in own
        if k in state_dict and getattr(state_dict[k], "shape", None) != own[k].shape
    ]
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:_KEYS_SHOWN])}{', ...' * (len(keys) > _KEYS_SHOWN)})"
        for keys, what in (
            (missing, "missing from it"),
            (unexpected, "unknown to the model"),
            (reshaped, "of another shape"),
        )
        if keys
    ]
    sentence = f"{path} does not fit this config's model, weights: {'; '.join(found)}"
    origin = _origin(checkpoint)
    return f"{sentence}; {origin}" if origin else sentence


def _origin(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint's own notes say about where it comes from."""
    meta = checkpoint.get("meta")
    if not isinstance(meta, dict):
        return ""
    notes = []
    # The experiment is named <config>_<date>_<time>.
    name = re.sub(r"_\d{8}_\d{6}$", "", str(meta.get("experiment_name", "")))
    if name and not re.fullmatch(r"\d{8}_\d{6}", name):
        notes.append(f"with config {name}")
    if isinstance(meta.get("cfg"), str):
        try:
            backbone = Config.fromstring(meta["cfg"], file_format=".py").model.backbone
            arch = backbone.get("arch") or backbone.get("depth") or ""
            arch = "of its own arch" if isinstance(arch, dict) else arch
            notes.append(f"backbone {backbone.type} {arch}".rstrip())
        except Exception:  # a note that cannot be read is only left out
            pass
    classes = classes_of(checkpoint)
    if classes:
        shown = ", ".join(classes[:_KEYS_SHOWN]) + ", ..." * (len(classes) > _KEYS_SHOWN)
        notes.append(f"{len(classes)} classes ({shown})")
    return f"it was trained {', '.join(notes)}" if notes else ""
