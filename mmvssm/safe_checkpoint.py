"""Load checkpoints without running code from them.

``torch.load(..., weights_only=True)`` accepts tensors and plain containers only. mmengine's training checkpoints also
hold the history of scalars (:class:`mmengine.logging.HistoryBuffer`) and NumPy numbers.
:func:`register_safe_globals` allows exactly those and replaces NumPy's own reconstruction, since a pickled dtype can
have fields and sizes that make NumPy read and free foreign memory.

A checkpoint also holds the text of its config. mmengine runs it as Python when it resumes (``meta['config']``) or
infers from a checkpoint alone (``message_hub``, ``meta['cfg']``). :func:`guard_checkpoint_loader` removes that text.
"""

import functools
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Union
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from .files import read_text, write_whole
from .private_names import checkpoint_loaders

# Pickles name NumPy's internals by the old or the new module path.
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMBER_KINDS = "biuf"
_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class UnsafeCheckpointError(ValueError):
    """A checkpoint file was rejected; the message is one line."""


def _history_buffer_method(owner: Any, name: str) -> Any:
    """Replace ``builtins.getattr``, by which pickles of HistoryBuffer reach its methods.

    Raises:
        pickle.UnpicklingError: For any other attribute.
    """
    if owner is not HistoryBuffer or name not in {"min", "max", "current", "mean"}:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL builtins.getattr of {name}")
    return getattr(owner, name)


