import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmvssm.models import KeepRatioWarmup, PlainMamba
from mmvssm.models.pruning import PrunedTokens

ARCH = dict(
    embed_dims=16,
    num_layers=2,
    patch_size=8,
    num_convs_patch_embed=0,
    layers_with_dwconv=(),
    d_state=2,
)


class Model(BaseModel):
    """Notes how many tokens its backbone kept."""

    def __init__(self, pruning):
        super().__init__()
        self.backbone = PlainMamba(ARCH, img_size=32, pruning=pruning)
        self.kept = []

    def forward(self, inputs, mode="loss"):
        (y,) = self.backbone(inputs)
        tokens = y.tokens if isinstance(y, PrunedTokens) else y.flatten(2).transpose(1, 2)
        self.kept.append((self.training, tokens.shape[1]))
        return dict(loss=tokens.square().mean())


def runner(work_dir, max_iters=6, hook=None, pruning="half", **settings):
    pruning = dict(layers=[0], keep_ratio=0.5) if pruning == "half" else pruning
    data = [dict(inputs=torch.randn(3, 32, 32)) for _ in range(4)]
    return Runner(
        model=Model(pruning),
        work_dir=str(work_dir),
        train_dataloader=DataLoader(data, batch_size=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False),
            logger=dict(type="LoggerHook", interval=1),
        ),
        custom_hooks=[hook or dict(type="mmvssm.KeepRatioWarmup", num_iters=4)],
        default_scope="mmengine",
        experiment_name=f"{work_dir.name}{id(settings)}",
        **settings,
    )


@pytest.mark.slow
def test_the_ratio_falls_and_stays(tmp_path):
    run = runner(tmp_path)
    run.train()
    # Of 16 tokens: 1, 7/8, 6/8, 5/8, 1/2 of them, and from then on 1/2.
    assert [kept for _, kept in run.model.kept] == [16, 14, 12, 10, 8, 8]
    logged = run.message_hub.get_scalar("train/keep_ratio").data[0]
    assert logged.tolist() == [1, 0.875, 0.75, 0.625, 0.5, 0.5]


def test_evaluation_prunes_fully_at_any_time(tmp_path):
    run = runner(tmp_path, max_iters=2)
    run.train()
    run.model.eval()
    run.model(torch.randn(1, 3, 32, 32))
    assert run.model.kept[-1] == (False, 8)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_right_ratio(tmp_path):
    runner(tmp_path, max_iters=2).train()
    run = runner(tmp_path, resume=True, load_from=str(tmp_path / "iter_2.pth"))
    run.train()
    assert [kept for _, kept in run.model.kept] == [12, 10, 8, 8]


@pytest.mark.parametrize(
    "iteration, expected", [(0, 0), (9, 0), (10, 0), (15, 0.25), (30, 1), (99, 1)]
)
def test_progress(iteration, expected):
    assert KeepRatioWarmup(num_iters=20, begin=10).progress(iteration) == expected


def test_no_iterations_means_no_warm_up(tmp_path):
    assert KeepRatioWarmup(num_iters=0).progress(0) == 1
    hook = KeepRatioWarmup(num_iters=0, begin=10)
    assert [hook.progress(iteration) for iteration in (0, 9, 10, 11)] == [0, 0, 1, 1]
    run = runner(tmp_path, 4, dict(type="mmvssm.KeepRatioWarmup", num_iters=0, begin=2))
    run.train()
    assert [kept for _, kept in run.model.kept] == [16, 16, 8, 8]


def test_a_negative_number(tmp_path):
    with pytest.raises(ValueError, match="must not be negative; got -1 and 0"):
        KeepRatioWarmup(num_iters=-1)


def test_a_model_that_prunes_nothing(tmp_path):
    with pytest.raises(ValueError, match="the model has no pruned backbone"):
        runner(tmp_path, pruning=None).train()


def test_packing_has_no_warm_up(tmp_path):
    pruning = dict(layers=[0], keep_ratio=0.5, alignment="none")
    with pytest.raises(ValueError, match="'none' cannot pack every number of tokens"):
        runner(tmp_path, pruning=pruning).train()
    runner(tmp_path, 1, dict(type="mmvssm.KeepRatioWarmup", num_iters=0), pruning).train()


def test_checkpoints_stay_exchangeable(tmp_path):
    """The warm-up's progress is neither a parameter nor a buffer, in the model or its file."""
    run = runner(tmp_path, max_iters=2)
    run.train()
    saved = torch.load(tmp_path / "iter_2.pth", weights_only=True)["state_dict"]
    names = set(Model(dict(layers=[0], keep_ratio=0.5)).state_dict())
    assert set(saved) == names == set(run.model.state_dict())
    Model(None).load_state_dict(saved)
