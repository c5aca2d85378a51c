"""Randomness that depends only on the run's position."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import Dataset

from mmvssm.run.hooks.reproducible import (
    ReproducibleResumeHook,
    ResumableBatchSampler,
    SeededIndex,
    SeededSampler,
    derive_seed,
    make_reproducible,
)


class Noise(Dataset):
    """A sample is its index and three random numbers, one of each generator."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        assert type(index) is int
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def make_loader(num_workers, sampler="DefaultSampler", persistent=False, seed=0):
    return Runner.build_dataloader(
        dict(
            dataset=Noise(),
            batch_size=4,
            num_workers=num_workers,
            persistent_workers=persistent,
            sampler=dict(type="mmvssm.SeededSampler", sampler=dict(type=sampler, shuffle=True)),
            batch_sampler=dict(type="mmvssm.ResumableBatchSampler"),
            worker_init_fn=dict(type="mmvssm.init_worker"),
            collate_fn=dict(type="default_collate"),
        ),
        seed=seed,
    )


def epoch(loader, number):
    loader.batch_sampler.sampler.set_epoch(number)
    return [torch.stack([part.double() for part in batch]) for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_samples_do_not_depend_on_workers_nor_on_the_past():
    expected = [epoch(make_loader(0), n) for n in range(3)]
    assert not torch.equal(torch.cat(expected[0], 1)[1:], torch.cat(expected[1], 1)[1:])
    for loader in (make_loader(2), make_loader(1, persistent=True)):
        assert all(same(epoch(loader, n), expected[n]) for n in range(3))
    assert same(epoch(make_loader(2, persistent=True), 2), expected[2])  # as after resuming
    assert not same(epoch(make_loader(0, seed=1), 0), expected[0])


def test_every_sample_has_randomness_of_its_own():
    values = torch.cat([b[1:] for n in range(3) for b in epoch(make_loader(2), n)], 1)
    assert len(torch.unique(values)) == values.numel()


def test_every_epoch_has_the_order_that_the_inner_sampler_gives_it():
    sampler = SeededSampler(Noise(), dict(type="DefaultSampler", shuffle=True), seed=5)
    inner = DefaultSampler(Noise(), shuffle=True, seed=5)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        inner.set_epoch(epoch)
        orders.append([int(index) for index in sampler])
        assert orders[-1] == list(inner)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_endless_stream_restarts_anywhere(num_workers):
    stream = iter(make_loader(0, "InfiniteSampler"))
    expected = [next(stream) for _ in range(8)]  # beyond one pass over the 12 samples
    loader = make_loader(num_workers, "InfiniteSampler")
    next(iter(loader))  # prefetches from the beginning, as mmengine's loop does
    loader.batch_sampler.restart_at(5)
    stream = iter(loader)
    for batch in expected[5:]:
        assert all(torch.equal(x, y) for x, y in zip(batch, next(stream)))


@pytest.mark.parametrize("advance", ["one by one", "at once", "not at all"])
def test_the_loop_advances_nothing_twice(advance):
    """mmengine's loop takes a batch for each iteration that is done; the forks' skips them, or leaves that out."""
    stream = iter(make_loader(0, "InfiniteSampler"))
    expected = [next(stream) for _ in range(8)]
    runner = SimpleNamespace(iter=5, seed=0)
    runner.train_loop = loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    loop.dataloader, loop._iter = make_loader(0, "InfiniteSampler"), 5
    loop.fast_forward_on_resume = advance == "not at all"
    ReproducibleResumeHook().before_train_epoch(runner)
    if advance == "one by one":
        for _ in range(5):
            next(loop.dataloader_iterator)
    elif advance == "at once":
        loop.dataloader_iterator.skip_iter(5)
    for batch in expected[5:]:
        assert all(torch.equal(x, y) for x, y in zip(batch, next(loop.dataloader_iterator)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_restarts_anywhere(num_workers):
    expected = epoch(make_loader(0), 1)
    loader = make_loader(num_workers, persistent=num_workers > 0)
    epoch(loader, 0)
    for start in (2, 0, 3):
        loader.batch_sampler.restart_at(start)
        assert same(epoch(loader, 1), expected[start:])
    assert same(epoch(loader, 1), expected)  # once only


def test_a_last_batch_may_be_dropped():
    sampler = SeededSampler(Noise(), dict(type="DefaultSampler", shuffle=False), seed=0)
    assert [len(b) for b in ResumableBatchSampler(sampler, 5)] == [5, 5, 2]
    dropping = ResumableBatchSampler(sampler, 5, drop_last=True)
    assert [len(b) for b in dropping] == [5, 5] and len(dropping) == 2


def test_index_travels_to_workers_with_its_seed():
    index = pickle.loads(pickle.dumps(SeededIndex(3, 1, 2)))
    assert index == 3 and index.seed == derive_seed(1, 2)
    assert derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)


SEEDED = dict(type="mmvssm.SeededSampler", sampler=dict(type="DefaultSampler", shuffle=True))
RESUMABLE = dict(type="mmvssm.ResumableBatchSampler", batch_sampler=None, drop_last=False)
ASPECT = dict(type="AspectRatioBatchSampler")
# What a config has besides its sampler, and what it has afterwards.
CONFIGS = {
    "epochs": (
        {},
        dict(by_epoch=True, max_epochs=3),
        {},
        dict(type="mmvssm.ResumableEpochLoop", max_epochs=3),
    ),
    "epochs by type": (
        dict(drop_last=True),
        dict(type="EpochBasedTrainLoop", max_epochs=3),
        dict(batch_sampler=dict(RESUMABLE, drop_last=True)),
        dict(type="mmvssm.ResumableEpochLoop", max_epochs=3),
    ),
    "iterations": (
        dict(batch_sampler=ASPECT),
        dict(by_epoch=False, max_iters=3),
        dict(batch_sampler=dict(RESUMABLE, batch_sampler=ASPECT)),
        dict(by_epoch=False, max_iters=3),
    ),
    "iterations by type": (
        {},
        dict(type="IterBasedTrainLoop", max_iters=3),
        {},
        dict(type="IterBasedTrainLoop", max_iters=3),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_is_changed_once(case):
    loader, loop, expected_loader, expected_loop = CONFIGS[case]
    cfg = Config(
        dict(
            train_cfg=loop, train_dataloader=dict(sampler=SEEDED["sampler"], batch_size=2, **loader)
        )
    )
    for _ in range(2):
        make_reproducible(cfg)
        assert cfg.custom_hooks == [dict(type="mmvssm.ReproducibleResumeHook")]
        assert cfg.train_dataloader == {
            "sampler": SEEDED,
            "batch_size": 2,
            "batch_sampler": RESUMABLE,
            **expected_loader,
        }
        assert cfg.train_cfg == expected_loop


def test_a_hook_that_is_there_stays():
    hooks = [dict(type="EMAHook"), dict(type="mmvssm.ReproducibleResumeHook", priority=3)]
    cfg = Config(dict(train_dataloader=dict(batch_size=2), custom_hooks=hooks))
    make_reproducible(cfg)
    assert cfg.custom_hooks == hooks and cfg.train_dataloader == dict(batch_size=2)
