"""Schedules after --epochs and --iters, by the rates of the schedulers that mmengine builds."""

import logging
import warnings
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmvssm.errors import UserError
from mmvssm.models import KeepRatioWarmup
from mmvssm.run.hooks import FollowSchedule
from mmvssm.run.schedule import change_length, hint_at_options, shorten_warm_ups
from support import tiny_configs
from support.tool_runs import call, sentence_of_refusal
from support.toy_training import losses, toy_config

WARM_UP = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100)
STEPS = dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1)


@pytest.fixture(autouse=True)
def failing_logs_are_quiet(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)


def config(work_dir, schedulers, length, by_epoch=True, epoch_length=20, **changes):
    """A toy run with these schedulers; a rate of 1, so that rates are factors."""
    return toy_config(
        work_dir,
        by_epoch=by_epoch,
        amount=length,
        param_scheduler=deepcopy(schedulers),
        train_dataloader=dict(dataset=dict(length=4 * epoch_length)),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1.0, momentum=0.0)),
        **changes,
    )


def set_up(cfg):
    """A runner just before it trains."""
    run = Runner.from_cfg(cfg)
    _ = run.train_loop
    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    return run


def rates(run):
    """The learning rate at every iteration of a run."""
    run.param_schedulers = run.build_param_scheduler(run.param_schedulers)
    optimizer, values = run.optim_wrapper.optimizer, []
    run.optim_wrapper._global_step = 0  # or mmengine warns of steps without the optimizer's
    epoch_length = len(run.train_dataloader)
    for iteration in range(run.max_iters):
        values.append(optimizer.param_groups[0]["lr"])
        for scheduler in run.param_schedulers:
            if not scheduler.by_epoch or (iteration + 1) % epoch_length == 0:
                scheduler.step()
    return values


def longer(work_dir, schedulers, old, new, by_epoch=True, **settings):
    """The rates at every iteration of a run, made longer or shorter."""
    cfg = config(work_dir, schedulers, old, by_epoch, **settings)
    change_length(cfg, "epochs" if by_epoch else "iters", new)
    run = set_up(cfg)
    if by_epoch:
        shorten_warm_ups(run, old)
    return rates(run)


class TestDemo:
    """configs/groupmamba_maskrcnn_shapes.py with --epochs 30: 800 images, 4 a step."""

    @pytest.fixture
    def demo(self, tmp_path):
        pytest.importorskip("mmdet")
        theirs = Config.fromfile(tiny_configs.CONFIGS / "groupmamba_maskrcnn_shapes.py")
        assert theirs.prepare_data.num_train / theirs.train_dataloader.batch_size == 200
        cfg = config(tmp_path, theirs.param_scheduler, 6, epoch_length=200)
        cfg.train_cfg.val_interval = theirs.train_cfg.val_interval
        cfg.default_hooks.checkpoint.interval = theirs.default_hooks.checkpoint.interval
        cfg.optim_wrapper.optimizer.lr = theirs.optim_wrapper.optimizer.lr
        return cfg

    def test_the_rate_reaches_its_floor_at_epoch_30(self, demo):
        line = change_length(demo, "epochs", 30)
        values = rates(set_up(demo))
        assert len(values) == 6000
        assert values[0] == pytest.approx(1e-5)  # the warm-up's first step
        assert values[99] == pytest.approx(1e-3, rel=1e-2)  # and its last, as before
        assert values[3000] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-2)
        after_warm_up = values[100:]
        assert all(a > b for a, b in zip(after_warm_up, after_warm_up[1:]))
        # Not before epoch 30 begins, and at its end.
        assert values[29 * 200] > 1.1e-5
        assert values[-1] == pytest.approx(1e-5, rel=1e-4)
        assert "30 epochs instead of 6" in line and "T_max 6 -> 30" in line

    def test_as_before_the_rate_stays_at_its_floor(self, demo):
        """Only --epochs changes the schedule."""
        demo.train_cfg.max_epochs = 30
        values = rates(set_up(demo))
        assert max(values[1200:]) == pytest.approx(1e-5, rel=1e-3)

    def test_intervals_follow(self, demo):
        change_length(demo, "epochs", 30)
        assert (demo.train_cfg.max_epochs, demo.train_cfg.val_interval) == (30, 10)
        assert demo.default_hooks.checkpoint.interval == 5
        change_length(demo, "epochs", 1)
        assert (demo.train_cfg.val_interval, demo.default_hooks.checkpoint.interval) == (1, 1)


