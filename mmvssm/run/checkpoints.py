"""Which checkpoint to use, and whether it fits the model."""

import ast
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import nn

from ..errors import UserError, brief, shown, user_mistakes
from ..safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely
from .hooks.checkpoint_hook import INTERRUPTED

_LONGEST_CONFIG = 1_000_000  # characters that are parsed; those in configs/ have under 10,000


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


def load_any(path: str) -> dict[str, Any]:
    """:func:`load_local` for a file, and for a URL mmengine's download.

    Raises:
        UserError: If it cannot or must not be loaded.
    """
    if not is_url(path):
        return load_local(path)
    with user_mistakes(f"cannot load {path}"):
        checkpoint = CheckpointLoader.load_checkpoint(path, "cpu")
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


class Resumable(NamedTuple):
    """The checkpoint to go on from.

    Attributes:
        path: Its file.
        skipped: Newer ones that do not load.
        content: What is in the file.
    """

    path: str
    skipped: list[str]
    content: Optional[dict[str, Any]]


def find_resumable(work_dir: str) -> Optional[Resumable]:
    """The newest checkpoint of a training run that loads.

    That is the one ``last_checkpoint`` names unless the run was killed while writing it or
    before it could be named.

    Args:
        work_dir: Where the run wrote.

    Returns:
        It, or None if there is no checkpoint at all.

    Raises:
        UserError: If there are checkpoints but none of them loads.
    """
    candidates = list(_by_recency(Path(work_dir)))
    skipped = []
    for path in candidates:
        try:
            content = load_checkpoint_safely(path)
            if "optimizer" in content:
                return Resumable(str(path), skipped, content)
        except UnsafeCheckpointError:
            pass
        skipped.append(str(path))
    if candidates:
        raise UserError(
            f"none of the {len(candidates)} checkpoints in {work_dir} can be resumed from; name "
            "another with --resume FILE, or train afresh in another --work-dir"
        )
    return None


def named_checkpoint(work_dir: Path) -> Optional[Path]:
    """The checkpoint that a run called its last one, if that is there."""
    marker = work_dir / "last_checkpoint"
    if not marker.is_file():
        return None
    named = Path(marker.read_text(errors="replace").strip() or ".")
    # Of a work dir that was moved or copied, its own file of that name.
    here = work_dir / named.name
    named = here if here.is_file() else named
    return named if named.is_file() else None


def _by_recency(work_dir: Path) -> Iterator[Path]:
    """Training checkpoints, the one the run itself called the last first, then by step."""
    named = named_checkpoint(work_dir)
    if named is not None:
        yield named
    steps = {
        path: int(match.group(1))
        for path in work_dir.glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem))
    }
    others = sorted(steps, key=steps.__getitem__, reverse=True)
    interrupted = work_dir / INTERRUPTED
    if interrupted.is_file():  # its name does not tell its step
        moment = interrupted.stat().st_mtime
        others.insert(sum(path.stat().st_mtime > moment for path in others), interrupted)
    for path in others:
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
    wrong = _not_of_a_run(checkpoint)
    if wrong:
        raise UserError(
            f"{path} cannot be resumed from because its {wrong} is not what a training run writes; to "
            f"start from its weights use --cfg-options load_from={path}"
        )


def _not_of_a_run(checkpoint: dict[str, Any]) -> str:
    """The first entry, if any, that mmengine could not go on from."""
    meta, optimizer, hub = (checkpoint[name] for name in ("meta", "optimizer", "message_hub"))
    for name, entry, keys in (
        ("meta", meta, ("epoch", "iter")),
        ("optimizer", optimizer, ("state", "param_groups")),
        ("message_hub", hub, ("log_scalars", "runtime_info", "resumed_keys")),
    ):
        if type(entry) not in (dict, OrderedDict) or not all(key in entry for key in keys):
            return name
    for name in ("epoch", "iter"):
        if type(meta[name]) is not int or meta[name] < 0:
            return f"meta['{name}']"
    if type(meta.get("seed", 0)) not in (int, type(None)):
        return "meta['seed']"
    for name in ("log_scalars", "runtime_info", "resumed_keys"):
        if type(hub[name]) not in (dict, OrderedDict) or not all(
            isinstance(k, str) for k in hub[name]
        ):
            return f"message_hub['{name}']"
    histories = [entry for entry in hub["log_scalars"].values() if isinstance(entry, HistoryBuffer)]
    if any(
        not isinstance(vars(entry).get(name), np.ndarray)
        for entry in histories
        for name in ("_log_history", "_count_history")
    ):
        return "message_hub['log_scalars']"
    return ""


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
    state_dict = weights_of(checkpoint, path)
    try:
        load_state_dict(model, state_dict, strict=True)
    except Exception as error:  # what is no tensor fails in many ways
        raise UserError(_misfit(model, state_dict, checkpoint, path)) from error


