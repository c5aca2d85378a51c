"""Argument checks, initialisation and helpers that the backbones share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor, nn


def resolve_arch(
    owner: str, arch: Union[str, dict], settings: dict[str, dict], keys: Collection[str]
) -> dict:
    """Look up a named arch, or check that a dict has the right keys.

    Raises:
        ValueError: If the name is unknown or the keys are others.
    """
    if isinstance(arch, str):
        if arch not in settings:
            raise ValueError(
                f"{owner}: unknown arch {arch!r}; known are {', '.join(map(repr, settings))}, or a "
                f"dict with {', '.join(keys)}."
            )
        return settings[arch]
    if set(arch) != set(keys):
        raise ValueError(
            f"{owner}: an arch dict has exactly the keys {sorted(keys)}; got {sorted(arch)}."
        )
    return arch


def resolve_out_indices(
    owner: str, out_indices: Union[int, Sequence[int]], count: int, what: str
) -> tuple[int, ...]:
    """Check the numbers of the parts whose outputs are wanted.

    Args:
        owner: Name of the backbone, for the message.
        out_indices: One number or several.
        count: How many parts there are.
        what: What they are called, for the message.

    Raises:
        ValueError: If they aren't increasing numbers below ``count``.
    """
    if isinstance(out_indices, int):
        out_indices = (out_indices,)
    out_indices = tuple(out_indices)
    valid = out_indices and all(0 <= i < count for i in out_indices)
    if not valid or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(
            f"{owner}: out_indices must be increasing numbers of {what} from 0 to {count - 1}; got {out_indices}."
        )
    return out_indices


def check_rates(owner: str, drop_path_rate: float, frozen_stages: int, count: int) -> None:
    """Check ``drop_path_rate``, and ``frozen_stages`` against the number of parts.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"{owner}: drop_path_rate must be in [0, 1); got {drop_path_rate}.")
    if not -1 <= frozen_stages <= count:
        raise ValueError(
            f"{owner}: frozen_stages must be from -1 (nothing) to {count} (everything); got {frozen_stages}."
        )


def drop_path_schedule(drop_path_rate: float, count: int) -> list[float]:
    """Rates that grow linearly from 0 to ``drop_path_rate``."""
    return [drop_path_rate * i / max(count - 1, 1) for i in range(count)]


def init_parameters(module: nn.Module) -> None:
    """Initialise one module's own parameters as GroupMamba's published code does; for ``nn.Module.apply``."""
    if hasattr(module, "reset_scan_parameters"):
        module.reset_scan_parameters()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_step_size_bias(bias: Tensor) -> None:
    """Fill with what softplus makes step sizes of, log-uniform in [0.001, 0.1] (Mamba, section 3.6)."""
    dt = torch.exp(torch.empty_like(bias).uniform_(math.log(0.001), math.log(0.1))).clamp(min=1e-4)
    with torch.no_grad():
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to a channels-last map ``(B, H, W, C)`` without moving memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DownSample(nn.Module):
    """Halve the resolution."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, H / 2, W / 2, dim)``."""
        return self.norm(convolve(self.proj, x))


WRAPPINGS = ("model_ema", "state_dict_ema", "model", "state_dict")
"""Keys under which training scripts store a model's weights, in the order in which they are looked for.

Averaged weights come first: the published accuracies are theirs.
"""

READERS: dict[str, Callable[[Mapping], Union[Mapping, None]]] = {}
"""For each class of backbone, what turns published names into ours; filled by ``models/published``."""


def accept_published_names(backbone: nn.Module) -> None:
    """Let a backbone load weights under their published names, whoever loads them.

    Weights are also found under a key of :data:`WRAPPINGS`, and with ``module.`` or ``backbone.`` before their names.
    What is no weight of the backbone stays in the state dict, and is reported by whoever loads.

    Args:
        backbone: Its ``load_state_dict`` raises ``ValueError`` where none of the names is known.
    """
    backbone._register_load_state_dict_pre_hook(_rename_published, with_module=True)


def _rename_published(backbone: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    found = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    named = (*backbone.named_parameters(), *backbone.named_buffers())
    own = {prefix + name for name, _ in named}
    if not found:
        return
    weights: Mapping = {name.removeprefix(prefix): value for name, value in found.items()}
    key = next((k for k in WRAPPINGS if isinstance(weights.get(k), Mapping)), None)
    weights = weights if key is None else weights[key]
    weights = {str(name).removeprefix("module."): value for name, value in weights.items()}
    if any(name.startswith("backbone.") for name in weights):
        weights = {
            name.removeprefix("backbone."): value
            for name, value in weights.items()
            if name.startswith("backbone.")
        }
    kinds = [kind.__name__ for kind in type(backbone).__mro__ if kind.__name__ in READERS]
    read = READERS[kinds[0]](weights) if kinds else None
    if read is None and own & set(found):
        return
    ours = {prefix + name: value for name, value in (read or weights).items()}
    if not own & set(ours):
        raise ValueError(
            f"None of the checkpoint's {len(weights)} entries is a weight of {type(backbone).__name__}, under its "
            f"published names or ours. They are called {', '.join(list(map(str, weights))[:3])} ..., ours "
            f"{', '.join([name for name, _ in named][:3])} ...; name a checkpoint of this backbone."
        )
    for name in found:
        del state_dict[name]
    state_dict.update(ours)
