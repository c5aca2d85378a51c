"""The README and the pages of docs: their code runs, and what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
from mmengine.config import Config

REPO = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(REPO)): path.read_text()
    for path in (
        REPO / "README.md",
        REPO / "CONTRIBUTING.md",
        *sorted((REPO / "docs").glob("*.md")),
    )
}
# Parts of larger programs or configs, which cannot run by themselves.
NEEDS_MORE = {
    "register_custom_ops_library": "tests/core/ops/test_onnxruntime.py",
    "mmvssm.DistilledClassifier": "tests/whole/pretraining/test_distillation.py",
}


def blocks(language):
    return [
        pytest.param(
            re.sub(r"(?m)^    ", "", code) if code.startswith("    ") else code, id=f"{page}-{i}"
        )
        for page, text in PAGES.items()
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)\n *```", text, re.S))
    ]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, capsys, monkeypatch):
    """Programs run and print what they say; configs build in mmdet."""
    known = [test for words, test in NEEDS_MORE.items() if words in code]
    if known:
        assert (REPO / known[0]).exists()
        compile(code, "snippet", "exec")
    elif "_base_" in code:
        cfg = Config.fromstring(code, file_format=".py")
        assert cfg.model.backbone.type == "mmvssm.GroupMamba"
    elif "custom_imports" in code:
        pytest.importorskip("mmdet")
        pytest.importorskip("mmseg")
        from mmdet.registry import MODELS

        base = "_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']\ndefault_scope = 'mmdet'\n"
        cfg = Config.fromstring(base + code, file_format=".py")
        assert type(MODELS.build(cfg.model).backbone).__name__ in cfg.model.backbone.type
    else:
        import mmvssm.registry

        monkeypatch.setattr(
            mmvssm.registry.MODELS, "_module_dict", {**mmvssm.registry.MODELS._module_dict}
        )
        promised = [line[2:] for line in code.splitlines() if line.startswith("# (")]
        names = {"__name__": "snippet"}
        exec(code, names)
        assert capsys.readouterr().out.split() == " ".join(promised).split()
        if "DummyMamba" in names:
            import torch

            assert names["DummyMamba"]()(torch.zeros(1, 3, 8, 8))[0].shape == (1, 8, 2, 2)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_are_named_are_there(page):
    text = PAGES[page]
    named = set(re.findall(r"(?<![\w/.-])(?:tools|configs|mmvssm|tests|docs|web)/[\w./-]*\w", text))
    named = {name for name in named if "path/to" not in name}
    assert not sorted(name for name in named if not (REPO / name).exists())
    makefile = (REPO / "Makefile").read_text()
    bash = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)) + "\n".join(
        re.findall(r"`(make [^`]*)`", text)
    )
    for targets in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", bash):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.M), target


def options_of(tool):
    """The text that defines a tool's options; asking for --help would import its libraries."""
    return "".join((REPO / name).read_text() for name in (tool, "mmvssm/run/arguments.py"))


TOOLS = {
    (tool, flag)
    for text in PAGES.values()
    for line in re.sub(
        r"\\\n", " ", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    ).splitlines()
    if (found := re.match(r"(?:python )?(tools/[\w/]+\.(?:py|sh))", line.strip()))
    for flag in re.findall(r" (--[a-z-]+)", " ".join(shlex.split(line, comments=True)))
    for tool in [found[1].replace("dist_train.sh", "train.py").replace("dist_test.sh", "test.py")]
}


@pytest.mark.parametrize("tool", sorted({tool for tool, _ in TOOLS}))
def test_flags_in_commands_are_known(tool):
    unknown = [
        flag for name, flag in sorted(TOOLS) if name == tool and f'"{flag}"' not in options_of(tool)
    ]
    assert not unknown


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
