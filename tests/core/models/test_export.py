"""Programs made by ``torch.export`` for any batch, height and width."""

import pytest
import torch
from torch.export import Dim

from mmvssm.models import GroupMamba, PlainMamba, TokenRestoration, VMamba
from support.tiny_backbones import V

GROUPMAMBA = dict(
    stem_hidden_dim=4, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1)
)
PLAINMAMBA = dict(
    embed_dims=16,
    num_layers=2,
    patch_size=8,
    num_convs_patch_embed=1,
    layers_with_dwconv=(0,),
    d_state=2,
)
SEEN = (2, 3, 72, 100)
UNSEEN = [
    (1, 3, 64, 96),  # one image; the last walks are one chunk, 64 steps, or less
    (1, 3, 48, 48),  # the size that PlainMamba's position embedding was made for
    (3, 3, 65, 97),  # odd
    (1, 3, 256, 320),  # many chunks
    (2, 3, 33, 171),
]


def export(model):
    torch.manual_seed(0)
    dims = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)  # an error where one is fixed
    with torch.no_grad():
        return torch.export.export(model.eval(), (torch.randn(SEEN),), dynamic_shapes=(dims,))


def check(program, model):
    with torch.no_grad():
        for size in (SEEN, *UNSEEN):
            x = torch.randn(size)
            for actual, expected in zip(program(x), model(x)):
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.nightly
def test_groupmamba():
    model = GroupMamba(GROUPMAMBA, out_indices=(0, 3))
    check(export(model).module(), model)


@pytest.mark.slow
def test_vmamba():
    model = VMamba(V, out_indices=(0, 3))
    check(export(model).module(), model)


@pytest.mark.slow
@pytest.mark.nightly
def test_plainmamba_saved_and_loaded(tmp_path):
    model = PlainMamba(PLAINMAMBA, img_size=48, out_indices=(0, 1))
    torch.export.save(export(model), tmp_path / "plainmamba.pt2")
    check(torch.export.load(tmp_path / "plainmamba.pt2").module(), model)


@pytest.mark.slow
@pytest.mark.nightly
def test_pruned_plainmamba_saved_and_loaded(tmp_path):
    pruning = dict(layers=(0,), keep_ratio=0.6, follow=True)
    backbone = PlainMamba(PLAINMAMBA, img_size=48, out_indices=(0, 1), pruning=pruning)
    model = torch.nn.Sequential(backbone, TokenRestoration())
    torch.export.save(export(model), tmp_path / "pruned.pt2")
    check(torch.export.load(tmp_path / "pruned.pt2").module(), model)


@pytest.mark.slow
def test_pruned_tokens_are_a_programs_output(tmp_path):
    """Without the neck, at one size, which is quicker to export."""
    pruning = dict(layers=(0,), keep_ratio=0.6)
    model = PlainMamba(PLAINMAMBA, img_size=48, pruning=pruning).eval()
    x = torch.randn(SEEN)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "pruned.pt2")
        (actual,) = torch.export.load(tmp_path / "pruned.pt2").module()(x)
        (expected,) = model(x)
    assert torch.equal(actual.positions, expected.positions) and actual.grid == expected.grid
    torch.testing.assert_close(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.departed, expected.departed)
