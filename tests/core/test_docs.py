"""Run or check the code, commands, options, files, names and links in the README and docs."""

import argparse
import ast
import pydoc
import re
import runpy
import shlex
import sys
import textwrap
from functools import cache
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from PIL import Image

import mmvssm.registry
from mmvssm.models.blueprint import BLUEPRINT, register_library, write_blueprint

REPO = Path(__file__).parents[2]
README, DOCS = REPO / "README.md", REPO / "docs"
PAGES = [README, REPO / "CONTRIBUTING.md", REPO / "configs/README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}

NAMES_TO_BE_WRITTEN = {"mmvssm.DummyMamba"}  # by the reader
# Options that every parser knows.
OPTIONS_OF_ALL = {"--help"}


def blocks(language):
    """``(page, text)`` of every fenced block."""
    return [
        (page, textwrap.dedent(block))
        for page, text in TEXTS.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)
    ]


def prose(page):
    return re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def named(found):
    """Parameters for pytest: each with its page and number."""
    return [
        pytest.param(
            block,
            id=f"{page.stem}-{number}",
            marks=[pytest.mark.slow, pytest.mark.nightly] if "build_onnx" in block else [],
        )
        for number, (page, block) in enumerate(found)
    ]


def is_config(snippet):
    return "_base_ =" in snippet or snippet.startswith(("custom_imports", "model"))


PYTHON = blocks("python")
CONFIGS = [(page, block) for page, block in PYTHON if is_config(block)]
DISTILLED = [(page, block) for page, block in CONFIGS if "DistilledClassifier" in block]
PROGRAMS = [(page, block) for page, block in PYTHON if not is_config(block)]


def test_readme_is_short_and_pages_are_found():
    assert len(TEXTS[README].splitlines()) <= 150
    assert len(PAGES) >= 15
    assert len(PROGRAMS) >= 5 and len(CONFIGS) >= 6 and len(DISTILLED) == 1
    nav = (REPO / "mkdocs.yml").read_text()
    assert all(page.name in nav for page in PAGES if page.parent == DOCS)


# --- Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", named(PROGRAMS))
def test_program_prints_what_it_says(snippet, capsys, monkeypatch, tmp_path):
    registry = mmvssm.registry.MODELS
    monkeypatch.setattr(registry, "_module_dict", dict(registry.module_dict))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "red").save("photo.jpg")
    if "best.pth" in snippet:
        write_checkpoint("best.pth")
    if "build_onnx" in snippet:
        pytest.importorskip("onnxscript")
    if "model.onnx" in snippet:
        if not (REPO / "mmvssm/ops/_kernels.so").exists():
            pytest.skip("the CPU kernels were not compiled")
        write_onnx_model("model.onnx")
    promised = re.findall(r"^# (\(.*)$", snippet, re.M)
    names = {"__name__": "snippet"}
    exec(snippet, names)
    assert capsys.readouterr().out.split() == " ".join(promised).split()
    if "DummyMamba" in names:
        assert names["DummyMamba"]()(torch.zeros(1, 3, 8, 8))[0].shape == (1, 8, 2, 2)


