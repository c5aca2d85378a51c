"""A training run of mmengine that takes a fraction of a second, with everything that tools/train.py adds.

Also a program: ``python toy_training.py WORK_DIR OVERRIDES`` trains as the tool does, in a process
of its own; OVERRIDES is the JSON of settings like those of :func:`toy_config`.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import mmvssm  # noqa: F401
from mmvssm.errors import run_tool
from mmvssm.run.checkpoints import find_last
from mmvssm.run.failures import run_failures
from mmvssm.run.train import prepare_training

LENGTH, BATCH = 24, 4


@DATASETS.register_module(force=True)
class ToyData(Dataset):
    """Random images.

    Args:
        size: Their height and width.
        bad: Indices of samples that are NaN.
        deadly: The index at which a worker is killed.
        slow: Seconds that a sample takes.
    """

    metainfo = dict(classes=("a", "b"))

    def __init__(self, size=4, length=LENGTH, bad=(), deadly=None, slow=0):
        self.size, self.length, self.bad = size, length, bad
        self.deadly, self.slow = deadly, slow

    def __len__(self):
        return self.length

    def get_data_info(self, index):
        return dict(width=4 + index % 3, height=5)

    def __getitem__(self, index):
        if index == self.deadly:
            os.kill(os.getpid(), 9)
        time.sleep(self.slow)
        image = torch.rand(3, self.size, self.size)
        return dict(inputs=image * float("nan") if index in self.bad else image)


class Exploding(nn.Module):
    """The identity, until it is told what to make of numbers."""

    forward_factor = backward_factor = 1.0

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.backward_factor)
        return x * self.forward_factor


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    """Batch norm, dropout and two losses.

    Args:
        explode: ``{iteration: (where, factor)}``, where being ``forward``, ``backward`` or ``loss``.
    """

    def __init__(self, explode=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2))
        self.middle = nn.Sequential(nn.ReLU(), Exploding())
        self.head = nn.Linear(4, 2)
        self.explode = {int(k): v for k, v in (explode or {}).items()}
        self.iteration = -1

    def train_step(self, data, optim_wrapper):
        self.iteration += 1
        return super().train_step(data, optim_wrapper)

    def extract_feat(self, x):
        return self.middle(self.stem(x))

    def forward(self, inputs, mode="loss"):
        x = torch.stack(list(inputs)) if isinstance(inputs, list) else inputs
        where, factor = self.explode.get(self.iteration, ("", 1.0)) if self.training else ("", 1)
        self.middle[1].forward_factor = factor if where == "forward" else 1.0
        self.middle[1].backward_factor = factor if where == "backward" else 1.0
        y = self.head(self.extract_feat(x).mean((2, 3)))
        if mode == "predict":
            return [dict(score=float(v)) for v in y[:, 0]]
        penalty = y[:, 1].square().mean()
        if where == "loss":
            penalty = penalty * factor
        return dict(loss_fit=(y[:, 0] - 1).square().mean(), loss_penalty=penalty)


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    """Gets better with every evaluation."""

    def __init__(self, names=("mAP",)):
        super().__init__(prefix="toy")
        self.names, self.value = names, 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.value += 1
        return dict.fromkeys(self.names, self.value)


def toy_config(work_dir, by_epoch=True, amount=3, **changes):
    """Make a config as tools/train.py would.

    Args:
        work_dir: Where to write.
        by_epoch: Whether ``amount`` counts epochs, of 6 iterations each, or iterations.
        amount: How long to train.
        changes: Settings in place of others; those of dictionaries are merged.
    """
    loader = dict(
        dataset=dict(type="ToyData"),
        batch_size=BATCH,
        num_workers=0,
        collate_fn=dict(type="pseudo_collate"),
    )
    endless = "DefaultSampler" if by_epoch else "InfiniteSampler"
    cfg = Config(
        dict(
            default_scope="mmengine",
            work_dir=str(work_dir),
            launcher=os.environ.get("LAUNCHER", "none"),
            experiment_name=f"{Path(work_dir).name}{time.monotonic_ns()}",
            randomness=dict(seed=0),
            log_level="WARNING",
            model=dict(type="ToyModel"),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
            param_scheduler=[dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=8)],
            train_dataloader={**loader, "sampler": dict(type=endless, shuffle=True)},
            val_dataloader={**loader, "sampler": dict(type="DefaultSampler", shuffle=False)},
            val_evaluator=dict(type="ToyMetric"),
            val_cfg=dict(),
            train_cfg=dict(by_epoch=True, max_epochs=amount)
            if by_epoch
            else dict(by_epoch=False, max_iters=amount, val_interval=6),
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=1),
                checkpoint=dict(
                    type="CheckpointHook", by_epoch=by_epoch, interval=1 if by_epoch else 6
                ),
            ),
            log_processor=dict(by_epoch=by_epoch),
        )
    )
    cfg.merge_from_dict(changes)
    if cfg.train_cfg.get("type"):
        cfg.train_cfg.pop("by_epoch")
    prepare_training(cfg)
    return cfg


def end_workers(runner):
    """At once; left to the garbage collector, each takes PyTorch five seconds."""
    for iterator in (
        getattr(runner.train_dataloader, "_iterator", None),
        getattr(getattr(runner.train_loop, "dataloader_iterator", None), "_iterator", None),
    ):
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def toy_runner(work_dir, **settings):
    return Runner.from_cfg(toy_config(work_dir, **settings))


def losses(work_dir):
    """Read the scalars of every iteration, except times: {iteration: {name: value}}."""
    logged = {}
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if "loss" in record:
                kept = {k: v for k, v in record.items() if "time" not in k and k != "memory"}
                logged[kept["step"]] = kept
    return logged


def main(work_dir, overrides):
    resume = overrides.pop("resume", False)
    if resume:
        overrides.update(resume=True, load_from=find_last(work_dir)[0].path)
    init_default_scope("mmengine")
    cfg = toy_config(work_dir, **overrides)
    if cfg.launcher != "none":
        from mmvssm.run.distributed import init_processes

        init_processes(cfg)
    runner = Runner.from_cfg(cfg)
    with run_failures(runner.work_dir):
        runner.train()


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1], json.loads(sys.argv[2])))
