"""Make resumed training equal uninterrupted training.

A run depends on its past through the random number generators and the position of the data workers. We derive both from
the run's position instead. An image's augmentation follows from (seed, rank, epoch, position in the epoch), whichever
worker loads it. The randomness of a training step (dropout, drop path, sampling of proposals) follows from (seed, rank,
iteration).
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Optional

import numpy as np
import torch
from mmengine import registry as root
from mmengine.config import Config, ConfigDict
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Sampler

from ...registry import DATA_SAMPLERS, HOOKS, LOOPS

# These tags keep the two families of seeds apart.
_SAMPLE, _STEP = 0, 1


def derive_seed(*path: int) -> int:
    """Derive a 32-bit seed from the numbers in ``path`` and their order."""
    return int(np.random.SeedSequence([int(part) for part in path]).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CUDA's included)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededIndex(int):
    """The index of a sample, with the seed for its augmentation.

    Args:
        index: The index.
        path: Numbers from which the seed is derived on first use; samples that a resumed run skips never use it.
    """

    path: tuple[int, ...]

    def __new__(cls, index: int, *path: int) -> "SeededIndex":
        """See the class."""
        instance = super().__new__(cls, index)
        instance.path = path
        return instance

    def __reduce__(self) -> tuple:
        return SeededIndex, (int(self), *self.path)

    @property
    def seed(self) -> int:
        """32 bits."""
        return derive_seed(*self.path)


class _SeededFetch:
    """Fetches a batch of samples, each with its own seed.

    It provides ``__getitems__`` of a data set, by which PyTorch's data loader requests a batch.
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
        dataset: Data set to draw from.
        sampler: Config of the sampler that chooses the samples and their order.
        seed: Base of all seeds; defaults to the inner sampler's.
    """

    def __init__(self, dataset: Any, sampler: dict, seed: Optional[int] = None) -> None:
        self.dataset = dataset
        self._config = dict(sampler)
        self._config.setdefault("seed", seed)
        self.sampler = self._build()
        # If ranks had different seeds or none, the inner sampler has chosen one for all ranks. We keep it, so that a
        # rebuilt sampler draws the same samples.
        if self._config["seed"] is None:
            self._config["seed"] = getattr(self.sampler, "seed", 0)
        self.seed = self._config["seed"]
        self.epoch = 0
        dataset.__getitems__ = _SeededFetch(dataset)

    def __iter__(self) -> Iterator[SeededIndex]:
        rank, epoch = get_rank(), self.epoch
        for position, index in enumerate(self.sampler):
            yield SeededIndex(index, _SAMPLE, self.seed, rank, epoch, position)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Use the given epoch from the next iteration over the sampler on."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def endless(self) -> bool:
        """Whether the inner sampler is mmengine's ``InfiniteSampler``."""
        return isinstance(self.sampler, InfiniteSampler)

    def restart(self) -> None:
        """Start the next iteration over the sampler at its first sample."""
        self.sampler = self._build()
        self.set_epoch(self.epoch)

    def _build(self) -> Sampler:
        return root.DATA_SAMPLERS.build(self._config, default_args={"dataset": self.dataset})


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler):
    """Yields the batches of another batch sampler, starting at any batch.

    Args:
        sampler: Sampler to draw from.
        batch_size: Samples in a batch.
        batch_sampler: Config of the batch sampler that makes the batches; defaults to PyTorch's, which keeps the order.
        drop_last: Whether PyTorch's batch sampler drops a smaller last batch.
    """

    def __init__(
        self,
        sampler: SeededSampler,
        batch_size: int,
        batch_sampler: Optional[dict] = None,
        drop_last: bool = False,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._config = batch_sampler
        self.batch_sampler = self._build()
        self._skip = 0

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        # A generator starts at the first request: PyTorch makes two iterators and uses one.
        skip, self._skip = self._skip, 0
        yield from islice(self.batch_sampler, skip, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def restart_at(self, batch: int) -> None:
        """Start the next iteration over the sampler at this batch."""
        self.sampler.restart()
        self.batch_sampler = self._build()
        self._skip = batch

    def _build(self) -> Sampler:
        if self._config is None:
            return BatchSampler(self.sampler, self.batch_size, self.drop_last)
        arguments = {"sampler": self.sampler, "batch_size": self.batch_size}
        return root.DATA_SAMPLERS.build(dict(self._config), default_args=arguments)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, able to resume in the middle of one.

    Takes the arguments of :class:`mmengine.runner.EpochBasedTrainLoop`; the batch sampler has to be
    a :class:`ResumableBatchSampler`.
    """

    _KEY = "batches_of_interrupted_epoch"

    def remember(self, done: int) -> None:
        """Store the number of finished batches of the current epoch for the checkpoint."""
        self.runner.message_hub.update_info(self._KEY, [done, len(self.dataloader)])

    def run_epoch(self) -> None:
        """Train on the remaining batches of the epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._recall()
        if done:
            self.dataloader.batch_sampler.restart_at(done)
        for number, batch in enumerate(self.dataloader, done):
            self.run_iter(number, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _recall(self) -> int:
        hub = self.runner.message_hub
        if self._KEY not in hub.runtime_info:
            return 0
        done, total = hub.pop_info(self._KEY)
        if total == len(self.dataloader):
            return int(done)
        self.runner.logger.warning(
            f"The run was interrupted after {done} of {total} batches of an epoch, which now has "
            f"{len(self.dataloader)}; we restart the epoch"
        )
        return 0


@HOOKS.register_module()
class ReproducibleResumeHook(Hook):
    """Seeds every training iteration, and every validation, from (seed, rank, iteration).

    With :class:`SeededSampler` (:func:`make_reproducible` adds both to a config) a resumed run repeats an uninterrupted
    one exactly, for epoch-based and iteration-based loops. Iteration-based resuming is also quick: mmengine loads and
    discards all earlier data, whereas our sampler skips it if the stream is endless.
    """

    # Run before anything else may draw a random number.
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

    def before_val_epoch(self, runner: Runner) -> None:
        """Seed the validation, so that repeating it gives the same result."""
        seed_all(derive_seed(_STEP, runner.seed, get_rank(), runner.iter))


def _fast_forward(loop: IterBasedTrainLoop) -> None:
    """Make the loop's own advance over ``loop.iter`` batches free, if the stream is endless.

    Only then do batches follow from their number alone, without epochs.
    """
    batches = loop.dataloader.batch_sampler
    if isinstance(batches, ResumableBatchSampler) and batches.sampler.endless:
        batches.restart_at(loop.iter)
        # The loop has begun to load the first batches when it was built.
        advances = not getattr(loop, "fast_forward_on_resume", False)  # only the forks have this
        loop.dataloader_iterator = _AdvancedBatches(loop.dataloader, loop.iter * advances)


class _AdvancedBatches(Iterator[Any]):
    """Batches of a loader that is already at the right batch, for a loop that will still skip batches.

    mmengine's loop takes a batch for each finished iteration; the forks' loop calls ``skip_iter``.

    Args:
        loader: Loader whose iteration starts at the first batch that is used.
        num_iters: Number of batches that the loop will skip.
    """

    def __init__(self, loader: Iterable[Any], num_iters: int) -> None:
        self._loader = loader
        self._batches: Optional[Iterator[Any]] = None
        self._to_advance = num_iters

    def __next__(self) -> Any:
        if self._to_advance:
            self._to_advance -= 1
            return None
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Skip ``num_iters`` batches at once."""
        self._to_advance -= num_iters


def make_reproducible(cfg: Config) -> None:
    """Make a training config exactly reproducible, also when the run is interrupted and resumed.

    Adds :class:`SeededSampler`, :class:`ResumableBatchSampler`, :class:`ReproducibleResumeHook` and, to epoch-based
    training, :class:`ResumableEpochLoop`.

    Args:
        cfg: Config, changed in place. Parts of these types that it already has stay unchanged.
    """
    hooks = list(cfg.get("custom_hooks") or [])
    if not any(hook.get("type") == "mmvssm.ReproducibleResumeHook" for hook in hooks):
        hooks.append(ConfigDict(type="mmvssm.ReproducibleResumeHook"))
        cfg.custom_hooks = hooks
    loader = cfg.train_dataloader
    if not loader.get("sampler"):
        return
    if loader.sampler.type != "mmvssm.SeededSampler":
        loader.sampler = ConfigDict(type="mmvssm.SeededSampler", sampler=loader.sampler)
    inner = loader.get("batch_sampler")
    if (inner or {}).get("type") != "mmvssm.ResumableBatchSampler":
        loader.batch_sampler = ConfigDict(
            type="mmvssm.ResumableBatchSampler",
            batch_sampler=inner,
            drop_last=loader.pop("drop_last", False),
        )
    loop = cfg.get("train_cfg") or {}
    by_epoch = loop.get("by_epoch", True) if "type" not in loop else (
        loop.type == "EpochBasedTrainLoop"
    )  # fmt: skip
    if loop and by_epoch:
        loop.pop("by_epoch", None)
        loop.type = "mmvssm.ResumableEpochLoop"