class TestSchedulers:
    """Each kind: the new run at a point has the rate that the old one had at the same share of its length."""

    MAIN = [
        dict(type="PolyLR", power=0.9, eta_min=1e-3, end=12),
        dict(type="CosineAnnealingLR", eta_min=1e-3, T_max=12, end=12),
        dict(type="CosineAnnealingLR", eta_min=1e-3, T_max=12),
        dict(type="CosineAnnealingLR", eta_min=1e-3, begin=6, end=12, T_max=6),
        dict(type="CosineAnnealingLR", eta_min=1e-3),
        dict(type="LinearLR", start_factor=1.0, end_factor=0.01, end=12),
        dict(type="MultiStepLR", milestones=[8, 10], gamma=0.1),
        dict(type="MultiStepLR", milestones=[2, 4], begin=6, end=12, gamma=0.1),
        dict(type="StepLR", step_size=3, gamma=0.5),
        dict(type="ConstantLR", factor=0.5, begin=6, end=12),
    ]

    @staticmethod
    def as_configured(main, by_epoch, converted, epoch_length):
        main = dict(main, by_epoch=by_epoch)
        if converted:
            main["convert_to_iter_based"] = True
        if by_epoch:
            return main
        lengths = {"begin", "end", "T_max", "step_size"} & set(main)
        main.update({key: main[key] * epoch_length for key in lengths})
        if "milestones" in main:
            main["milestones"] = [value * epoch_length for value in main["milestones"]]
        return main

    @pytest.mark.parametrize("main", MAIN, ids=lambda main: main["type"])
    @pytest.mark.parametrize("kind", ["epochs", "converted", "iterations of epochs", "iterations"])
    def test_follows_the_run(self, main, kind, tmp_path):
        by_epoch, epoch_length = kind in ("epochs", "converted"), 20
        main = self.as_configured(main, by_epoch, kind == "converted", epoch_length)
        counts_epochs = kind != "iterations"
        old, new = (12, 36) if counts_epochs else (240, 720)
        cfg = config(tmp_path / "a", [main], old, counts_epochs, epoch_length)
        before = rates(set_up(cfg))
        after = longer(tmp_path / "b", [main], old, new, counts_epochs, epoch_length=epoch_length)
        assert len(after) == 3 * len(before)
        assert len(set(before)) > 1
        # Schedulers hold a value for one step, which is three times as long before as after, relative to the run.
        step = epoch_length if kind == "epochs" else 1
        for position in range(0, len(before), step):
            old_step = slice(max(0, position - step), position + 2 * step)
            near = before[old_step]
            assert min(near) * 0.99 <= after[3 * position] <= max(near) * 1.01
        assert 0 < after[-1] <= 1.01 * before[-1]  # with more steps, nearer to the floor
        assert min(after) <= min(before) * 1.01

    @pytest.mark.parametrize(
        ("new", "milestones"),
        [(36, [24, 33]), (30, [20, 28]), (24, [16, 22]), (3, [2, 2]), (2, [1, 1]), (1, [])],
    )
    def test_milestones_stay_inside_the_run(self, new, milestones, tmp_path):
        cfg = config(tmp_path, [STEPS], 12)
        change_length(cfg, "epochs", new)
        assert cfg.param_scheduler[0].milestones == milestones
        values = rates(set_up(cfg))
        assert values[-1] == pytest.approx(0.1 ** len(milestones))

    @pytest.mark.parametrize(
        ("new", "milestones"), [(30, [8, 15, 23]), (3, [1, 2, 2]), (2, [1, 1, 1]), (1, [])]
    )
    def test_unequal_steps_become_milestones(self, new, milestones, tmp_path):
        cfg = config(tmp_path, [dict(type="StepLR", step_size=3, gamma=0.5)], 12)
        change_length(cfg, "epochs", new)
        (scheduler,) = cfg.param_scheduler
        assert (scheduler.type, scheduler.milestones) == ("MultiStepLR", milestones)
        assert "step_size" not in scheduler
        factors = [0.5 ** sum(epoch >= m for m in milestones) for epoch in range(new)]
        assert rates(set_up(cfg))[::20] == pytest.approx(factors)

    @pytest.mark.parametrize(
        ("given", "step_size"), [("step_size", 3), ("type", 8)], ids=["step_size", "type"]
    )
    def test_steps_that_the_command_line_sets_stay_steps(self, given, step_size, tmp_path):
        cfg = config(tmp_path, [dict(type="StepLR", step_size=3, gamma=0.5)], 12)
        change_length(cfg, "epochs", 30, [f"param_scheduler.0.{given}"])
        (scheduler,) = cfg.param_scheduler
        assert (scheduler.type, scheduler.step_size) == ("StepLR", step_size)
        assert rates(set_up(cfg))[-1] == pytest.approx(0.5 ** (29 // step_size))

    def test_momentum_follows_too(self, tmp_path):
        momentum = dict(type="CosineAnnealingMomentum", eta_min=0.1, T_max=12, end=12)
        cfg = config(tmp_path, [STEPS, momentum], 12)
        change_length(cfg, "epochs", 24)
        assert cfg.param_scheduler[1].T_max == cfg.param_scheduler[1].end == 24

    def test_of_several_optimizers(self):
        schedulers = dict(generator=[dict(STEPS)], critic=dict(STEPS))
        cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=12), param_scheduler=schedulers))
        change_length(cfg, "epochs", 24)
        assert cfg.param_scheduler.generator[0].milestones == [16, 22]
        assert cfg.param_scheduler.critic[0].milestones == [16, 22]

    def test_mmdets_recipe_with_changes_near_its_end(self):
        """YOLOX's: a warm-up in epochs, annealing up to the last 15 epochs, another pipeline for those."""
        pytest.importorskip("mmdet.engine")
        common = dict(by_epoch=True, convert_to_iter_based=True)
        cfg = Config(
            dict(
                default_scope="mmdet",
                train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=300, val_interval=10),
                val_dataloader=dict(),
                param_scheduler=[
                    dict(type="mmdet.QuadraticWarmupLR", begin=0, end=5, **common),
                    dict(
                        type="CosineAnnealingLR",
                        eta_min=0.01,
                        begin=5,
                        T_max=285,
                        end=285,
                        **common,
                    ),
                    dict(type="ConstantLR", by_epoch=True, factor=1, begin=285, end=300),
                ],
                custom_hooks=[
                    dict(type="YOLOXModeSwitchHook", num_last_epochs=15, priority=48),
                    dict(type="SyncNormHook", priority=48),
                ],
            )
        )
        init_default_scope("mmdet")
        change_length(cfg, "epochs", 30)
        warm_up, annealing, rest = cfg.param_scheduler
        assert warm_up.end == annealing.begin == 0.5
        assert annealing.end == rest.begin - 0.5 == 28.5  # the constant one counts whole epochs
        assert annealing.T_max == 28.5
        assert cfg.custom_hooks[0].num_last_epochs == 2

    @pytest.mark.parametrize(
        "scheduler",
        [
            dict(type="OneCycleLR", eta_max=1.0, total_steps=12),
            dict(type="CosineRestartLR", periods=[4, 8], restart_weights=[1, 0.5], eta_min=1e-3),
            dict(type="ExponentialLR", gamma=0.7),
            dict(type="ReduceOnPlateauLR"),
            dict(type="AbsentLR"),
        ],
        ids=lambda scheduler: scheduler["type"],
    )
    @pytest.mark.parametrize("length", [24, 12])
    def test_another_kind_is_refused(self, scheduler, length):
        """Also for the config's own length, since --resume with --epochs repeats the schedule."""
        cfg = Config(
            dict(train_cfg=dict(by_epoch=True, max_epochs=12), param_scheduler=[STEPS, scheduler])
        )
        before = deepcopy(cfg.to_dict())
        words = rf"--epochs cannot change param_scheduler\.1 \(type='{scheduler['type']}'\)"
        with pytest.raises(UserError, match=words):
            change_length(cfg, "epochs", length)
        assert cfg.to_dict() == before

    def test_one_too_short_is_refused(self, tmp_path):
        cfg = config(tmp_path, [dict(type="PolyLR", begin=11, end=12)], 12)
        with pytest.raises(UserError, match="from 11 to 12, does not fit so short a run"):
            change_length(cfg, "epochs", 2)


