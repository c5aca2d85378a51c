"""The table of options in docs/training.md: each row names all that its options change in the config of a run."""

import ast
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmvssm.run import options as short_options
from mmvssm.run import train as trainer
from support.tiny_configs import CONFIGS
from support.tool_runs import call

PAGE = Path(__file__).parents[2] / "docs/training.md"
TABLE = PAGE.read_text().split("<!-- options -->")[1].split("<!-- end -->")[0]
ROWS = re.findall(r"^\| `(-.*?)` \|(?: `(\w+)`)? \| (.*) \|$", TABLE, re.M)
DEFAULT = "groupmamba_maskrcnn_shapes"
WITHOUT_OPTIONS = {}  # what each config resolves to, filled as the tests need it


class Resolved(BaseException):
    """Raised in place of building the runner, with the config that it would get."""


@pytest.fixture
def resolve(in_folder, monkeypatch):
    """Gives the settings of a run, by path, as tools/train.py hands them to mmengine; without data and weights."""

    def stop(cfg):
        raise Resolved(cfg)

    monkeypatch.setattr(trainer, "build_runner", stop)
    monkeypatch.setattr(trainer, "prepare_data", lambda *_: None)
    monkeypatch.setattr(trainer, "check_pretrained", lambda _: [])
    monkeypatch.setattr(short_options, "find_spec", lambda name: name)  # of loggers

    def run(name, *options):
        with pytest.raises(Resolved) as caught:
            call("train.py", CONFIGS / f"{name}.py", "--work-dir", "run", *options)
        return flat(caught.value.args[0].to_dict())

    return run


def flat(value, path=""):
    """``{path: value}`` of all settings; a custom hook has its type in place of its number, which may change."""
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        in_place = range(len(value))
        names = [part.pop("type") for part in value] if path == "custom_hooks." else in_place
        parts = dict(zip(names, value))
    else:
        return {path.rstrip("."): value}
    return {
        key: x for name, part in parts.items() for key, x in flat(part, f"{path}{name}.").items()
    }


def test_the_table_has_the_options():
    named = {word for row in ROWS for word in shlex.split(row[0]) if word.startswith("--")}
    assert len(ROWS) >= 14 and {"--batch-size", "--lr", "--image-size", "--cfg-options"} <= named


@pytest.mark.parametrize(("options", "name", "changes"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_its_options_change(resolve, options, name, changes):
    name = name or DEFAULT
    if name not in WITHOUT_OPTIONS:
        WITHOUT_OPTIONS[name] = resolve(name)
    before, after = WITHOUT_OPTIONS[name], resolve(name, *shlex.split(options))
    changed = {key: value for key, value in after.items() if before.get(key, ...) != value}
    found = re.findall(r"`([\w.]+)=(.*?)`", changes)
    assert changed == {key: ast.literal_eval(value) for key, value in found}
    removed = re.findall(r"`([\w.]+)`", changes.partition("; without ")[2])
    assert before.keys() - after.keys() == set(removed)
