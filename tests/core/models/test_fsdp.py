"""FSDP2 shards a backbone stage by stage, or layer by layer, and changes no number."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp

from mmvssm.models import (
    GroupMamba,
    GroupMambaClassifier,
    PlainMamba,
    PlainMambaAdapter,
    SpatialMamba,
    Vim,
    VMamba,
)
from support.tiny_backbones import ADAPTER, GROUP, PLAIN, SPATIAL, VIM, V

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(fsdp, "fully_shard"), reason="torch has fsdp.fully_shard from 2.6 on"
    ),
]

PRUNING = dict(layers=(0, 1), keep_ratio=0.6)


@pytest.fixture
def mesh(tmp_path):
    """One process of gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: GroupMamba(GROUP), lambda m: m.stages),
        (lambda: GroupMamba(GROUP, with_cp=True), lambda m: m.stages),
        # Its class block applies the norm of the last stage, which therefore stays with the whole.
        (lambda: GroupMambaClassifier(GROUP, 3), lambda m: m.backbone.stages[:-1]),
        (lambda: SpatialMamba(SPATIAL), lambda m: m.stages),
        (lambda: VMamba(V), lambda m: m.stages),
        (lambda: PlainMamba(PLAIN, out_indices=(1, 3)), lambda m: [m.patch_embed, *m.layers]),
        (lambda: PlainMamba(PLAIN, out_indices=(1, 3), pruning=PRUNING), lambda m: m.layers),
        (lambda: Vim(VIM, out_indices=(1, 3)), lambda m: m.layers),
        (lambda: PlainMambaAdapter(**ADAPTER), lambda m: [*m.layers, m.spm]),
    ],
    ids=[
        "groupmamba",
        "checkpointing",
        "classifier",
        "spatialmamba",
        "vmamba",
        "plainmamba",
        "pruned",
        "vim",
        "adapter",
    ],
)
def test_sharded_parts_compute_the_same(mesh, build, parts):
    torch.manual_seed(0)
    plain, sharded = build(), build()
    sharded.load_state_dict(plain.state_dict())
    for part in parts(sharded):
        fsdp.fully_shard(part, mesh=mesh)
    fsdp.fully_shard(sharded, mesh=mesh)
    assert list(sharded.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for model in (plain, sharded):
        outputs = [getattr(output, "tokens", output) for output in model(x)]
        sum(output.square().mean() for output in outputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    expected, found = gradients
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name])