class TestWarmUp:
    POLY = dict(type="PolyLR", eta_min=0.0, by_epoch=False, begin=100, end=1000)

    def test_in_iterations_stays(self, tmp_path):
        cfg = config(tmp_path, [WARM_UP, self.POLY], 1000, by_epoch=False)
        change_length(cfg, "iters", 4000)
        warm_up, poly = cfg.param_scheduler
        assert (warm_up.end, poly.begin, poly.end) == (100, 100, 4000)
        values = rates(set_up(cfg))
        assert values[99] == pytest.approx(1) and values[-1] == pytest.approx(0, abs=1e-3)

    def test_that_does_not_fit_keeps_its_share(self, tmp_path):
        values = longer(tmp_path, [WARM_UP, self.POLY], 1000, 150, by_epoch=False)
        assert values.index(max(values)) in (14, 15)  # a tenth of the run, as before
        assert max(values) == pytest.approx(1) and values[-1] == pytest.approx(0, abs=0.02)

    def test_that_did_not_fit_before_takes_half_of_the_run(self, tmp_path):
        """The demo's on the 16 images of a small data set: 4 iterations in an epoch."""
        cfg = config(tmp_path, [WARM_UP, dict(STEPS, milestones=[12])], 6, epoch_length=4)
        change_length(cfg, "epochs", 12)
        run = set_up(cfg)
        assert "LinearLR end 100 -> 24" in shorten_warm_ups(run, 6)
        values = rates(run)
        assert values[0] == pytest.approx(0.01) and values[23:] == pytest.approx([1] * 25)
        saved = Config.fromfile(next(tmp_path.glob("*.py")))
        assert saved.param_scheduler[0].end == 24

    def test_too_short_to_be_any_is_left_out(self, tmp_path):
        values = longer(tmp_path, [WARM_UP, self.POLY], 1000, 10, by_epoch=False)
        assert values[:10:3] == pytest.approx([1, 2 / 3, 1 / 3, 0])

    def test_in_parts_of_epochs_too_short_to_be_any_is_left_out(self, tmp_path):
        """mmpretrain's, on a data set of 3 iterations an epoch: a fifth of an epoch has none."""
        warm_up = dict(type="LinearLR", start_factor=0.001, end=1, convert_to_iter_based=True)
        annealing = dict(type="CosineAnnealingLR", begin=1, end=10, convert_to_iter_based=True)
        cfg = config(tmp_path, [warm_up, annealing], 10, epoch_length=3)
        change_length(cfg, "epochs", 2)
        run = set_up(cfg)
        assert "the warm-up of 0.2 epochs is removed" in shorten_warm_ups(run, 10)
        values = rates(run)
        assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
        long_enough = longer(tmp_path / "b", [warm_up, annealing], 10, 2, epoch_length=20)
        assert long_enough[0] == pytest.approx(0.001) and max(long_enough) == pytest.approx(1)

    def test_of_the_keep_ratio_ends_in_the_first_half_of_the_run(self, tmp_path):
        """Evaluation prunes fully: a run that ends before has trained another model."""
        hook = dict(type="mmvssm.KeepRatioWarmup", num_iters=300, begin=100)
        cfg = config(tmp_path, [WARM_UP], 6, epoch_length=4, custom_hooks=[hook])
        change_length(cfg, "epochs", 12)
        run = set_up(cfg)
        assert "KeepRatioWarmup num_iters 600 -> 18, begin 200 -> 6" in shorten_warm_ups(run, 6)
        (registered,) = [hook for hook in run.hooks if isinstance(hook, KeepRatioWarmup)]
        assert (registered.begin, registered.num_iters) == (6, 18)
        assert registered.progress(24) == 1 and registered.progress(23) < 1
        saved = Config.fromfile(next(tmp_path.glob("*.py")))
        (noted,) = [hook for hook in saved.custom_hooks if hook.type == "mmvssm.KeepRatioWarmup"]
        assert (noted.num_iters, noted.begin) == (18, 6)

    def test_that_fits_is_not_touched(self, tmp_path):
        cfg = config(tmp_path, [WARM_UP, STEPS], 12)
        change_length(cfg, "epochs", 24)
        assert shorten_warm_ups(set_up(cfg), 12) is None


