"""Candidates for a better pruning, which dense.py compares: other importances, units of tokens, a dense teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from mmdet.models.detectors import FasterRCNN
from mmengine.runner import load_checkpoint
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from mmvssm.models import PlainMamba
from mmvssm.models.backbones.plain_mamba import Layout, PlainMambaMixer
from mmvssm.models.backbones.token_backbone import LayerState, as_output
from mmvssm.models.pruning import (
    PrunedTokens,
    drop_tokens,
    select,
    with_dropped,
)
from mmvssm.registry import MODELS

SCORES = ("update", "step", "write")


@MODELS.register_module()
class CandidatePlainMamba(PlainMamba):
    """PlainMamba with another importance of tokens.

    Args:
        score: ``'update'``, the norm of what the mixer adds to a token, which a dropped token misses; ``'step'``, the
            mean step size; ``'write'``, what a token writes into the hidden state, without the decay that it meets
            there; None, the method's own.
        over_layers: Whether to average the score over all layers since the last pruning.
        unit: Tokens are kept or dropped in squares of so many by so many (STORM).
        spread: Whether the best token of each square is kept before all others, so that no part of the image is left
            without; squares are so large that about as many as tokens to keep fill the grid.
    """

    def __init__(
        self,
        *args: Any,
        score: Optional[str] = None,
        over_layers: bool = False,
        unit: int = 1,
        spread: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if score not in (None, *SCORES):
            raise ValueError(f"CandidatePlainMamba: unknown score {score!r}; known are {SCORES}.")
        self.score, self.over_layers, self.unit, self.spread = score, over_layers, unit, spread
        self._scores: list[Tensor] = []
        self._is_scored = over_layers or score is not None
        for layer in self.layers if self._is_scored else ():
            layer.mixer.__class__ = _ScoringMixer
            layer.mixer.report = self._report

    def _report(self, y: Tensor, scores: dict[str, Tensor]) -> None:
        if self.pruning is None:
            return
        known = self.score is not None
        score = scores[self.score] if known else self.pruning.importance(y, self.training)
        self._scores.append(score.detach().float())

    def forward(self, x: Tensor) -> Any:
        """As :meth:`PlainMamba.forward`."""
        self._scores.clear()
        return super().forward(x)

    def importance(
        self, y: Tensor, grid: tuple[int, int], pruned: Optional[PrunedTokens]
    ) -> Tensor:
        """Importance ``(B, L)``."""
        if not self._is_scored:
            return super().importance(y, grid, pruned)
        scores = self._scores if self.over_layers else self._scores[-1:]
        importance = torch.stack(scores).mean(0)
        self._scores.clear()
        return importance

    def choose(
        self,
        importance: Tensor,
        num_kept: int,
        pruned: Optional[PrunedTokens],
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Choose tokens, by the mean of their unit, or the best of each square first."""
        if self.unit > 1:
            importance = _mean_of_units(importance, pruned, grid, self.unit)
        if self.spread:
            side = math.ceil((math.prod(grid) / num_kept) ** 0.5 - 1e-9)
            importance = _best_of_squares_first(importance, pruned, grid, side)
        return select(importance, num_kept)


@MODELS.register_module()
class BudgetCandidate(PlainMamba):
    """PlainMamba whose images share the tokens that a batch may keep: an image with more to see keeps more.

    Every image runs by itself, since their numbers of tokens differ, and comes back as maps.
    """

    def forward(self, x: Tensor) -> Any:
        """Maps ``(B, embed_dims, h, w)``, in which dropped tokens have their last values."""
        # Up to the first pruning layer together: BatchNorm in the first layer counts whole batches.
        streams, maps = [self.embed(x)], []
        for i, layer in enumerate(self.layers):
            results = [layer(s.tokens, s.layout, self.with_cp) for s in streams]
            if i in self.out_indices:
                maps.append(
                    torch.cat([self._map(i, out, s) for s, (out, _) in zip(streams, results)])
                )
            if i in self.pruning.keep_ratios:
                streams, results = self._by_image(streams, results)
                streams = self._prune(i, streams, results)
            else:
                streams = [s._replace(tokens=out) for s, (out, _) in zip(streams, results)]
        return self.pack(maps)

    def _by_image(self, streams: list, results: list) -> tuple[list, list]:
        if len(streams) > 1:
            return streams, results
        (stream,), ((tokens, y),) = streams, results
        images = [stream._replace(padding=padding[None]) for padding in stream.padding]
        return images, [(tokens[b : b + 1], y[b : b + 1]) for b in range(len(images))]

    def _prune(self, i: int, streams: list, results: list) -> list:
        scores = []
        for stream, (_, y) in zip(streams, results):
            pruned = stream.pruned
            padding = stream.padding
            if pruned is not None:
                padding = padding.gather(1, pruned.positions)
            score = self.pruning.importance(y, self.training).masked_fill(padding, -math.inf)
            best = score.topk(math.ceil(score.shape[1] / 10)).indices
            scores.append(score.scatter(1, best, math.inf))  # every image keeps a tenth at least
        total = sum(score.shape[1] for score in scores)
        num_kept = len(scores) * self.num_kept(i, total // len(scores))
        kept, _ = select(torch.cat(scores, 1), num_kept)
        counts = torch.bincount(
            torch.repeat_interleave(torch.tensor([s.shape[1] for s in scores]))[kept[0]],
            minlength=len(scores),
        )
        found = []
        for stream, (tokens, _), score, count in zip(streams, results, scores, counts.tolist()):
            pruned = drop_tokens(tokens, stream.pruned, stream.grid, *select(score, count))
            layout = self.pruned_layout(pruned)
            found.append(stream._replace(tokens=pruned.tokens, layout=layout, pruned=pruned))
        return found

    def _map(self, i: int, tokens: Tensor, stream: Any) -> Tensor:
        out = as_output(LayerState(tokens, stream.grid, stream.pruned), self.norms[str(i)])
        return out if isinstance(out, Tensor) else with_dropped(out.tokens, out).contiguous()


class _ScoringMixer(PlainMambaMixer):
    """Reports scores of its tokens ``(B, L)`` to the backbone."""

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        out, y = super().forward(x, layout)
        self.report(y, dict(self._found, update=out.norm(dim=-1)))
        return out, y

    def scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, walks: Any) -> Tensor:
        with torch.no_grad():
            bias = self.dt_proj.bias * (2 if self.double_step_bias else 1)
            step = F.softplus(delta + bias)
            write = (step * x).abs().mean(-1) * B.norm(dim=-1)
            self._found = dict(step=step.mean(-1), write=write)
        return super().scan(x, delta, B, C, walks)