class _Dtype:
    """Replaces ``numpy.dtype``: plain numbers only; a pickle can only set the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        dtype = np.dtype(code) if isinstance(code, str) else None
        if dtype is None or dtype.kind not in _NUMBER_KINDS or dtype.names or dtype.subdtype:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code!r:.40}")
        self.dtype = dtype

    def __setstate__(self, state: tuple) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or tuple(rest[:6]) != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.dtype with parts")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """Replaces ``numpy.ndarray`` during unpickling; results computed from it are plain arrays."""

    __array_priority__ = -1.0

    def __new__(cls, *args: Any) -> "_Array":
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray made directly")

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray of objects")
        super().__setstate__((version, shape, dtype.dtype, fortran, data))

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Replace NumPy's ``_reconstruct``, the first step of unpickling an array."""
    if kind is not _Array:
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy._reconstruct of a class")
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(dtype: Any, data: Any) -> np.generic:
    """Replace NumPy's ``scalar``, which unpickles a number."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.scalar of an object")
    (number,) = np.frombuffer(data, dtype.dtype)
    return number


def register_safe_globals() -> None:
    """Let ``torch.load(..., weights_only=True)`` read mmengine's own training checkpoints.

    Allows HistoryBuffer with its four statistics, NumPy numbers, and arrays of numbers. Idempotent. Does nothing before
    PyTorch 2.5, which cannot register a function under another's name.
    """
    allowed: list[Any] = [
        HistoryBuffer,
        (_history_buffer_method, "builtins.getattr"),
        (_Array, "numpy.ndarray"),
        (_Dtype, "numpy.dtype"),
        *[(_reconstruct, f"{module}._reconstruct") for module in _NUMPY_MODULES],
        *[(_scalar, f"{module}.scalar") for module in _NUMPY_MODULES],
    ]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5):
        torch.serialization.add_safe_globals(allowed)


def force_weights_only() -> None:
    """Make every ``torch.load`` of this process and its children load weights only.

    For tools: it also covers libraries that fall back on full unpickling and versions of PyTorch that default to it.
    """
    os.environ[_FORCE] = "1"
    os.environ.pop(_FORBID, None)
    register_safe_globals()


@contextmanager
def _weights_only() -> Iterator[None]:
    """Apply :func:`force_weights_only` inside the context."""
    before = {name: os.environ.get(name) for name in (_FORCE, _FORBID)}
    force_weights_only()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def guard_checkpoint_loader(extend: Callable[[Callable], Callable] = lambda load: load) -> None:
    """Make mmengine's CheckpointLoader load weights only and drop the text of configs.

    All of OpenMMLab reads checkpoints through it: the runner's ``load_from`` and ``resume``, ``init_cfg``,
    ``init_detector``, ``init_model`` and the inferencers. Inferencers then need a config besides the weights.
    Idempotent.

    Args:
        extend: Applied to each loader that is guarded, such as to convert what it loads.
    """
    for prefix, loader in list(checkpoint_loaders().items()):
        if not hasattr(loader, "loads_weights_only"):
            loader = extend(_load_from_local if prefix == "" else _guarded(loader))
            loader.loads_weights_only = True  # type: ignore[attr-defined]
            CheckpointLoader.register_scheme(prefix, loader, force=True)


def _load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    return without_config_text(load_checkpoint_safely(filename, map_location))


def _guarded(loader: Callable) -> Callable:
    """Wrap a loader of mmengine so that it cannot fall back on full unpickling."""

    @functools.wraps(loader)  # mmengine logs its name
    def load(filename: str, *args: Any, **kwargs: Any) -> Any:
        with _weights_only(), _own_download(filename):
            return without_config_text(loader(filename, *args, **kwargs))

    return load


@contextmanager
def _own_download(address: str) -> Iterator[None]:
    """Refuse a download that ``torch.hub`` has under that file name from elsewhere; record where others come from."""
    if not address.startswith(("http://", "https://")):
        yield
        return
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(address).path).name)
    record, is_new = file.with_name(f"{file.name}.url"), not file.exists()
    if not is_new and record.is_file() and (source := read_text(record)) != address:
        raise UnsafeCheckpointError(
            f"{address} has the file name of {file}, which came from {source}; move that file away, or download this "
            "one by hand under another name"
        )
    yield
    if is_new and file.exists():
        write_whole(record, address)


def without_config_text(checkpoint: Any) -> Any:
    """Remove from ``checkpoint``, in place, the text that mmengine would run as a config."""
    if isinstance(checkpoint, dict):
        hub = checkpoint.get("message_hub")
        for notes in (
            checkpoint.get("meta"),
            hub.get("runtime_info") if isinstance(hub, dict) else None,
        ):
            if isinstance(notes, dict):
                notes.pop("cfg", None)
                notes.pop("config", None)
    return checkpoint


def load_checkpoint_safely(path: Union[str, Path], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint file with ``weights_only=True``.

    Args:
        path: A local file.
        map_location: Device to load to, as for :func:`torch.load`.

    Returns:
        The dictionary in the file.

    Raises:
        UnsafeCheckpointError: If the file is missing, damaged or no checkpoint, or holds code or objects. We run
            nothing from it.
    """
    register_safe_globals()
    path = Path(path).expanduser()
    if not path.is_file():
        raise UnsafeCheckpointError(f"there is no checkpoint file {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UnsafeCheckpointError(_why_refused(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise UnsafeCheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights"
        )
    _strip_attributes(checkpoint)
    return checkpoint


def _strip_attributes(content: dict[str, Any]) -> None:
    """Remove attributes that a pickle has set on dictionaries, since they could hide the methods.

    PyTorch's own ``_metadata`` of a state dict stays.
    """
    pending: list[Any] = [content]
    seen = set()
    while pending:
        item = pending.pop()
        if id(item) in seen or not isinstance(item, (dict, list, tuple)):
            continue
        seen.add(id(item))
        if isinstance(item, OrderedDict) and vars(item):
            metadata = vars(item).get("_metadata")
            vars(item).clear()
            if isinstance(metadata, dict) and all(type(v) is dict for v in metadata.values()):
                item._metadata = metadata  # type: ignore[attr-defined]
        pending.extend(item.values() if isinstance(item, dict) else item)


def _why_refused(path: Path, error: Exception) -> str:
    """Explain in one line why ``torch.load`` rejected ``path``."""
    found = _REFUSED_GLOBAL.search(str(error))
    # In PyTorch's zip archives, any error of the restricted unpickler is about an object.
    foreign = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
    if found or foreign or "TorchScript" in str(error):
        what = f" ({found.group(1)})" if found else ""
        return (
            f"{path} was refused because it carries code or objects besides weights{what}; we ran nothing "
            "from it; use a file with only tensors and plain values"
        )
    return f"{path} is not a readable PyTorch checkpoint; it may be damaged or incomplete"
