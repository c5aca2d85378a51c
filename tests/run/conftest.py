"""A few generated images, and a segmenter trained on them for two iterations."""

import pytest
import torch

from mmvssm.datasets.shapes import ShapesGenerator
from support import tiny_configs
from support.tool_runs import call, undo_what_tools_set


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of a data set."""
    root = tmp_path_factory.mktemp("shapes") / "data"
    return ShapesGenerator(root=str(root), **tiny_configs.SIZE).ensure()


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Runs the test in an empty folder, and undoes what the tools set for a process."""
    monkeypatch.chdir(tmp_path)
    undo_what_tools_set(monkeypatch)
    return tmp_path


@pytest.fixture
def config(shapes, in_folder):
    """Writes a config for the small data set and returns its path."""

    def write(text, extra="", name="tiny.py"):
        (in_folder / name).write_text(text.replace("ROOT", str(shapes)) + extra)
        return name

    return write


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """The work dir of a segmenter that was trained for two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.py").write_text(tiny_configs.SEGMENTER.replace("ROOT", str(shapes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        undo_what_tools_set(patch)
        torch.manual_seed(0)
        call("train.py", "tiny.py", "--work-dir", "run")
    return folder / "run"