def weights_of(
    checkpoint: dict[str, Any], path: str = "the checkpoint", strip: str = r"^module\."
) -> dict[str, Any]:
    """The weights in a checkpoint, without the ``module.`` of distributed training.

    Raises:
        UserError: If there is something else where the weights should be.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise UserError(f"{path} holds no weights: its state_dict is not a dictionary of names")
    renamed = type(state_dict)((re.sub(strip, "", k), v) for k, v in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        renamed._metadata = metadata
    return renamed


def classes_of(checkpoint: dict[str, Any]) -> Optional[list[str]]:
    """The class names a checkpoint was trained on, if it tells."""
    classes = dataset_meta_of(checkpoint).get("classes")
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None


def dataset_meta_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about the data it was trained on: anything at all, or nothing."""
    meta = checkpoint.get("meta")
    dataset_meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
    return dataset_meta if isinstance(dataset_meta, dict) else {}


def _misfit(
    model: nn.Module, state_dict: dict[str, Any], checkpoint: dict[str, Any], path: str
) -> str:
    """One sentence on how ``state_dict`` differs from what ``model`` has."""
    own = model.state_dict()
    missing = [k for k in own if k not in state_dict and "num_batches_tracked" not in k]
    unexpected = [k for k in state_dict if k not in own]
    reshaped = [
        f"{k} is {_shape_of(state_dict[k])} there and {tuple(own[k].shape)} here"
        for k in own
        if k in state_dict and getattr(state_dict[k], "shape", None) != own[k].shape
    ]
    found = [
        f"{len(keys)} {what} ({shown(keys)})"
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


def _shape_of(value: Any) -> Any:
    """The shape of what a checkpoint holds for a weight, or what it is instead of a tensor."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _origin(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint's own notes say about where it comes from."""
    meta = checkpoint.get("meta")
    if not isinstance(meta, dict):
        return ""
    notes = []
    # The experiment is named <config>_<date>_<time>.
    name = re.sub(r"_\d{8}_\d{6}$", "", brief(meta.get("experiment_name", "")))
    if name and not re.fullmatch(r"\d{8}_\d{6}", name):
        notes.append(f"with config {name}")
    backbone = text_settings(checkpoint, "model", "backbone")
    if backbone:
        arch = backbone.get("arch", backbone.get("depth", ""))
        arch = "of its own arch" if arch is None else brief(arch)
        notes.append(f"backbone {brief(backbone.get('type'))} {arch}".rstrip())
    classes = classes_of(checkpoint)
    if classes:
        notes.append(f"{len(classes)} classes ({shown(classes)})")
    return f"it was trained {', '.join(notes)}" if notes else ""


def text_settings(checkpoint: dict[str, Any], variable: str, *names: str) -> dict[str, Any]:
    """Part of the config whose text a checkpoint carries; that is parsed and never run.

    Args:
        checkpoint: With the text in ``meta['cfg']``, or without.
        variable: The variable of the config, such as ``"model"``.
        names: Names inside it, such as ``"backbone"``.

    Returns:
        Strings and numbers by name; None for whatever else a setting is. Empty where there is no
        such text.
    """
    meta = checkpoint.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    if not isinstance(text, str) or len(text) > _LONGEST_CONFIG:
        return {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            entries = _entries(statement.value)
            for name in names:
                entries = _entries(entries.get(name))
            return {
                name: value.value if isinstance(value, ast.Constant) else None
                for name, value in entries.items()
            }
    return {}


def _entries(node: Optional[ast.expr]) -> dict[str, ast.expr]:
    """What ``dict(name=value)`` or ``{'name': value}`` holds."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        return {
            key.value: value
            for key, value in zip(node.keys, node.values)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
    return {}
