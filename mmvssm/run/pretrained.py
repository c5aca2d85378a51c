"""Weights to start from: do they arrive where they should?"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Optional

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import nn

from ..errors import UserError, shown
from .checkpoints import load_any, weights_of

_CONVERT = "tools/convert_checkpoint.py renames those of published models"


def check_pretrained(model: nn.Module) -> list[str]:
    """Check that the weights which ``init_cfg``s name are for the modules that they initialise.

    mmengine only warns where nothing fits, and trains from random weights.

    Args:
        model: Built and thrown away; its weights are overwritten.

    Returns:
        A line on each file that fits in part.

    Raises:
        UserError: If nothing in a file fits, or more of it would under another prefix.
    """
    lines = []
    for name, module, init_cfg in _pretrained(model):
        path, prefix = init_cfg["checkpoint"], init_cfg.get("prefix")
        weights = weights_of(load_any(path), path, strip="" if prefix else r"^module\.")
        if type(module).init_weights is not BaseModule.init_weights:
            continue  # it has names and a way of loading of its own
        where = f"model.{name}".rstrip(".")
        lines.append(_judge(module, where, weights, path, prefix))
    return [line for line in lines if line]


def _pretrained(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """Modules that load a file when they are initialised: name, module, its ``init_cfg``."""
    for name, module in model.named_modules():
        init_cfgs = getattr(module, "init_cfg", None) or []
        for init_cfg in [init_cfgs] if isinstance(init_cfgs, dict) else init_cfgs:
            if init_cfg.get("type") in ("Pretrained", PretrainedInit):
                if not isinstance(init_cfg.get("checkpoint"), str):
                    where = f"model.{name}".rstrip(".")
                    raise UserError(f"{where}.init_cfg needs the checkpoint's file name")
                yield name, module, init_cfg


def _judge(
    module: nn.Module, where: str, weights: dict[str, Any], path: str, prefix: Optional[str]
) -> str:
    """Refuse weights that are not for ``module``; a line if they are for a part of it."""
    own = {k: v.shape for k, v in module.state_dict().items() if "num_batches_tracked" not in k}
    chosen = f"{prefix.rstrip('.')}." if prefix else ""
    given = {key[len(chosen) :]: value for key, value in weights.items() if key.startswith(chosen)}
    misfits = _load(module, given)
    matching = len(own.keys() - misfits)
    best, count = _best_prefix(own, weights)
    if matching and count <= matching:
        if not misfits:
            return ""
        return (
            f"{where}.init_cfg: {matching} of its {len(own)} weights come from {path}; "
            f"{shown(sorted(misfits))} stay as they are initialised"
        )
    under = f" with prefix={prefix!r}" if prefix else ""
    if count > matching:
        remedy = f"prefix={best!r}" if best else "no prefix"
        remedy = f"with {remedy} {count} would"
    else:
        remedy = f"under no prefix would any ({_CONVERT})"
    raise UserError(
        f"{where}.init_cfg: {matching} of its {len(own)} weights match {path}{under}; {remedy}"
    )


def _load(module: nn.Module, weights: dict[str, Any]) -> set[str]:
    """Load what fits, as PyTorch does with all that models do themselves; the names left out."""
    own = module.state_dict()
    fitting = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    left_out = set()
    while True:
        try:
            missing = module.load_state_dict(dict(fitting), strict=False).missing_keys
        except RuntimeError as error:  # of shapes that differ, which strict does not cover
            wrong = {k for k in fitting if f"size mismatch for {k}:" in str(error)}
            if not wrong:
                return set(own)
            left_out |= wrong
            fitting = {k: v for k, v in fitting.items() if k not in wrong}
            continue
        return {k for k in {*missing, *left_out} if k in own and "num_batches_tracked" not in k}


def _best_prefix(own: dict[str, torch.Size], weights: dict[str, Any]) -> tuple[str, int]:
    """The beginning of names under which most of ``own`` is in ``weights``, and how many."""
    counts: Counter[str] = Counter()
    for key, value in weights.items():
        parts = key.split(".")
        for depth in range(len(parts)):
            rest = ".".join(parts[depth:])
            if rest in own and getattr(value, "shape", None) == own[rest]:
                counts[key[: len(key) - len(rest)]] += 1
    return max(counts.items(), key=lambda item: item[1], default=("", 0))


def count_shared(model: nn.Module, checkpoint: dict[str, Any], path: str) -> str:
    """A line on how much of ``model`` a checkpoint to start from (``load_from``) has.

    Raises:
        UserError: If it has nothing.
    """
    own = {k: v.shape for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    weights = weights_of(checkpoint, path)
    shared = sum(getattr(weights.get(key), "shape", None) == shape for key, shape in own.items())
    if not shared:
        raise UserError(f"none of the weights in {path} fits this model")
    return f"Starting from {path}: {shared} of the model's {len(own)} weights come from it"