class TestOtherSettings:
    def test_hooks_follow(self):
        pytest.importorskip("mmdet")
        init_default_scope("mmdet")
        hooks = [
            dict(type="mmvssm.KeepRatioWarmup", num_iters=300),
            dict(type="mmvssm.KeepRatioWarmup", num_iters=0, begin=7),
            dict(type="PipelineSwitchHook", switch_epoch=280, switch_pipeline=[]),
            dict(type="EMAHook", begin_epoch=2),
            dict(type="Unknown", num_iters=5),
        ]
        cfg = Config(dict(train_cfg=dict(max_epochs=6), custom_hooks=hooks))
        line = change_length(cfg, "epochs", 30)
        ratio, late, switch, ema, unknown = cfg.custom_hooks
        assert ratio.num_iters == 1500 and (late.num_iters, late.begin) == (0, 35)
        assert (switch.switch_epoch, ema.begin_epoch, unknown.num_iters) == (1400, 10, 5)
        assert "KeepRatioWarmup num_iters 300 -> 1500" in line

    def test_the_loop_follows(self):
        loop = dict(max_iters=100, val_begin=50, dynamic_intervals=[(80, 5)])
        hooks = dict(checkpoint=dict(interval=25, save_begin=50), logger=dict(interval=7))
        cfg = Config(dict(train_cfg=loop, val_dataloader=dict(a=1), default_hooks=hooks))
        change_length(cfg, "iters", 200)
        assert cfg.train_cfg.val_interval == 2 * 1000  # mmengine's own
        assert cfg.train_cfg.val_begin == 100
        assert list(map(tuple, cfg.train_cfg.dynamic_intervals)) == [(160, 10)]
        assert cfg.default_hooks.to_dict() == dict(
            checkpoint=dict(interval=50, save_begin=100), logger=dict(interval=7)
        )

    def test_no_validation_just_before_the_end(self):
        loop, hooks = dict(max_iters=1800, val_interval=600), dict(checkpoint=dict(interval=600))
        cfg = Config(dict(train_cfg=loop, val_dataloader=dict(a=1), default_hooks=hooks))
        change_length(cfg, "iters", 1000)
        assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 334

    def test_hints_at_the_options(self):
        cfg = Config(dict(train_cfg=dict(max_epochs=30)))
        hint = hint_at_options(cfg, ["train_cfg.max_epochs"])
        assert hint.endswith("--epochs 30 makes the whole schedule follow")
        assert hint_at_options(cfg, ["train_cfg.max_epochs", "param_scheduler.0.end"]) is None
        assert hint_at_options(cfg, ["train_cfg.val_interval"]) is None

    def test_what_the_command_line_sets_stays(self, tmp_path):
        cfg = config(tmp_path, [WARM_UP, STEPS], 12)
        given = [
            "train_cfg.val_interval",
            "param_scheduler.1.milestones",
            "default_hooks.checkpoint",
        ]
        change_length(cfg, "epochs", 24, given)
        assert cfg.train_cfg.get("val_interval", 1) == 1
        assert cfg.param_scheduler[1].milestones == [8, 11] and cfg.param_scheduler[1].end == 24
        assert cfg.default_hooks.checkpoint.interval == 1

    def test_the_same_length_changes_nothing(self, tmp_path):
        cfg = config(tmp_path, [WARM_UP, STEPS], 12)
        before = deepcopy(cfg.to_dict())
        assert "own schedule" in change_length(cfg, "epochs", 12)
        assert cfg.to_dict() == before


