"""Hooks, LoRA, quantisation and similar changes take effect also in fused computations."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from torch import nn
from torch.nn.utils import parametrize

from mmvssm.models import GroupMamba, PlainMamba, PlainMambaAdapter, SpatialMamba, Vim, VMamba
from mmvssm.models.backbones.fast_paths import is_plain, is_plain_depthwise

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
GROUPMAMBA = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
)
PLAINMAMBA = dict(
    embed_dims=16,
    num_layers=2,
    patch_size=8,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0, 1),
    d_state=4,
)
PRUNING = dict(layers=(0,), keep_ratio=0.5)
SPATIALMAMBA = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), mlp_ratio=2)
VMAMBA = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), ssm_ratio=1, mlp_ratio=2)
VIM = dict(embed_dims=8, num_layers=2, patch_size=8, stride=8, d_state=3)
ADAPTER = dict(conv_inplane=8, deform_num_heads=2, interaction_indexes=((0, 0), (1, 1)))
MODELS = {
    "groupmamba": lambda: GroupMamba(GROUPMAMBA, out_indices=(0,)),
    "plainmamba": lambda: PlainMamba(PLAINMAMBA),
    "pruned": lambda: PlainMamba(PLAINMAMBA, pruning=PRUNING),
    "spatialmamba": lambda: SpatialMamba(SPATIALMAMBA),
    "vmamba": lambda: VMamba(VMAMBA),
    "vim": lambda: Vim(VIM),
    "pruned vim": lambda: Vim(VIM, pruning=PRUNING),
    "vim packed": lambda: Vim(VIM, pruning=PRUNING | dict(alignment="none")),
    "adapter": lambda: PlainMambaAdapter(PLAINMAMBA | dict(patch_size=16), **ADAPTER),
    "packed": lambda: PlainMamba(PLAINMAMBA, pruning=PRUNING | dict(alignment="none")),
}


@pytest.fixture(autouse=True)
def on_large_maps(monkeypatch):
    """Use maps that are large enough for bands and chunks."""
    conv_ffn, chunks = (importlib.import_module(f"mmvssm.ops.{m}") for m in ("conv_ffn", "chunks"))
    for module, name, value in (
        *((conv_ffn, "BAND_BYTES", 2_000), (conv_ffn, "WHOLE_BANDS", 0)),
        *((chunks, "CHUNK_BYTES", 800), (chunks, "WHOLE_CHUNKS", 0)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
        if isinstance(module, KINDS) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model


def leaves(model):
    found = {name: m for name, m in model.named_modules() if isinstance(m, KINDS)}
    assert len(found) > 15
    return found


def run(model, x):
    maps = (y if isinstance(y, torch.Tensor) else y.tokens for y in model(x))
    return torch.cat([y.flatten(1) for y in maps], 1)


def image():
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_every_layers_hook_runs(model, kind, gradients):
    """One at a time, since a hook elsewhere may cause the call of a layer."""
    x = image()
    for name, layer in leaves(model).items():
        calls = []
        register = getattr(layer, f"register_{kind}_hook")
        handle = register(lambda *args, calls=calls: calls.append(1))
        with torch.set_grad_enabled(gradients):
            run(model, x)
        handle.remove()
        assert calls, name


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
def test_every_layers_backward_hook_runs(model, kind):
    x = image().requires_grad_()
    for name, layer in leaves(model).items():
        if isinstance(layer, nn.BatchNorm2d) or name.endswith("affinity.0"):
            continue  # PyTorch has none before an in-place ReLU
        calls = []
        register = getattr(layer, f"register_{kind}_hook")
        handle = register(lambda *args, calls=calls: calls.append(1))
        run(model, x).square().sum().backward()
        handle.remove()
        assert calls, name


class Wrapper(nn.Module):
    """Looks like a LoRA layer: it lacks the attributes of the wrapped layer."""

    def __init__(self, original_layer):
        super().__init__()
        self.original_layer = original_layer

    def forward(self, x):
        return self.original_layer(x)


@pytest.mark.parametrize("gradients", [False, True])
def test_any_layer_can_be_replaced(model, gradients):
    x = image()
    with torch.set_grad_enabled(gradients):
        expected = run(model, x)
        for name, layer in leaves(model).items():
            parent, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, attribute, Wrapper(layer))
            actual = run(model, x)
            setattr(parent, attribute, layer)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, msg=name)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrizations_take_effect(model):
    """A parametrization doubles a weight."""
    x = image()
    for name, layer in leaves(model).items():
        other = copy.deepcopy(model)
        other.get_submodule(name).weight.data.mul_(2)
        parametrize.register_parametrization(layer, "weight", Twice())
        with torch.no_grad():
            torch.testing.assert_close(
                *(run(m, x) for m in (model, other)), atol=1e-4, rtol=1e-4, msg=name
            )
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def test_batch_norm_can_be_fused_into_convolutions(model):
    if isinstance(model, PlainMambaAdapter):
        pytest.skip("norms of its outputs follow no convolution")
    x = image()
    with torch.no_grad():
        expected = run(model, x)
        fused = fuse_conv_bn(model)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
        torch.testing.assert_close(run(fused, x), expected, atol=1e-4, rtol=1e-4)


def test_batch_norm_that_is_told_to_train_does_so_without_gradients():
    """Recomputing its statistics does this."""
    model = GroupMamba(GROUPMAMBA, out_indices=(0,)).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        run(model, image())
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * 3


def first_part(model, x):
    """What a model computes before tokens that are nearly as important change places."""
    if isinstance(model, (SpatialMamba, VMamba, PlainMambaAdapter)):
        return run(model, x)
    walk = model.walk_stages if isinstance(model, GroupMamba) else model.walk_layers
    return next(iter(walk(x)))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linear_layers_can_be_quantised(model):
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    x = image()
    with torch.no_grad():
        expected = first_part(model, x)
        quantised = quantize(model, {nn.Linear}, dtype=torch.qint8)
        assert not any(type(m) is nn.Linear for m in quantised.modules())
        actual = first_part(quantised, x)
    assert (actual - expected).norm() < 0.05 * expected.norm()


class Noting(torch.Tensor):
    """A weight of a type of its own, as quantised and distributed ones are."""

    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_another_type_are_left_to_their_layer():
    torch.manual_seed(0)
    model = MODELS["groupmamba"]().eval()
    fc1 = model.stages[0].blocks[0].ffn.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().as_subclass(Noting))
    with torch.no_grad():
        run(model, image())
    assert F.linear in Noting.seen


def test_what_is_plain():
    linear = nn.Linear(2, 2)
    assert is_plain(linear, nn.Linear) and not is_plain(linear, nn.Conv2d)
    assert not is_plain(nn.LazyLinear(2), nn.Linear)
    linear.forward = lambda x: x
    assert not is_plain(linear, nn.Linear)


@pytest.mark.parametrize(
    "settings, plain",
    [
        (dict(kernel_size=3, padding=1, groups=4), True),
        (dict(kernel_size=7, padding=3, groups=4, bias=False), True),
        (dict(kernel_size=3, padding=1), False),
        (dict(kernel_size=3, groups=4), False),
        (dict(kernel_size=3, padding=2, dilation=2, groups=4), False),
        (dict(kernel_size=3, padding=1, stride=2, groups=4), False),
        (dict(kernel_size=3, padding=1, groups=4, padding_mode="reflect"), False),
        (dict(kernel_size=(3, 5), padding=(1, 2), groups=4), False),
        (dict(kernel_size=3, padding="same", groups=4), False),
    ],
)
def test_what_is_a_plain_depthwise_convolution(settings, plain):
    assert is_plain_depthwise(nn.Conv2d(4, 4, **settings)) is plain
