"""Published weights by name, from a server on this machine; and published names wherever they are loaded."""

import argparse
import sys
import threading
import types
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint, load_state_dict

import mmvssm
from mmvssm.errors import UserError
from mmvssm.models import GroupMamba, PlainMamba, PlainMambaAdapter, SpatialMamba, Vim, VMamba
from mmvssm.models import weights as module
from mmvssm.models.published import (
    convert_groupmamba,
    convert_plainmamba,
    convert_spatialmamba,
    convert_vim,
    convert_vmamba,
)
from mmvssm.models.weights import load_published, locate
from mmvssm.models.weights_table import PUBLISHED, list_models
from mmvssm.safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIGS = Path(__file__).parents[3] / "configs"


def golden(name):
    values = np.load(GOLDEN / f"{name}_small.npz")
    return {k[2:]: torch.from_numpy(values[k]) for k in values.files if k.startswith("w/")}


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.requests.append(self.path)

    def do_GET(self):
        if "cut" not in self.path:
            super().do_GET()
            return
        content = (Path(self.directory) / "vmamba.pth").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.log_message()


@pytest.fixture
def server(tmp_path):
    """A folder that is served, at ``server.address``; ``server.requests`` lists what was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save({"model": golden("vmamba"), "epoch": 3}, folder / "vmamba.pth")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.folder, server.requests = folder, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv(module.VARIABLE, raising=False)
    return tmp_path / "hub/mmvssm"


@pytest.fixture
def publish(server, cache, monkeypatch):
    """Lets a name's address be a file on the server."""

    def at(name, file):
        model = PUBLISHED[name]._replace(address=f"{server.address}/{file}")
        monkeypatch.setitem(PUBLISHED, name, model)

    return at


def test_the_table():
    assert list_models() == list(PUBLISHED) == mmvssm.list_models()
    assert list_models("vmamba*3x*") == [
        "vmamba_tiny_maskrcnn_3x_coco",
        "vmamba_small_maskrcnn_3x_coco",
    ]
    addresses = [model.address for model in PUBLISHED.values() if not model.on_page]
    assert len(set(addresses)) == len(addresses)
    for name, model in PUBLISHED.items():
        assert name == model.name and model.address.startswith("https://")
        assert model.arch in getattr(mmvssm.models, model.backbone).arch_settings
        task = {"coco": "detection", "ade20k": "segmentation"}
        assert model.task == task.get(name.rpartition("_")[2], "classification")


def test_two_addresses_with_one_file_name(server, cache):
    """PyTorch's cache knows file names alone, and would give the first one's weights for both."""
    for folder, value in (("a", 1), ("b", 2)):
        (server.folder / folder).mkdir()
        torch.save({"x": torch.tensor(value)}, server.folder / folder / "w.pth")
    first, other = (f"{server.address}/{folder}/w.pth" for folder in "ab")
    for _ in range(2):
        assert CheckpointLoader.load_checkpoint(first)["x"] == 1
    with pytest.raises(ValueError, match=f"^{other} has the file name of .* came from {first}; "):
        CheckpointLoader.load_checkpoint(other)
    (cache.parent / "checkpoints" / "w.pth").unlink()
    assert CheckpointLoader.load_checkpoint(other)["x"] == 2


def test_it_is_downloaded_once_and_converted(publish, server, cache):
    publish("vmamba_tiny", "vmamba.pth")
    for _ in range(2):
        checkpoint = CheckpointLoader.load_checkpoint("mmvssm://vmamba_tiny")
    assert server.requests == ["/vmamba.pth"]
    assert sorted(path.name for path in cache.iterdir()) == [
        "vmamba_tiny.pth",
        "vmamba_tiny.sha256",
    ]
    expected = convert_vmamba(golden("vmamba")).state_dict
    assert checkpoint["state_dict"].keys() == expected.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], x) for name, x in expected.items())


@pytest.mark.parametrize("prefix", [None, "backbone."])
def test_a_backbone_starts_from_it(publish, prefix):
    publish("vmamba_tiny", "vmamba.pth")
    conversion = convert_vmamba(golden("vmamba"))
    init_cfg = dict(type="Pretrained", checkpoint="mmvssm://vmamba_tiny", prefix=prefix)
    model = VMamba(conversion.arch, init_cfg=init_cfg)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, conversion.state_dict[f"backbone.{name}"])


