"""The benchmark of other projects' scans: the same results first, and one line for each that is missing."""

import json
import sys
from importlib.util import find_spec

import onnxruntime_scan
import peers
import pytest
import torch
from peer_scans import PEERS, passes

from mmvssm.errors import UserError
from mmvssm.ops.selective_scan.naive import selective_scan_naive


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    peers.main()


def only_mmvssm_is_installed(name):
    return name == "mmvssm"


@pytest.mark.slow
def test_without_any_peer_it_times_ours_the_definition_and_a_copy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers, "find_spec", only_mmvssm_is_installed)
    out = tmp_path / "peers.json"
    tiny = (
        "--default-malloc",
        "--shape",
        "2",
        "70",
        "3",
        "1",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--out",
        str(out),
    )
    run(monkeypatch, *tiny, "--python", f"definition={sys.executable}")
    (record,) = json.loads(out.read_text())["records"]
    timed = {name: list(runs) for name, runs in record["seconds"].items()}
    assert timed == {
        "forward": ["mmvssm", "definition", "copy of the same bytes"],
        "forward and backward": ["mmvssm", "copy of the same bytes"],
    }
    assert all(len(runs) == 3 for step in record["seconds"].values() for runs in step.values())
    assert all(x < 1e-6 for x in record["differences"].values())
    printed = capsys.readouterr().out
    for name, peer in PEERS.items():
        told = f"{name} is missing; {peer.install} adds it\n" in printed
        assert told == (name != "definition")


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_installed_peers_compute_the_scan(name, states):
    if not find_spec(PEERS[name].needs):
        pytest.skip(f"{name} is not installed")
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime", minversion="1.25")
    inputs = peers.make_inputs((2, 40, 5, states))
    given = {k: x.double() for k, x in inputs.items()}
    exact = selective_scan_naive(
        **{k: x[None] if k == "A" else x[:, :, None] for k, x in given.items()}
    )[:, :, 0]
    y, *_ = passes(PEERS[name], inputs, torch.ones_like(inputs["u"]))["forward"]()
    peers.check(name, {"forward": [y.detach()]}, {"forward": [exact]})


@pytest.mark.parametrize("states", [1, 3])
def test_heads_of_linear_attention_are_the_channels_of_all_walks(states):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime", minversion="1.25")
    inputs = onnxruntime_scan.make_inputs((2, 40, 3, 5, states))
    exact = selective_scan_naive(**{name: x.double() for name, x in inputs.items()})
    y = onnxruntime_scan.as_linear_attention(inputs)()
    peers.check("LinearAttention", {"forward": [y]}, {"forward": [exact]})


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_other_results_are_refused(wrong):
    right = [torch.ones(4), torch.ones(3)]
    other = [torch.ones(4), torch.tensor([1.0, 1.0 + wrong, 1.0])]
    assert peers.check("a peer", {"forward": right}, {"forward": right}) == 0
    with pytest.raises(UserError, match="a peer computes something else"):
        peers.check("a peer", {"forward": other}, {"forward": right})


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch, capsys, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    python.chmod(0o755)
    out = tmp_path / "peers.json"
    tiny = (
        "--default-malloc",
        "--shape",
        "1",
        "20",
        "3",
        "1",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--out",
        str(out),
    )
    run(monkeypatch, *tiny, "--peer", "ipex", "--python", f"ipex={python}")
    assert "without ipex: no such module\n" in capsys.readouterr().out
    (record,) = json.loads(out.read_text())["records"]
    assert list(record["differences"]) == ["mmvssm"]


@pytest.mark.parametrize(
    ("given", "words"),
    [("other=python", "no peer 'other'"), ("ipex=nowhere", "no interpreter 'nowhere'")],
)
def test_python_that_is_not_there(monkeypatch, given, words):
    with pytest.raises(UserError, match=words):
        run(monkeypatch, "--python", given)