def _squares(
    importance: Tensor, pruned: Optional[PrunedTokens], grid: tuple[int, int], side: int
) -> tuple[Tensor, int]:
    """Which square of ``side`` by ``side`` each token ``(B, L)`` is in, and how many there are."""
    batch, count = importance.shape
    positions = torch.arange(count, device=importance.device).expand(batch, count)
    positions = positions if pruned is None else pruned.positions
    columns = math.ceil(grid[1] / side)
    which = positions // grid[1] // side * columns + positions % grid[1] // side
    return which, math.ceil(grid[0] / side) * columns


def _best_of_squares_first(
    importance: Tensor, pruned: Optional[PrunedTokens], grid: tuple[int, int], side: int
) -> Tensor:
    which, squares = _squares(importance, pruned, grid, side)
    best = importance.new_full((importance.shape[0], squares), -math.inf)
    best = best.scatter_reduce(1, which, importance, "amax")
    finite = importance.isfinite()  # padding stays the first to go
    known = importance.where(finite, 0)
    step = 1 + known.amax(1, keepdim=True) - known.amin(1, keepdim=True)
    return importance + step * (finite & (importance == best.gather(1, which)))


def _mean_of_units(
    importance: Tensor, pruned: Optional[PrunedTokens], grid: tuple[int, int], unit: int
) -> Tensor:
    which, units = _squares(importance, pruned, grid, unit)
    batch = importance.shape[0]
    finite = importance.isfinite()
    sums = importance.new_zeros(batch, units).scatter_add(1, which, importance.where(finite, 0))
    counts = importance.new_zeros(batch, units).scatter_add(1, which, finite.to(importance.dtype))
    means = (sums / counts.clamp(min=1)).gather(1, which)
    return means.where(finite, importance)  # padding stays the first to go


class Distilled:
    """A model that also learns the maps and logits of its dense self.

    Args:
        teacher: Checkpoint of the dense model.
        map_weight: Weight of the squared difference of the maps behind the neck, in units of the teacher's variance.
        logit_weight: Weight of the divergence from the teacher's classes; segmenters only.
        temperature: Of the latter.
    """

    def __init__(
        self,
        *args: Any,
        teacher: str,
        map_weight: float = 1.0,
        logit_weight: float = 0.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        settings = dict(kwargs, backbone=dict(kwargs["backbone"], pruning=None))
        self.path, self.map_weight, self.logit_weight = teacher, map_weight, logit_weight
        self.temperature = temperature
        self.__dict__["teacher"] = self.plain_class(*args, **settings)  # no part of the checkpoint
        self.__dict__["seen"] = {}

    def init_weights(self) -> None:
        """Initialise the student, and load the teacher."""
        super().init_weights()
        load_checkpoint(self.teacher, self.path, map_location="cpu", strict=True)
        self.teacher.eval().requires_grad_(False)

    def extract_feat(self, inputs: Tensor) -> Sequence[Tensor]:
        """Maps, which are noted."""
        self.seen["maps"] = super().extract_feat(inputs)
        return self.seen["maps"]

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """The model's own losses, and those of distillation."""
        with_logits = bool(self.logit_weight)
        hook = self.decode_head.conv_seg.register_forward_hook(self._note) if with_logits else None
        losses = super().loss(inputs, data_samples)
        if hook:
            hook.remove()
        with torch.no_grad():
            expected = self.teacher.to(inputs.device).extract_feat(inputs)
            logits = self.teacher.decode_head(expected) if with_logits else None
        if self.map_weight:
            errors = [F.mse_loss(m, e) / e.var() for m, e in zip(self.seen["maps"], expected)]
            losses["loss_maps"] = self.map_weight * sum(errors) / len(errors)
        if with_logits:
            t = self.temperature
            student, teacher = (F.log_softmax(x / t, 1) for x in (self.seen["logits"], logits))
            divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
            losses["loss_logits"] = self.logit_weight * t * t * divergence.mean()
        return losses

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen["logits"] = output


@MODELS.register_module()
class DistilledEncoderDecoder(Distilled, EncoderDecoder):
    """mmseg's ``EncoderDecoder`` with a teacher."""

    plain_class = EncoderDecoder


@MODELS.register_module()
class DistilledFasterRCNN(Distilled, FasterRCNN):
    """mmdet's ``FasterRCNN`` with a teacher."""

    plain_class = FasterRCNN