def test_a_folder_comes_first(publish, server, cache, monkeypatch):
    publish("vmamba_tiny", "absent.pth")
    monkeypatch.setenv(module.VARIABLE, str(server.folder))
    torch.save(golden("vmamba"), server.folder / "vmamba_tiny.pth")
    assert locate("vmamba_tiny") == server.folder / "vmamba_tiny.pth"
    assert not server.requests and not cache.exists()


def test_a_mirror_comes_first(publish, server, cache, monkeypatch):
    publish("vmamba_tiny", "absent.pth")
    monkeypatch.setenv(module.VARIABLE, server.address + "/")
    torch.save(golden("vmamba"), server.folder / "vmamba_tiny.pth")
    assert locate("vmamba_tiny") == cache / "vmamba_tiny.pth"
    assert server.requests == ["/vmamba_tiny.pth"]


class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("absent.pth", "HTTP Error 404"),
        ("cut.pth", "what came is not a readable PyTorch checkpoint"),
        ("hostile.pth", "what came was refused because it carries code"),
    ],
)
def test_a_download_that_fails_leaves_nothing(publish, server, cache, capsys, file, words):
    torch.save({"model": golden("vmamba"), "x": Hostile()}, server.folder / "hostile.pth")
    publish("vmamba_tiny", file)
    with pytest.raises(UserError, match=words) as caught:
        load_published("vmamba_tiny")
    assert "\n" not in str(caught.value) and "put it at" in str(caught.value)
    assert "init_cfg=None" in str(caught.value) and module.VARIABLE in str(caught.value)
    assert not list(cache.iterdir())
    assert "run" not in capsys.readouterr().out.split()


def test_without_a_network(cache, monkeypatch):
    model = PUBLISHED["vmamba_tiny"]._replace(address="http://127.0.0.1:9/vmamba.pth")
    monkeypatch.setitem(PUBLISHED, "vmamba_tiny", model)
    with pytest.raises(UserError, match=r"cannot download vmamba_tiny from http://127.*refused"):
        CheckpointLoader.load_checkpoint("mmvssm://vmamba_tiny")


def test_a_file_that_only_a_page_links(server, cache, monkeypatch):
    """The page itself is not downloaded; a mirror and a file put there by hand serve as for any other name."""
    with pytest.raises(UserError, match=r"https://github\.com/\S+ links their file; download") as e:
        locate("spatialmamba_tiny")
    assert str(cache / "spatialmamba_tiny.pth") in str(e.value) and not cache.exists()
    torch.save(golden("spatial_mamba"), server.folder / "spatialmamba_tiny.pth")
    monkeypatch.setenv(module.VARIABLE, server.address)
    assert locate("spatialmamba_tiny") == cache / "spatialmamba_tiny.pth"
    monkeypatch.delenv(module.VARIABLE)
    assert load_published("spatialmamba_tiny")["state_dict"]


def test_a_changed_file_is_refused(publish, cache):
    publish("vmamba_tiny", "vmamba.pth")
    path = locate("vmamba_tiny")
    torch.save({}, path)
    with pytest.raises(UserError, match=r"SHA-256 differs.*remove both"):
        locate("vmamba_tiny")


def test_a_file_put_there_by_hand_is_taken(publish, server, cache):
    publish("vmamba_tiny", "absent.pth")
    cache.mkdir(parents=True)
    torch.save(golden("vmamba"), cache / "vmamba_tiny.pth")
    assert load_published("vmamba_tiny")["state_dict"] and not server.requests


def test_an_unknown_name_and_another_model(publish, server):
    with pytest.raises(
        UserError, match=r"no published weights called 'vmamba_xl'; known are groupmamba_tiny, "
    ):
        CheckpointLoader.load_checkpoint("mmvssm://vmamba_xl")
    torch.save({"layer.weight": torch.zeros(1)}, server.folder / "other.pth")
    publish("vmamba_tiny", "other.pth")
    with pytest.raises(
        UserError, match="does not hold the weights of a published model, as vmamba_tiny should"
    ):
        load_published("vmamba_tiny")


def test_averaged_weights_are_taken_unless_the_name_says_otherwise(publish, server):
    plain = golden("vmamba")
    averaged = {name: value + 1 for name, value in plain.items()}
    torch.save({"model": plain, "model_ema": averaged}, server.folder / "both.pth")
    publish("vmamba_tiny", "both.pth")
    name = "backbone.stages.0.embed.conv1.bias"
    for address, source in (("vmamba_tiny", averaged), ("vmamba_tiny#model", plain)):
        checkpoint = CheckpointLoader.load_checkpoint(f"mmvssm://{address}")
        assert torch.equal(checkpoint["state_dict"][name], source["patch_embed.0.bias"])
    with pytest.raises(UserError, match="no weights under 'ema'"):
        load_published("vmamba_tiny", "ema")


