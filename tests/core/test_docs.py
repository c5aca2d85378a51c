"""What the README shows is run as it stands there."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

REPO = Path(__file__).parents[2]
TEXT = (REPO / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_python_snippet_prints_what_it_says(capsys):
    (snippet,) = [code for code in PYTHON if "print(" in code]
    promised = [line[2:] for line in snippet.splitlines() if line.startswith("# (")]
    exec(snippet, {})
    assert capsys.readouterr().out.split() == " ".join(promised).split()


@pytest.mark.parametrize("backbone", ["GroupMamba", "PlainMamba"])
def test_config_snippets_build_in_mmdet(backbone):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from mmdet.registry import MODELS

    named = f"mmvssm.{backbone}"
    (snippet,) = [code for code in PYTHON if "custom_imports" in code and named in code]
    base = "_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']\ndefault_scope = 'mmdet'\n"
    cfg = Config.fromstring(base + snippet, file_format=".py")
    assert type(MODELS.build(cfg.model).backbone).__name__ == backbone


def test_every_file_and_command_named_is_there():
    named = set(re.findall(r"(?:tools|configs|mmvssm|tests|docs)/[\w./-]*\w", TEXT))
    assert "tools/convert_checkpoint.py" in named
    missing = sorted(name for name in named if not (REPO / name).exists())
    assert not missing
    targets = set(re.findall(r"\bmake ([a-z-]+)", TEXT))
    makefile = (REPO / "Makefile").read_text()
    assert {"train", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
