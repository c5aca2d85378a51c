"""Training that, killed and resumed, continues as if nothing had happened.

Two things make a run depend on its own past: the state of the random number generators, and how
far data workers had come. Both are replaced by functions of where the run *is*: an image's
augmentation follows from (seed, rank, epoch, position in the epoch), whatever worker makes it, and
the randomness of a training step (dropout, drop path, sampling of proposals) from
(seed, rank, iteration).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np
import torch
from mmengine import registry as root
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import BatchSampler, Sampler

from ..registry import DATA_SAMPLERS, HOOKS

# Keep the two families of seeds apart.
_SAMPLE, _STEP = 0, 1


def derive_seed(*path: int) -> int:
    """A 32-bit seed that depends on every number in ``path`` and on their order."""
    return int(np.random.SeedSequence([int(part) for part in path]).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CUDA's included)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededIndex(int):
    """The index of a sample, with the seed for its augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "SeededIndex":
        """See the class."""
        instance = super().__new__(cls, index)
        instance.seed = seed
        return instance

    def __reduce__(self) -> tuple:
        return SeededIndex, (int(self), self.seed)


class _SeededFetch:
    """Fetches a batch of samples, each under its own seed.

    A dataset's ``__getitems__``, where it has one, is how PyTorch's data loader asks for a batch.
    """

    def __init__(self, dataset: Sequence[Any]) -> None:
        self.dataset = dataset

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        samples = []
        for index in indices:
            if isinstance(index, SeededIndex):
                seed_all(index.seed)
            samples.append(self.dataset[int(index)])
        return samples


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Gives every sample that another sampler draws a seed for its augmentation.

    Args:
        dataset: The data set to draw from.
        sampler: Config of the sampler that decides which samples, and in which order.
        seed: Base of all seeds. Defaults to the inner sampler's.
    """

    def __init__(self, dataset: Any, sampler: dict, seed: Optional[int] = None) -> None:
        self.dataset = dataset
        self._config = dict(sampler)
        self._config.setdefault("seed", seed)
        self.sampler = self._build()
        # Where seeds differ between ranks, or none was given, the inner sampler agreed on one;
        # keep it so that a rebuilt sampler draws the same samples.
        if self._config["seed"] is None:
            self._config["seed"] = getattr(self.sampler, "seed", 0)
        self.seed = self._config["seed"]
        self.epoch = 0
        self._start = 0
        dataset.__getitems__ = _SeededFetch(dataset)

    def __iter__(self) -> Iterator[SeededIndex]:
        start, self._start = self._start, 0
        rank, epoch = get_rank(), self.epoch
        for position, index in enumerate(self.sampler):
            if position >= start:
                yield SeededIndex(index, derive_seed(_SAMPLE, self.seed, rank, epoch, position))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw as in the given epoch from the next iteration on."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def restart_at(self, position: int) -> None:
        """Begin the next iteration ``position`` samples into the stream, as if they were drawn."""
        self.sampler = self._build()
        self.set_epoch(self.epoch)
        self._start = position

    def _build(self) -> Sampler:
        return root.DATA_SAMPLERS.build(self._config, default_args={"dataset": self.dataset})


@HOOKS.register_module()
class ReproducibleResumeHook(Hook):
    """Seeds every training iteration from (seed, rank, iteration).

    With :class:`SeededSampler` (:func:`make_reproducible` adds both to a config) a resumed run
    repeats an uninterrupted one exactly, for epoch-based and iteration-based loops. Iteration-based
    resuming also becomes quick: mmengine loads and discards all the data seen so far, here the
    sampler jumps over it wherever batches are plain runs of samples.
    """

    # Before anything else may draw a random number.
    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the epoch and, in a resumed iteration-based run, jump to where it stopped."""
        seed_all(derive_seed(_STEP, runner.seed, get_rank(), runner.iter))
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and loop.iter > 0:
            _fast_forward(loop)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[Any] = None
    ) -> None:
        """Seed the iteration."""
        seed_all(derive_seed(_STEP, runner.seed, get_rank(), runner.iter))


class _Skipping:
    """An iterator whose first ``skip`` items cost nothing and are None."""

    def __init__(self, iterator: Iterator, skip: int) -> None:
        self._iterator = iterator
        self._skip = skip

    def __iter__(self) -> "_Skipping":
        return self

    def __next__(self) -> Any:
        if self._skip > 0:
            self._skip -= 1
            return None
        return next(self._iterator)


def _fast_forward(loop: IterBasedTrainLoop) -> None:
    """Make the loop's own advance over ``loop.iter`` batches free, if they can be counted.

    They can where the stream never ends (so that it has no epochs) and batches are runs of it.
    """
    loader = loop.dataloader
    sampler = getattr(loader.batch_sampler, "sampler", None)
    endless = isinstance(sampler, SeededSampler) and sampler._config["type"] == "InfiniteSampler"
    if not endless or type(loader.batch_sampler) is not BatchSampler:
        return
    # The loop began to load when it was built; those batches are of the beginning.
    loop.dataloader_iterator = None
    loader._iterator = None
    sampler.restart_at(loop.iter * loader.batch_sampler.batch_size)
    loop.dataloader_iterator = _Skipping(_InfiniteDataloaderIterator(loader), loop.iter)


def make_reproducible(cfg: Config) -> None:
    """Add :class:`SeededSampler` and :class:`ReproducibleResumeHook` to a training config.

    Args:
        cfg: Changed in place. What it has of them already is left as it is.
    """
    hooks = list(cfg.get("custom_hooks") or [])
    if not any(hook.get("type") == "mmvssm.ReproducibleResumeHook" for hook in hooks):
        hooks.append(ConfigDict(type="mmvssm.ReproducibleResumeHook"))
        cfg.custom_hooks = hooks
    loader = cfg.train_dataloader
    if loader.get("sampler") and loader.sampler.type != "mmvssm.SeededSampler":
        loader.sampler = ConfigDict(type="mmvssm.SeededSampler", sampler=loader.sampler)