def write_onnx_model(path):
    """A segmenter whose logits are the colours."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    images, logits = (
        helper.make_tensor_value_info(name, kinds.FLOAT, [None] * 4)
        for name in ("images", "logits")
    )
    labels = helper.make_tensor_value_info("labels", kinds.INT64, [None] * 3)
    nodes = [
        helper.make_node("Identity", ["images"], ["logits"]),
        helper.make_node("ArgMax", ["images"], ["labels"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(nodes, "graph", [images], [logits, labels])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def write_checkpoint(path):
    """A small segmenter with random weights, as a training would save it."""
    pytest.importorskip("mmseg")
    arch = dict(stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor"),
        backbone=dict(type="mmvssm.GroupMamba", arch=arch, out_indices=(3,)),
        decode_head=dict(
            type="FCNHead", in_channels=16, in_index=0, channels=8, num_convs=1, num_classes=2
        ),
        test_cfg=dict(mode="whole"),
    )
    pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    cfg = Config(
        dict(
            default_scope="mmseg",
            model=model,
            test_dataloader=dict(dataset=dict(pipeline=pipeline)),
        )
    )
    register_library("mmseg")
    with DefaultScope.overwrite_default_scope("mmseg"):
        weights = MODELS.build(cfg.model).state_dict()
    meta = {BLUEPRINT: write_blueprint(cfg), "dataset_meta": {"classes": ["ground", "thing"]}}
    torch.save({"state_dict": weights, "meta": meta}, path)


@pytest.mark.parametrize("snippet", named([c for c in CONFIGS if c not in DISTILLED]))
def test_config_builds_in_mmdet(snippet):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    if "_base_" not in snippet:
        snippet = "_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']\n" + snippet
    cfg = Config.fromstring(snippet, file_format=".py")
    with torch.device("meta"):
        model = MODELS.build(dict(cfg.model, _scope_="mmdet"))
    assert f"mmvssm.{type(model.backbone).__name__}" == cfg.model.backbone.type
    with DefaultScope.overwrite_default_scope("mmdet"):
        for loader in ("train_dataloader", "val_dataloader"):
            for step in cfg.get(loader, {}).get("dataset", {}).get("pipeline", []):
                TRANSFORMS.build(step)
    if "constructor" in cfg.get("optim_wrapper", {}):
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        assert len({group["lr"] for group in optimizer.param_groups}) > 2


@pytest.mark.parametrize("snippet", named(DISTILLED))
def test_classifier_config_has_settings_that_exist(snippet):
    """Compare its settings with the constructors' source, since building it needs mmpretrain."""
    classes = {
        node.name: node
        for node in ast.parse((REPO / "mmvssm/pretraining/distillation.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    checked = set()
    for call in ast.walk(ast.parse(snippet)):
        settings = {word.arg: word.value for word in getattr(call, "keywords", [])}
        kind = getattr(settings.pop("type", None), "value", "").removeprefix("mmvssm.")
        if kind in classes:
            (init,) = [n for n in classes[kind].body if getattr(n, "name", "") == "__init__"]
            taken = {arg.arg for arg in (*init.args.args, *init.args.kwonlyargs)}
            assert set(settings) - {"_delete_", "head"} <= taken
            checked.add(kind)
    assert checked == {"DistilledClassifier", "DistillationHead"}


# --- commands -----------------------------------------------------------------------------------------


def commands():
    """``(page, words)`` of every command in bash blocks."""
    found = []
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = list(dropwhile(re.compile("[A-Z_]+=").match, words))  # variables before it
            if words:
                found.append((page, words))
    return found


SCRIPTS = {
    "tools/dist_train.sh": "tools/train.py",
    "tools/slurm_train.sh": "tools/train.py",
    "tools/dist_test.sh": "tools/test.py",
    "tools/slurm_test.sh": "tools/test.py",
}


class Parsed(BaseException):
    """Raised in place of parsing the command line, so that the tool ends there."""


@cache
def options_of(tool):
    """The options that a tool's parser knows; the tool is run until it parses its command line."""
    path = (REPO / tool).resolve()
    if "parse_args" not in path.read_text():
        return frozenset()

    def stop(parser, *_, **__):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as found:
            runpy.run_path(str(path), run_name="__main__")
    return frozenset(options_in(found.value.args[0]))


def options_in(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from options_in(part)


def tool_of(words):
    """The tool of ours that a command runs, and its arguments; None if it runs another program."""
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1], words[2:]
    return (words[0], words[1:]) if words[0].startswith("tools/") else None


def test_commands_run_tools_that_exist_with_options_that_they_know():
    tools = [(page, *tool_of(words)) for page, words in commands() if tool_of(words)]
    assert len(tools) > 20
    for page, tool, arguments in tools:
        known = options_of(SCRIPTS.get(tool, tool))
        given = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert given <= known | OPTIONS_OF_ALL, f"{page.name}: {tool}"


def test_other_commands_are_of_known_programs():
    others = {words[0] for _, words in commands() if not tool_of(words)}
    assert others <= {"make", "pip", "source", "git", "mv", "python"}


def test_make_targets_exist():
    code = [block for _, block in blocks("bash")] + [c for page in PAGES for c in inline_code(page)]
    targets = {
        target
        for text in code
        for line in text.splitlines()
        for words in re.findall(r"^make ((?:[a-z-]+(?: |$))+)", line.split("#")[0].strip())
        for target in words.split()
    }
    makefile = (REPO / "Makefile").read_text()
    assert {"train", "test", "web", "docs"} <= targets
    missing = [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)]
    assert not missing


def test_options_named_in_the_text_are_those_of_a_tool():
    tools = {tool for text in TEXTS.values() for tool in re.findall(r"tools/[\w/]+\.py", text)}
    if any("triton_lab" in tool for tool in tools):  # which cannot be read without it
        pytest.importorskip("triton")
    known = frozenset().union(*map(options_of, tools))
    for page in PAGES:
        for code in inline_code(page):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
                assert option in known, f"{page.name}: {option}"


# --- names and links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_names_exist(page):
    text = TEXTS[page]
    files = re.findall(
        r"(?<![\w/])(?:tools|configs|mmvssm|tests|docs|web)/[\w./-]*\w(?![\w<*])", text
    )
    missing = {file for file in files if not (REPO / file).exists()}
    missing -= {file for file in missing if any(REPO.glob(f"{file}*"))}  # triton_kernels*.py
    missing |= {
        code
        for code in inline_code(page)
        if re.fullmatch(r"(groupmamba|plainmamba)\w*\.py", code)
        and not (REPO / "configs" / code).exists()
    }
    registries = [value for value in vars(mmvssm.registry).values() if hasattr(value, "children")]
    for code in inline_code(page):
        for name in re.findall(r"^mmvssm\.[\w.]+", code):
            is_type = any(name.split(".")[1] in registry for registry in registries)
            if not (is_type or pydoc.locate(name) or name in NAMES_TO_BE_WRITTEN):
                missing.add(name)
    assert not missing


def anchors(page):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(REPO)
        assert not anchor or anchor in anchors(target), link


def test_newcomers_find_every_page():
    linked = set(re.findall(r"\]\(docs/([\w.]+\.md)", TEXTS[README]))
    assert linked == {page.name for page in PAGES if page.parent == DOCS} - {"index.md"}
    assert {"CONTRIBUTING.md", "CHANGELOG.md"} <= set(re.findall(r"\]\((\w+\.md)", TEXTS[README]))
