"""Check that the pretrained weights of every ``init_cfg`` load into the model, or drop them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Optional

from mmengine.config import Config
from mmengine.model import BaseModule
from torch import Size, Tensor, nn

from ..errors import UserError, shown
from ..models.backbones.base import PRETRAINED
from ..models.weights import drop_pretrained
from .checkpoints import Checkpoint, shapes_of

_CONVERT = "tools/convert_checkpoint.py renames those of published models"


def start_from_scratch(cfg: Config) -> str:
    """Let every part of a config's model start at random.

    Args:
        cfg: Changed in place: an ``init_cfg`` that names a checkpoint becomes None; so do ``load_from`` and mmseg's
            ``pretrained``.

    Returns:
        A line that lists what is not loaded.
    """
    dropped = list(drop_pretrained(cfg.model))
    if cfg.get("load_from"):
        dropped.append(cfg.load_from)
        cfg.load_from = None
    what = f"not loaded: {', '.join(dropped)}" if dropped else "its config names no pretrained ones"
    return f"The model starts from random weights; {what}"


def check_pretrained(model: nn.Module) -> Iterator[str]:
    """Check that the weights of every ``init_cfg`` fit its module.

    If no weight fits, mmengine only warns and trains from random weights.

    Args:
        model: Built for this check; its weights are overwritten.

    Yields:
        A line on each file that fits in part.

    Raises:
        UserError: If no weight in a file fits, or if more would fit with another prefix.
    """
    for name, module, init_cfg in _pretrained(model):
        where, prefix = f"model.{name}".rstrip("."), init_cfg.get("prefix")
        if not isinstance(init_cfg.get("checkpoint"), str):
            raise UserError(f"{where}.init_cfg needs the checkpoint's file name")
        checkpoint = Checkpoint.load(init_cfg["checkpoint"])
        weights = checkpoint.weights(strip_module=not prefix)
        # A module that defines init_weights loads in its own way.
        if type(module).init_weights is BaseModule.init_weights:
            line = _compare(module, f"{where}.init_cfg", weights, checkpoint.path, prefix)
            if line:
                yield line


def _pretrained(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """Yield modules that load a file when they are initialised: name, module, its ``init_cfg``."""
    for name, module in model.named_modules():
        init_cfgs = getattr(module, "init_cfg", None) or []
        for init_cfg in [init_cfgs] if isinstance(init_cfgs, dict) else init_cfgs:
            if init_cfg.get("type") in PRETRAINED:
                yield name, module, init_cfg


def _compare(
    module: nn.Module, where: str, weights: dict[str, Any], path: str, prefix: Optional[str]
) -> Optional[str]:
    """Reject weights that are not for ``module``; return a line if they cover a part of it."""
    own = shapes_of(module)
    chosen = f"{prefix.rstrip('.')}." if prefix else ""
    given = {k.removeprefix(chosen): v for k, v in weights.items() if k.startswith(chosen)}
    left_out = _load(module, given) & own.keys()
    matching = len(own) - len(left_out)
    best, count = _best_prefix(own, weights)
    if matching and count <= matching:
        if not left_out:
            return None
        return (
            f"{where}: {matching} of its {len(own)} weights come from {path}; {shown(sorted(left_out))} keep their "
            "random initialisation"
        )
    under = f" with prefix={prefix!r}" if prefix else ""
    if count > matching:
        remedy = f"with {f'prefix={best!r}' if best else 'no prefix'} {count} would"
    else:
        remedy = f"none would with any prefix ({_CONVERT})"
    raise UserError(f"{where}: {matching} of its {len(own)} weights match {path}{under}; {remedy}")


def _load(module: nn.Module, weights: dict[str, Any]) -> set[str]:
    """Load every weight that fits, with the module's own hooks for renaming; return the names of the others."""
    fitting = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    left_out = set()
    while True:
        try:
            return left_out.union(module.load_state_dict(dict(fitting), strict=False).missing_keys)
        except (
            RuntimeError,
            ValueError,
        ) as error:  # shapes that differ; a backbone that knows none of the names
            wrong = {k for k in fitting if f"size mismatch for {k}:" in str(error)}
        if not wrong:
            return set(module.state_dict())
        left_out |= wrong
        fitting = {k: v for k, v in fitting.items() if k not in wrong}


def _best_prefix(own: dict[str, Size], weights: dict[str, Any]) -> tuple[str, int]:
    """Find the prefix under which ``weights`` hold most of ``own``; also return how many."""
    counts: Counter[str] = Counter()
    for key, value in weights.items():
        parts = key.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            if rest in own and getattr(value, "shape", None) == own[rest]:
                counts[key[: len(key) - len(rest)]] += 1
    return max(counts.items(), key=lambda item: item[1], default=("", 0))
