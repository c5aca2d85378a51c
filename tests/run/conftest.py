"""A few generated images, and a segmenter trained on them for two iterations."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmvssm.datasets.shapes import ShapesGenerator
from mmvssm.models.blueprint import BLUEPRINT, write_blueprint
from support import tiny_configs
from support.tool_runs import call, leave_configs_as_they_are, undo_what_tools_set


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


@pytest.fixture(scope="session")
def weights(tmp_path_factory, shapes):
    """A folder with a random checkpoint of each model, whose predictions vary over an image."""
    folder = tmp_path_factory.mktemp("weights")
    for name, text in tiny_configs.MODELS_OF.items():
        (folder / "inheriting.py").write_text(text.replace("ROOT", str(shapes)))
        cfg = Config.fromfile(folder / "inheriting.py")
        if name == "detector":
            cfg.model.test_cfg.rcnn.max_per_img = 12  # drawing a hundred takes a second
        # As a whole, for what it inherits takes a second or two to find.
        with pytest.MonkeyPatch.context() as patch:
            leave_configs_as_they_are(patch)
            cfg.dump(folder / f"{name}.py")
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        if name == "detector":
            torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.5)
        else:
            torch.nn.init.normal_(model.decode_head.conv_seg.weight)
        names = {"classes": list(cfg.metainfo.classes), "palette": cfg.metainfo.palette}
        meta = {"dataset_meta": names, BLUEPRINT: write_blueprint(cfg)}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, folder / f"{name}.pth")
    return folder
