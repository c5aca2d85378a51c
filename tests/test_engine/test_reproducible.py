"""Randomness that follows from where a run is."""

import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvssm.engine.reproducible import (
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
            worker_init_fn=dict(type="mmvssm.init_worker"),
            collate_fn=dict(type="default_collate"),
        ),
        seed=seed,
    )


def epoch(loader, number):
    loader.sampler.set_epoch(number)
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_endless_stream_restarts_anywhere(num_workers):
    stream = iter(make_loader(0, "InfiniteSampler"))
    expected = [next(stream) for _ in range(8)]  # beyond one pass over the 12 samples
    loader = make_loader(num_workers, "InfiniteSampler")
    next(iter(loader))  # prefetches from the beginning, as mmengine's loop does
    loader.sampler.restart_at(5 * 4)
    stream = iter(loader)
    for batch in expected[5:]:
        assert all(torch.equal(x, y) for x, y in zip(batch, next(stream)))


def test_index_travels_to_workers_with_its_seed():
    index = pickle.loads(pickle.dumps(SeededIndex(3, seed=7)))
    assert index == 3 and index.seed == 7
    assert derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)


def test_config_is_changed_once():
    cfg = Config(dict(train_dataloader=dict(sampler=dict(type="DefaultSampler", shuffle=True))))
    for _ in range(2):
        make_reproducible(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ["mmvssm.ReproducibleResumeHook"]
    assert cfg.train_dataloader.sampler.sampler == dict(type="DefaultSampler", shuffle=True)
    assert isinstance(cfg.train_dataloader.sampler, dict) and SeededSampler is not None
