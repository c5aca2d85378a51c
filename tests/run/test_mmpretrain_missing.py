"""Configs for mmpretrain if it is not installed or does not load."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from mmvssm.errors import UserError
from mmvssm.run import setup
from support.tool_runs import sentence_of_refusal

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.skipif(find_spec("mmpretrain") is not None, reason="mmpretrain is installed here")
@pytest.mark.parametrize("tool, arguments", [("train.py", []), ("test.py", ["x.pth"])])
def test_tools_say_how_to_get_it(in_folder, capsys, tool, arguments):
    config = CONFIGS / "groupmamba_cifar10.py"
    sentence = sentence_of_refusal(capsys, tool, config, *arguments)
    assert "this config needs mmpretrain, which is not installed; `make setup-pretrain`" in sentence


def fail_inside(file, message):
    """Return mmengine's error for a config whose module runs ``file``, which fails."""
    try:
        exec(compile(f"raise RuntimeError({message!r})", file, "exec"))
    except RuntimeError as error:
        raise ImportError("Failed to import mmvssm.pretraining") from error


def test_what_keeps_it_from_loading_is_named(monkeypatch):
    def import_module(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(setup, "import_module", import_module)
    words = r"torchvision does not load \(operator torchvision::nms .*make setup-pretrain"
    with pytest.raises(UserError, match=words), setup.explain_missing_mmpretrain():
        fail_inside("/env/mmpretrain/models/__init__.py", "it fails")


@pytest.mark.parametrize("file", ["/env/mmpretrain/a.py", "/env/mmdet/a.py"])
def test_other_failures_stay_what_they_are(monkeypatch, file):
    monkeypatch.setattr(setup, "import_module", lambda name: None)
    with (
        pytest.raises(ImportError, match=r"pretraining$"),
        setup.explain_missing_mmpretrain(),
    ):
        fail_inside(file, "no such file")


def test_other_configs_are_not_taken_for_mmpretrain_s(in_folder, capsys):
    Path("broken.py").write_text("_base_ = ['mmdet::no/such/config.py']\n")
    assert "mmpretrain" not in sentence_of_refusal(capsys, "train.py", "broken.py")
