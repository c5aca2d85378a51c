"""A published model's name is all that our tools need: from a file under the published names to a result.

MMVSSM_ALL_NAMES=1 runs every name of the table, which takes minutes; without it, a name of each backbone and task.
"""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.models import weights as module
from mmvssm.models.get_model import _build_whole
from mmvssm.models.weights_table import PUBLISHED
from support.pretraining import write_class_folders
from support.published_files import published_file
from support.tiny_configs import CONFIGS
from support.tool_runs import call, undo_what_tools_set

LIBRARIES = {"classification": "mmpretrain", "detection": "mmdet", "segmentation": "mmseg"}
FEW = (
    "groupmamba_tiny",
    "plainmamba_adapter_l1_retinanet_1x_coco",
    "plainmamba_l1_upernet_160k_ade20k",
    "spatialmamba_tiny_upernet_160k_ade20k",
    "vim_tiny_plus",
    "vmamba_tiny_maskrcnn_1x_coco",
)
NAMES = list(PUBLISHED) if os.environ.get("MMVSSM_ALL_NAMES") else FEW
SMALL = "test_dataloader.dataset.pipeline.1.scale=(64,64)"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder, which a local server offers as the place of all published files."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(module.VARIABLE, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    undo_what_tools_set(monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield folder
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_from_a_name_to_a_result(name, mirror, tmp_path):
    published = PUBLISHED[name]
    pytest.importorskip(LIBRARIES[published.task])
    weights = _build_whole(published, {}).state_dict()
    weights = {key: x for key, x in weights.items() if not key.startswith("teacher.")}
    torch.save(published_file(name, weights), mirror / f"{name}.pth")
    config = CONFIGS / f"{published.config}.py"
    if published.task == "classification":
        classes = [f"n{i:08d}" for i in range(1000)]
        write_class_folders(tmp_path / "data", classes, train=0, val=1)
        options = ["test_dataloader.dataset.indices=2"]
        options += [
            f"{split}_dataloader.dataset.data_root={tmp_path}/data" for split in ("val", "test")
        ]
        options += ["test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False"]
        call("test.py", config, f"mmvssm://{name}", "--work-dir", "out", "--cfg-options", *options)
        assert (tmp_path / "out/test_results.json").exists()
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype("uint8")
        Image.fromarray(pixels).save("image.png")
        arguments = ["image.png", "--out-dir", "out", "--device", "cpu", "--cfg-options", SMALL]
        call("predict.py", config, f"mmvssm://{name}", *arguments)
        assert any(path.stem == "image" for path in (tmp_path / "out").rglob("*"))
    assert sorted(path.suffix for path in (tmp_path / "hub/mmvssm").iterdir()) == [
        ".pth",
        ".sha256",
    ]
