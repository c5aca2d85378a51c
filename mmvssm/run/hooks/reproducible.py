"""Training that, killed and resumed, continues as if nothing had happened.

Two things make a run depend on its own past: the state of the random number generators, and how
far data workers had come. Both are replaced by functions of where the run *is*: an image's
augmentation follows from (seed, rank, epoch, position in the epoch), whatever worker makes it, and
the randomness of a training step (dropout, drop path, sampling of proposals) from
(seed, rank, iteration).
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
    """The index of a sample, with the seed for its augmentation.

    Args:
        index: The index.
        path: What the seed is derived from, where it is needed: most of the samples that a resumed
            run jumps over never need it.
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
        dataset.__getitems__ = _SeededFetch(dataset)

    def __iter__(self) -> Iterator[SeededIndex]:
        rank, epoch = get_rank(), self.epoch
        for position, index in enumerate(self.sampler):
            yield SeededIndex(index, _SAMPLE, self.seed, rank, epoch, position)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw as in the given epoch from the next iteration on."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def endless(self) -> bool:
        """Whether the inner sampler is mmengine's ``InfiniteSampler``."""
        return isinstance(self.sampler, InfiniteSampler)

    def restart(self) -> None:
        """Begin the next iteration at the beginning, whatever was drawn before."""
        self.sampler = self._build()
        self.set_epoch(self.epoch)

    def _build(self) -> Sampler:
        return root.DATA_SAMPLERS.build(self._config, default_args={"dataset": self.dataset})


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler):
    """Gives the batches of another batch sampler, from anywhere on.

    Args:
        sampler: What to draw from.
        batch_size: Samples in a batch.
        batch_sampler: Config of the batch sampler that makes the batches. Defaults to PyTorch's,
            which takes samples as they come.
        drop_last: For the default: whether to leave out a last batch that is smaller.
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
        # A generator, which begins when the first batch is asked for: PyTorch makes two iterators
        # and uses one.
        skip, self._skip = self._skip, 0
        yield from islice(self.batch_sampler, skip, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def restart_at(self, batch: int) -> None:
        """Begin the next iteration at this batch, as if those before had been drawn."""
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
    """mmengine's loop over epochs, which can go on in the middle of one.

    Takes the arguments of :class:`mmengine.runner.EpochBasedTrainLoop`; the batch sampler has to be
    a :class:`ResumableBatchSampler`.
    """

    _KEY = "batches_of_interrupted_epoch"

    def remember(self, done: int) -> None:
        """Note, for the checkpoint, how many batches of the current epoch were trained on."""
        self.runner.message_hub.update_info(self._KEY, [done, len(self.dataloader)])

    def run_epoch(self) -> None:
        """Train on what is left of the epoch."""
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
            f"{len(self.dataloader)}: it is begun anew"
        )
        return 0


@HOOKS.register_module()
class ReproducibleResumeHook(Hook):
    """Seeds every training iteration, and every validation, from (seed, rank, iteration).

    With :class:`SeededSampler` (:func:`make_reproducible` adds both to a config) a resumed run
    repeats an uninterrupted one exactly, for epoch-based and iteration-based loops. Iteration-based
    resuming also becomes quick: mmengine loads and discards all the data seen so far, here the
    sampler jumps over it wherever the stream never ends.
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

    def before_val_epoch(self, runner: Runner) -> None:
        """Seed the validation, which may have to be repeated."""
        seed_all(derive_seed(_STEP, runner.seed, get_rank(), runner.iter))


def _fast_forward(loop: IterBasedTrainLoop) -> None:
    """Make the loop's own advance over ``loop.iter`` batches free, if they can be counted.

    They can where the stream never ends, so that it has no epochs.
    """
    batches = loop.dataloader.batch_sampler
    if isinstance(batches, ResumableBatchSampler) and batches.sampler.endless:
        batches.restart_at(loop.iter)
        # What the loop began to load when it was built are the batches of the beginning.
        advances = not getattr(loop, "fast_forward_on_resume", False)  # which the forks have
        loop.dataloader_iterator = _AdvancedBatches(loop.dataloader, loop.iter * advances)


class _AdvancedBatches(Iterator[Any]):
    """Batches of a loader that stands where it should, for a loop that is about to advance it.

    mmengine's loop takes a batch for each of the iterations that are done; that of the forks calls ``skip_iter``.

    Args:
        loader: What to load from, when the first batch is wanted.
        num_iters: By how many batches the loop will advance.
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
        """Advance by so many at once."""
        self._to_advance -= num_iters


def make_reproducible(cfg: Config) -> None:
    """Let a training config repeat itself exactly, also when it is interrupted and resumed.

    Adds :class:`SeededSampler`, :class:`ResumableBatchSampler`, :class:`ReproducibleResumeHook`
    and, to a training by epochs, :class:`ResumableEpochLoop`.

    Args:
        cfg: Changed in place. What it has of them already is left as it is.
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