class TestResuming:
    """A resumed run has the rates that a run of the new length has from there on."""

    SCHEDULERS = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=5),
        dict(type="CosineAnnealingLR", eta_min=0.01, T_max=4, end=4, by_epoch=True),
        dict(
            type="CosineAnnealingMomentum",
            eta_min=0.2,
            end=4,
            by_epoch=True,
            convert_to_iter_based=True,
        ),
        dict(type="MultiStepLR", milestones=[3], by_epoch=True),
    ]

    def config(self, work_dir, optimizer="AdamW", **changes):
        model = dict(type="ToyModel")
        # As in the recipes: many groups of parameters, of a few kinds.
        wrapper = dict(
            optimizer=dict(_delete_=True, type=optimizer, lr=0.1),
            paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=0.5))),
        )
        if optimizer == "SGD":
            wrapper["optimizer"]["momentum"] = 0.9
        return toy_config(
            work_dir,
            amount=4,
            model=model,
            param_scheduler=deepcopy(self.SCHEDULERS),
            optim_wrapper=wrapper,
            **changes,
        )

    @staticmethod
    def train(cfg):
        run = Runner.from_cfg(cfg)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Detected call of `scheduler.step")
            run.train()
        return run

    @pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
    def test_goes_on_as_a_run_of_the_new_length(self, optimizer, tmp_path):
        whole = self.config(tmp_path / "whole", optimizer)
        change_length(whole, "epochs", 8)
        uninterrupted = self.train(whole)
        self.train(self.config(tmp_path / "run", optimizer))
        resumed = self.config(tmp_path / "run", optimizer)
        change_length(resumed, "epochs", 8)
        resumed.custom_hooks.append(dict(type="mmvssm.FollowSchedule"))
        resumed.update(resume=True, load_from=str(tmp_path / "run" / "epoch_2.pth"))
        run = self.train(resumed)
        wanted, found = losses(tmp_path / "whole"), losses(tmp_path / "run")
        for step in range(13, 49):
            for name in ("lr", "base_lr", "momentum"):
                assert found[step].get(name) == wanted[step].get(name)
        for scheduler, other in zip(run.param_schedulers, uninterrupted.param_schedulers):
            theirs = other.state_dict()
            assert scheduler.state_dict() == theirs
        for group, other in zip(
            run.optim_wrapper.param_groups, uninterrupted.optim_wrapper.param_groups
        ):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in other.items() if k != "params"
            }

    def test_without_a_new_schedule_the_hook_changes_nothing(self, tmp_path):
        """Bit by bit, also in the middle of an epoch."""
        for name, hooks in (("plain", []), ("following", [dict(type="mmvssm.FollowSchedule")])):
            cfg = self.config(tmp_path / name)
            cfg.default_hooks.checkpoint.update(by_epoch=False, interval=9)
            self.train(cfg)
            cfg = self.config(tmp_path / name)
            cfg.custom_hooks.extend(hooks)
            cfg.update(resume=True, load_from=str(tmp_path / name / "iter_9.pth"))
            self.train(cfg)
        assert losses(tmp_path / "plain") == losses(tmp_path / "following")

    def test_of_a_run_from_its_beginning_the_hook_does_nothing(self, tmp_path):
        self.train(self.config(tmp_path / "plain"))
        cfg = self.config(tmp_path / "following")
        cfg.custom_hooks.append(dict(type="mmvssm.FollowSchedule"))
        self.train(cfg)
        assert losses(tmp_path / "plain") == losses(tmp_path / "following")


@pytest.mark.filterwarnings("ignore")
class TestTool:
    @pytest.fixture(autouse=True)
    def libraries(self):
        pytest.importorskip("mmdet")
        pytest.importorskip("mmseg")

    @pytest.mark.parametrize(
        ("text", "arguments", "words"),
        [
            ("SEGMENTER", ["--epochs", 3], "this config counts iterations (train_cfg.max_iters=2); give --iters"),
            ("DETECTOR", ["--iters", 3], "this config counts epochs (train_cfg.max_epochs=1); give --epochs"),
            ("SEGMENTER", ["--iters", 0], "must be at least 1"),
            ("SEGMENTER", ["--iters", 4, "--cfg-options", "train_cfg.max_iters=5"], "give one of them"),
        ],
    )  # fmt: skip
    def test_refuses(self, text, arguments, words, config, capsys):
        path = config(getattr(tiny_configs, text))
        assert words in sentence_of_refusal(capsys, "train.py", path, *arguments)

    def test_trains_and_resumes(self, config, capsys):
        path = config(
            tiny_configs.SEGMENTER,
            "param_scheduler = [dict(type='PolyLR', by_epoch=False, end=2)]\n",
        )
        call("train.py", path, "--iters", 4, "--work-dir", "run")
        said = capsys.readouterr().out
        assert "Schedule: 4 iterations instead of 2; " in said and "PolyLR end 2 -> 4" in said
        assert "checkpoint interval 1 -> 2" in said
        saved = torch.load("run/iter_4.pth", weights_only=True)
        assert saved["param_schedulers"][0]["end"] == 4
        call("train.py", path, "--iters", 6, "--work-dir", "run", "--resume")
        saved = torch.load("run/iter_6.pth", weights_only=True)
        (state,) = saved["param_schedulers"]
        assert (state["end"], state["last_step"]) == (6, 5)
        sentence = sentence_of_refusal(
            capsys, "train.py", path, "--iters", 4, "--work-dir", "run", "--resume"
        )
        assert "has done 6 iterations, more than train_cfg.max_iters=4" in sentence

    def test_says_that_a_resumed_run_was_planned_otherwise(self, trained, config, capsys):
        path = config(tiny_configs.SEGMENTER)
        checkpoint = trained / "iter_2.pth"
        call(
            *("train.py", path, "--resume", checkpoint, "--work-dir", "new"),
            *("--cfg-options", "train_cfg.max_iters=3"),
        )
        assert "planned for train_cfg.max_iters=2 and now ends at 3" in capsys.readouterr().out


def test_the_hook_is_registered():
    from mmengine.registry import HOOKS

    assert HOOKS.get("mmvssm.FollowSchedule") is FollowSchedule