# ------------------------------------------------------------------ published names, whoever loads them

CASES = {
    "groupmamba": (convert_groupmamba, lambda arch: GroupMamba(arch)),
    "plainmamba": (
        convert_plainmamba,
        lambda arch: PlainMamba(arch, img_size=64, out_indices=range(arch["num_layers"])),
    ),
    "plainmamba_adapter": (
        convert_plainmamba,
        lambda arch: PlainMambaAdapter(
            arch, img_size=64, conv_inplane=16, interaction_indexes=((0, 1), (2, 3), (4, 5))
        ),
    ),
    "spatial_mamba": (convert_spatialmamba, lambda arch: SpatialMamba(arch)),
    "vim": (convert_vim, lambda arch: Vim(arch, img_size=(40, 56), out_type="cls_token")),
    "vmamba": (convert_vmamba, lambda arch: VMamba(arch)),
}


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {f"module.{name}": x for name, x in weights.items()},
        lambda weights: {f"backbone.{name}": x for name, x in weights.items()},
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=1)},
        lambda weights: {"model_ema": weights, "model": {n: x + 1 for n, x in weights.items()}},
    ],
    ids=["bare", "module", "backbone", "model", "ema"],
)
def test_a_backbone_loads_a_published_file(model, wrap):
    """By torch and by mmengine; every weight is there and none is left at random."""
    convert, build = CASES[model]
    weights = golden(model)
    conversion = convert(weights)
    expected = {n.removeprefix("backbone."): x for n, x in conversion.state_dict.items()}
    for load in (
        lambda backbone: backbone.load_state_dict(wrap(weights), strict=False),
        lambda backbone: load_state_dict(backbone, dict(wrap(weights))),
    ):
        backbone = build(conversion.arch)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.fill_(torch.nan)
        load(backbone)
        for name, value in backbone.state_dict().items():
            if name in expected or not name.startswith("norms."):
                assert torch.equal(value, expected[name]), name


def test_a_file_by_init_cfg_without_any_option(tmp_path):
    torch.save({"state_dict": golden("groupmamba")}, tmp_path / "published.pth")
    conversion = convert_groupmamba(golden("groupmamba"))
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "published.pth"))
    backbone = GroupMamba(conversion.arch, init_cfg=init_cfg)
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, conversion.state_dict[f"backbone.{name}"])


def test_inside_a_detector(tmp_path):
    """A whole model of which the backbone has published names."""
    weights = golden("vmamba")
    conversion = convert_vmamba(weights)
    whole = torch.nn.ModuleDict(dict(backbone=VMamba(conversion.arch), neck=torch.nn.Linear(2, 2)))
    published = {f"backbone.{name}": x for name, x in weights.items()}
    torch.save({**published, "neck.weight": torch.ones(2, 2)}, tmp_path / "detector.pth")
    load_checkpoint(whole, str(tmp_path / "detector.pth"))
    assert torch.equal(whole["backbone"].norms["0"].weight, weights["outnorm0.weight"])
    assert (whole["neck"].weight == 1).all()


@pytest.mark.parametrize("model", CASES)
def test_our_own_names_load_as_before(model):
    convert, build = CASES[model]
    arch = convert(golden(model)).arch
    source, target = build(arch), build(arch)
    partly = {n: x for n, x in source.state_dict().items() if not n.startswith("norms.")}
    missing, unexpected = target.load_state_dict(partly, strict=False)
    assert not unexpected and all(name.startswith("norms.") for name in missing)
    for prefix in ("", "backbone."):
        target.load_state_dict({prefix + n: x for n, x in source.state_dict().items()})


def test_weights_of_something_else_are_refused():
    backbone = VMamba(convert_vmamba(golden("vmamba")).arch)
    with pytest.raises(
        ValueError,
        match=r"None of the checkpoint's 1 entries is a weight of VMamba.*layer1\.weight",
    ):
        backbone.load_state_dict({"layer1.weight": torch.zeros(1)}, strict=False)
    with pytest.raises(ValueError, match="is a weight of VMamba"):
        load_state_dict(backbone, golden("groupmamba"))
    whole = torch.nn.ModuleDict(dict(backbone=backbone))
    whole.load_state_dict({"neck.weight": torch.zeros(1)}, strict=False)  # nothing for the backbone


