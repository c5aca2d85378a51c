"""Mixed precision on CPUs."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from mmvssm.errors import UserError
from mmvssm.run.hooks import BFloat16OptimWrapper
from mmvssm.run.options import use_amp
from support.toy_training import ToyModel, losses, toy_runner

SGD = dict(type="SGD", lr=0.1)
# What a config says about mixed precision, and what is left of it on a CPU.
CONFIGS = {
    "nothing": (dict(), dict()),
    "its own wrapper": (dict(type="OptimWrapper"), dict()),
    "dynamic loss scale": (dict(type="AmpOptimWrapper", loss_scale="dynamic"), dict()),
    "loss scale": (dict(type="AmpOptimWrapper", loss_scale=512.0, dtype="float16"), dict()),
    "others": (
        dict(type="AmpOptimWrapper", loss_scale=dict(init_scale=512.0), use_fsdp=False, accumulative_counts=2),
        dict(accumulative_counts=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_of_loss_scaling_are_for_gpus(case, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given, left = CONFIGS[case]
    cfg = Config(dict(optim_wrapper=dict(optimizer=SGD, **given)))
    use_amp(cfg)
    assert cfg.optim_wrapper == dict(type="mmvssm.BFloat16OptimWrapper", optimizer=SGD, **left)
    assert isinstance(build_optim_wrapper(ToyModel(), cfg.optim_wrapper), BFloat16OptimWrapper)


def test_maps_are_computed_in_bfloat16_and_handed_on_in_float32(tmp_path):
    seen = []
    run = toy_runner(tmp_path, amount=1, **{"optim_wrapper.type": "mmvssm.BFloat16OptimWrapper"})

    def note(module, given, returned):
        if module.training:
            seen.append(returned.dtype)

    run.model.middle.register_forward_hook(note)
    run.model.head.register_forward_hook(note)
    run.train()
    assert set(seen[::2]) == {torch.bfloat16} and set(seen[1::2]) == {torch.float32}
    assert len(losses(tmp_path)) == 6


MAPS = {
    "tuple": (lambda x: (x, x), lambda y: y[1]),
    "list": (lambda x: [x, x], lambda y: y[1]),
    "tensor": (lambda x: x, lambda y: y),
    "nested": (lambda x: (dict(a=[x]), "text"), lambda y: y[0]["a"][0]),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps_keep_their_structure(case):
    make, pick = MAPS[case]
    model = ToyModel()
    model.extract_feat = lambda x: make(model.stem(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with BFloat16OptimWrapper(optimizer=optimizer).optim_context(model):
        maps = model.extract_feat(torch.randn(2, 3, 4, 4))
    assert (
        type(maps) is type(make(torch.zeros(2, 3, 4, 4).mean()))
        and pick(maps).dtype == torch.float32
    )


def test_a_model_without_maps():
    model = SimpleNamespace()
    optimizer = torch.optim.SGD(ToyModel().parameters(), 0.1)
    with pytest.raises(UserError, match="SimpleNamespace does not have; train without --amp"):  # noqa: SIM117
        with BFloat16OptimWrapper(optimizer=optimizer).optim_context(model):
            pass
