"""Loading checkpoints without ever running code from them.

PyTorch loads with ``weights_only=True``, which knows tensors and plain containers and refuses
everything else. A training checkpoint of mmengine holds a little more: the history of its scalars
(:class:`mmengine.logging.HistoryBuffer`) and NumPy numbers. :func:`register_safe_globals` admits
exactly those.
"""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Files and whatever pickles them name NumPy's internals by both the old and the new module path.
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMBER_TYPES = "?bBhHiIlLqQefdg"
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class UnsafeCheckpointError(ValueError):
    """A checkpoint file that was refused; the message is one clear sentence."""


def _history_buffer_method(owner: Any, name: str) -> Any:
    """Stand-in for ``builtins.getattr``, which pickles of HistoryBuffer name to reach its methods.

    Raises:
        pickle.UnpicklingError: If asked for anything else.
    """
    if owner is not HistoryBuffer or name not in {"min", "max", "current", "mean"}:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL builtins.getattr of {name}")
    return getattr(owner, name)


def register_safe_globals() -> None:
    """Let ``torch.load(..., weights_only=True)`` read mmengine's own training checkpoints.

    Admits HistoryBuffer with its four statistics, and NumPy's arrays and numbers. Idempotent. It
    does nothing under PyTorch older than 2.5, which cannot register a function by another's name.
    """
    try:
        from numpy._core import multiarray
    except ImportError:  # NumPy 1
        from numpy.core import multiarray
    allowed: list[Any] = [
        HistoryBuffer,
        (_history_buffer_method, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in _NUMBER_TYPES},
        *[(multiarray._reconstruct, f"{module}._reconstruct") for module in _NUMPY_MODULES],
        *[(multiarray.scalar, f"{module}.scalar") for module in _NUMPY_MODULES],
    ]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5):
        torch.serialization.add_safe_globals(allowed)


def force_weights_only() -> None:
    """Make every ``torch.load`` of this process and its children load weights only.

    For tools: a library that falls back on full unpickling, or a PyTorch whose default that is,
    cannot get around it.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    register_safe_globals()


def load_checkpoint_safely(path: Union[str, Path]) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU with ``weights_only=True``.

    Args:
        path: A local file.

    Returns:
        The dictionary in the file.

    Raises:
        UnsafeCheckpointError: If there is no such file, if it is damaged or no checkpoint, or if
            it holds code or objects; nothing in it was run.
    """
    register_safe_globals()
    path = Path(path).expanduser()
    if not path.is_file():
        raise UnsafeCheckpointError(f"there is no checkpoint file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnsafeCheckpointError(_why_refused(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise UnsafeCheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights"
        )
    return checkpoint


def _why_refused(path: Path, error: Exception) -> str:
    """One sentence on why ``torch.load`` would not read ``path``."""
    found = _REFUSED_GLOBAL.search(str(error))
    # In a zip archive of PyTorch's, whatever the restricted unpickler stumbles on is an object.
    foreign = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
    if found or foreign or "TorchScript" in str(error):
        what = f" ({found.group(1)})" if found else ""
        return (
            f"{path} was refused because it carries code or objects besides weights{what}; nothing "
            "in it was run, and a file holding only tensors and plain values is needed"
        )
    return f"{path} is not a readable PyTorch checkpoint; it may be damaged or incomplete"