# ------------------------------------------------------------------ published files, wherever our tools read one


def settings_of_yacs(monkeypatch):
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("CfgNode", (dict,), dict(__module__="yacs.config"))
    monkeypatch.setattr(sys.modules["yacs.config"], "CfgNode", kind, raising=False)
    return kind(MODEL=kind(TYPE="vmamba"))


@pytest.mark.parametrize("model", CASES)
def test_a_published_file_is_read_under_our_names(model, tmp_path, monkeypatch):
    expected = CASES[model][0](golden(model)).state_dict
    load = module.with_published(load_checkpoint_safely)
    for content in (
        golden(model),
        {"model": golden(model), "args": argparse.Namespace(lr=1)},
        {"model": golden(model), "config": settings_of_yacs(monkeypatch)},
    ):
        torch.save(content, tmp_path / "published.pth")
        checkpoint = load(tmp_path / "published.pth")
        assert checkpoint.keys() == {"state_dict", "meta"}
        assert checkpoint["state_dict"].keys() == expected.keys()


def test_heads_and_classes_of_a_detector_are_kept(tmp_path):
    weights = {f"backbone.{name}": x for name, x in golden("vmamba").items()}
    weights["rpn_head.rpn_conv.bias"] = torch.ones(2)
    meta = {"CLASSES": ("cat", "dog"), "PALETTE": [(1, 2, 3), (4, 5, 6)], "epoch": 12}
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "detector.pth")
    checkpoint = module.with_published(load_checkpoint_safely)(tmp_path / "detector.pth")
    assert torch.equal(checkpoint["state_dict"]["rpn_head.rpn_conv.bias"], torch.ones(2))
    assert checkpoint["meta"]["dataset_meta"] == {
        "classes": ("cat", "dog"),
        "palette": [(1, 2, 3), (4, 5, 6)],
    }


def test_other_files_are_read_and_refused_as_before(tmp_path):
    load = module.with_published(load_checkpoint_safely)
    for content in ({"state_dict": {"a": torch.ones(1)}, "optimizer": {}}, {"epoch": 1}):
        torch.save(content, tmp_path / "ours.pth")
        assert load(tmp_path / "ours.pth").keys() == content.keys()
    weights = {"state_dict": {"a": torch.ones(1)}}
    for beside in (argparse.Namespace(lr=1), Hostile()):
        torch.save({**weights, "args": beside}, tmp_path / "refused.pth")
        with pytest.raises(UnsafeCheckpointError, match="was refused because it carries code or"):
            load(tmp_path / "refused.pth")
    torch.save({"model": golden("vmamba"), "args": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UnsafeCheckpointError, match="was refused because it carries code or"):
        load(tmp_path / "hostile.pth")


BROKEN = {
    "lacks others": {"layers.0.mamba.A_log": torch.zeros(4, 2)},
    "a shape": {
        "layers.0.mamba.A_log": torch.zeros(4, 2),
        "patch_embed.projection.weight": torch.zeros(()),
        "pos_embed": torch.zeros(1),
    },
    "a count": {
        **{
            name: torch.zeros(1, 1, 1, 1) for name in ("pos_embed", "patch_embed.projection.weight")
        },
        "layers.0.mamba.A_log": torch.zeros(4, 2),
        "layers.999999999.norm.weight": torch.zeros(4),
    },
}


@pytest.mark.parametrize("weights", BROKEN.values(), ids=BROKEN)
def test_names_of_a_published_model_prove_nothing(weights, tmp_path, monkeypatch):
    """Another project's file stays as it is; by a published name, and in a backbone, it is refused in one sentence."""
    torch.save(weights, tmp_path / "plainmamba_l1.pth")
    assert (
        module.with_published(load_checkpoint_safely)(tmp_path / "plainmamba_l1.pth").keys()
        == weights.keys()
    )
    monkeypatch.setenv(module.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="not the weights of a published") as caught:
        load_published("plainmamba_l1")
    assert "\n" not in str(caught.value)
    arch = convert_plainmamba(golden("plainmamba")).arch
    with pytest.raises(ValueError, match="not the weights of a published"):
        PlainMamba(arch, img_size=64).load_state_dict(weights, strict=False)
