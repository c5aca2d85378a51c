"""tools/train.py and tools/test.py as a user runs them: processes, exit codes, files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmvssm.datasets.shapes import ShapesGenerator
from mmvssm.errors import HINT
from support.tool_runs import run_here, sentence_of_refusal, undo_what_tools_set

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}",
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
ARCH = "dict(_delete_=True, stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4)"

DETECTION = f"""
_base_ = ["{REPO}/configs/groupmamba_maskrcnn_shapes.py"]
prepare_data = dict(_delete_=True, type="mmvssm.ShapesGenerator", root="ROOT", num_train=24, num_val=4,
                    image_size=64, seed=0)
model = dict(backbone=dict(arch={ARCH}, drop_path_rate=0.3), neck=dict(in_channels=[16] * 4))
train_dataloader = dict(batch_size=4, num_workers=2, persistent_workers=True, dataset=dict(data_root="ROOT/"))
val_dataloader = dict(num_workers=0, dataset=dict(data_root="ROOT/"))
test_dataloader = dict(num_workers=0, dataset=dict(data_root="ROOT/"))
val_evaluator = dict(ann_file="ROOT/annotations/instances_val2017.json")
test_evaluator = dict(ann_file="ROOT/annotations/instances_val2017.json")
train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=1))
"""

SEGMENTATION = f"""
_base_ = ["{REPO}/configs/groupmamba_upernet_shapes.py"]
prepare_data = dict(_delete_=True, type="mmvssm.ShapesGenerator", root="ROOT", num_train=24, num_val=4,
                    image_size=64, seed=0)
model = dict(
    backbone=dict(arch={ARCH}, drop_path_rate=0.3),
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),
)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root="ROOT/"))
val_dataloader = dict(num_workers=0, dataset=dict(data_root="ROOT/"))
test_dataloader = dict(num_workers=0, dataset=dict(data_root="ROOT/"))
train_cfg = dict(max_iters=24, val_interval=24)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=8, max_keep_ckpts=1))
"""

PRUNED_BACKBONE = """
model = dict(
    backbone=dict(
        _delete_=True, type="mmvssm.PlainMamba", img_size=64, out_indices=(0, 1, 2, 3), drop_path_rate=0.3,
        arch=dict(embed_dims=16, num_layers=4, patch_size=8, num_convs_patch_embed=0, layers_with_dwconv=[0],
                  d_state=2),
        pruning=dict(layers=[0, 2], keep_ratio=[0.6, 0.5]),
    ),
    NECK
)
# Still under way where the run is interrupted.
custom_hooks = [dict(type="mmvssm.KeepRatioWarmup", num_iters=20)]
"""
RESTORED = """dict(type="mmvssm.TokenRestoration", fill="mask_token", refine=True, in_channels=16),
        dict(type="mmseg.Feature2Pyramid", embed_dim=16, rescales=[2, 1, 0.5, 0.25], norm_cfg=dict(type="BN")),"""
PRUNED_DETECTION = DETECTION + PRUNED_BACKBONE.replace(
    "NECK",
    f"""neck=[{RESTORED}
        dict(type="FPN", in_channels=[16] * 4, out_channels=64, num_outs=5)],""",
)
PRUNED_DETECTION += 'custom_imports = dict(imports=["mmvssm", "mmseg.models.necks"])\n'
PRUNED_SEGMENTATION = SEGMENTATION + PRUNED_BACKBONE.replace(
    "NECK",
    f"""neck=[{RESTORED}],
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),""",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "data"
    ShapesGenerator(root=str(root), num_train=24, num_val=4, image_size=64, seed=0).ensure()
    return root


@pytest.fixture
def config(shapes, tmp_path):
    """Writes a config for the small data set and returns its path."""

    def write(text, extra="", name="small"):
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace("ROOT", str(shapes)) + extra)
        return path

    return write


def command(tool, *args):
    return [sys.executable, str(REPO / "tools" / tool), *map(str, args)]


def run(tool, *args, cwd):
    done = subprocess.run(
        command(tool, *args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def succeed(tool, *args, cwd):
    code, out, err = run(tool, *args, cwd=cwd)
    assert code == 0, err[-4000:]
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    """As :func:`run`, in this process and in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    undo_what_tools_set(monkeypatch)

    def run(tool, *args):
        done = run_here(REPO / "tools" / tool, *args)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def succeed_here(here):
    """As :func:`succeed`, in this process and in ``tmp_path``."""

    def run(*arguments):
        code, _, err = here(*arguments)
        assert code == 0, err[-4000:]

    return run


# Options of a training whose process goes on, and would wait for the workers' end.
HERE = ("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False")


def losses(work_dir):
    """Read the scalars of every iteration, except times: {iteration: {name: value}}."""
    logged = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            record = json.loads(line) if line.endswith("}") else {}
            if "loss" in record:
                skipped = ("time", "data_time", "memory")
                logged[record["step"] if "step" in record else record["iter"]] = {
                    key: value for key, value in record.items() if key not in skipped
                }
    return logged


def members_of_session(session):
    """Processes of a session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, member_of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(member_of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "checkpoint", "resumed_at"),
    [
        (DETECTION, "epoch_2.pth", 12),
        pytest.param(PRUNED_SEGMENTATION, "iter_8.pth", 8, marks=pytest.mark.nightly),
    ],
    ids=["detection, by epochs", "pruned segmentation, by iterations"],
)
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, text, checkpoint, resumed_at):
    path = config(text)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log = (tmp_path / "log.txt").open("w")
    reference, victim = (
        subprocess.Popen(
            command("train.py", path, "--work-dir", work_dir),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for work_dir in (whole, broken)
    )
    while not (broken / checkpoint).exists() or max(losses(broken), default=0) < resumed_at + 2:
        assert victim.poll() is None, (tmp_path / "log.txt").read_text()[-4000:]
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = losses(broken)
    deadline = time.monotonic() + 10
    while members_of_session(victim.pid):  # data workers must not outlive it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert resumed_at < max(before) < 24  # killed in the middle, past its checkpoint
    assert Path((broken / "last_checkpoint").read_text()).name == checkpoint

    out = succeed("train.py", path, "--work-dir", broken, "--resume", cwd=tmp_path)
    assert f"Resuming from {broken / checkpoint}" in out
    assert reference.wait(300) == 0
    expected, resumed = losses(whole), losses(broken)
    assert sorted(expected) == sorted(resumed) == list(range(1, 25))
    assert {i: expected[i] for i in before} == before
    assert resumed == expected
    ends = [torch.load(d / f"{checkpoint.split('_')[0]}_{n}.pth", weights_only=True)
            for d in (whole, broken) for n in [4 if "epoch" in checkpoint else 24]]  # fmt: skip
    assert ends[0]["meta"]["iter"] == ends[1]["meta"]["iter"] == 24
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][key]), key


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WEIGHTS_OF_RANKS = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class WriteWeightsOfRank(Hook):
    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), f"rank_{get_rank()}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [pytest.param(DETECTION, marks=pytest.mark.nightly), PRUNED_DETECTION],
    ids=["dense", "pruned"],
)
def test_two_gloo_processes_end_with_the_same_weights(config, tmp_path, text):
    (tmp_path / "write_weights.py").write_text(WEIGHTS_OF_RANKS)
    path = config(
        text,
        'custom_imports = dict(imports=["mmvssm", "mmseg.models.necks", "write_weights"])\n'
        + ("" if text == DETECTION else "custom_hooks += ")
        + ("custom_hooks = " if text == DETECTION else "")
        + '[dict(type="WriteWeightsOfRank")]\n'
        "train_cfg = dict(max_epochs=1, val_interval=1)\n",
    )
    environment = {**ENVIRONMENT, "PORT": str(free_port())}
    environment["PYTHONPATH"] += f":{tmp_path}"
    arguments = [REPO / "tools/dist_train.sh", path, "2", "--work-dir", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Epoch(train) [1][3/3]" in done.stdout  # 24 images, 4 each on two ranks
    assert "bbox_mAP" in done.stdout
    weights = [torch.load(tmp_path / f"rank_{r}.pt", weights_only=True) for r in (0, 1)]
    saved = torch.load(tmp_path / "out/epoch_1.pth", weights_only=True)["state_dict"]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
        assert torch.equal(value, saved[key]), key


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """One quickly trained model of each kind: {"detection": (config, checkpoint), ...}."""
    models = {}
    for name, text, limit, file in (
        ("detection", DETECTION, "train_cfg.max_epochs=1", "epoch_1.pth"),
        ("segmentation", SEGMENTATION, "train_cfg.max_iters=2", "iter_2.pth"),
    ):
        folder = tmp_path_factory.mktemp(name)
        path = folder / "small.py"
        path.write_text(text.replace("ROOT", str(shapes)))
        arguments = ("train.py", path, "--cfg-options", limit)
        if name == "detection":
            out = succeed(*arguments, cwd=folder)
            assert "work_dirs/small" in out.splitlines()[-1]
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                undo_what_tools_set(patch)
                done = run_here(REPO / "tools/train.py", *arguments[1:])
            assert done.returncode == 0, done.stderr[-4000:]
        models[name] = (path, folder / "work_dirs/small" / file)
    return models


@pytest.mark.slow
def test_detector_is_evaluated_drawn_and_dumped(trained, tmp_path):
    path, checkpoint = trained["detection"]
    arguments = ("--show-dir", "pictures", "--out", "predictions.pkl")
    succeed("test.py", path, checkpoint, *arguments, cwd=tmp_path)
    results = json.loads((tmp_path / "work_dirs/small/test_results.json").read_text())
    assert 0 <= results["metrics"]["coco/bbox_mAP_50"] <= 1
    assert 0 <= results["metrics"]["coco/segm_mAP_50"] <= 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    assert (tmp_path / "predictions.pkl").stat().st_size > 0


@pytest.mark.slow
def test_segmenter_is_evaluated_augmented_drawn_and_dumped(trained, tmp_path, succeed_here):
    path, checkpoint = trained["segmentation"]
    arguments = ("--tta", "--show-dir", "pictures", "--out", "maps")
    succeed_here("test.py", path, checkpoint, *arguments)
    results = json.loads((tmp_path / "work_dirs/small/test_results.json").read_text())
    assert 0 <= results["metrics"]["mIoU"] <= 100
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    assert len(list((tmp_path / "maps").glob("*.png"))) == 4


@pytest.mark.slow
def test_data_root_of_ones_own_trains_and_tests(trained, tmp_path, here, succeed_here):
    """Other class names, another number of classes: heads and evaluators follow."""
    path, _ = trained["detection"]
    root = tmp_path / "own"
    ShapesGenerator(root=str(root), num_train=8, num_val=2, image_size=64, seed=1).ensure()
    for file in (root / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        content["categories"] = [dict(id=c, name=n) for c, n in ((1, "round"), (2, "other"))]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1 if annotation["category_id"] == 1 else 2
        file.write_text(json.dumps(content))
    options = ("--cfg-options", "train_cfg.max_epochs=1", *HERE)
    succeed_here("train.py", path, "--data-root", root, *options)
    checkpoint = tmp_path / "work_dirs/small/epoch_1.pth"
    loaded = torch.load(checkpoint, weights_only=True)
    assert tuple(loaded["meta"]["dataset_meta"]["classes"]) == ("round", "other")
    assert loaded["state_dict"]["roi_head.bbox_head.fc_cls.weight"].shape[0] == 3
    succeed_here("test.py", path, checkpoint, "--data-root", root)
    assert (tmp_path / "work_dirs/small/test/test_results.json").exists()

    code, _, err = here("test.py", path, checkpoint)
    assert code == 1
    assert "does not fit" in err and "2 classes (round, other)" in err
    assert err.splitlines()[1:] == [HINT]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a tool that must refuse, in this process; returns its one sentence.

    Nothing may be written and no work dir made.
    """
    monkeypatch.chdir(tmp_path)
    undo_what_tools_set(monkeypatch)
    return partial(sentence_of_refusal, capsys)


def test_code_in_a_checkpoint_is_refused_and_not_run(config, tmp_path, refused):
    path = config(SEGMENTATION)
    torch.save({"state_dict": {}, "meta": Malicious()}, tmp_path / "evil.pth")
    for arguments in (
        ("test.py", path, "evil.pth"),
        ("train.py", path, "--resume", "evil.pth"),
        (
            "train.py",
            path,
            "--cfg-options",
            "model.backbone.init_cfg.type=Pretrained",
            "model.backbone.init_cfg.checkpoint=evil.pth",
        ),
    ):
        sentence = refused(*arguments)
        assert "evil.pth was refused because it carries code" in sentence
        assert "system" in sentence
    code, _, err = run("test.py", path, "evil.pth", cwd=tmp_path)
    assert code == 1 and err.startswith("error: evil.pth was refused")
    assert err.splitlines()[1:] == [HINT]
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.backbone.arch=huge"], "huge"),
        (["model.backbone.out_indices=(0,1,2,7)"], "out_indices"),
        (["model.backbone.type=mmvssm.GroupMambo"], "GroupMambo"),
    ],
    ids=["arch", "out_indices", "type"],
)
def test_wrong_model_is_one_sentence(config, refused, options, said):
    assert said in refused("train.py", config(SEGMENTATION), "--cfg-options", *options)


def test_missing_files_are_one_sentence(config, refused):
    path = config(DETECTION, "prepare_data = None\n")
    assert "no config file nowhere.py" in refused("train.py", "nowhere.py")
    assert "no checkpoint file no.pth" in refused("test.py", path, "no.pth")
    sentence = refused("train.py", path, "--data-root", "nowhere")
    assert "no folder nowhere" in sentence
    sentence = refused("train.py", REPO / "configs/groupmamba_maskrcnn_coco.py")
    assert "data/coco" in sentence and "cocodataset.org" in sentence
    sentence = refused("train.py", REPO / "configs/groupmamba_upernet_ade20k.py")
    assert "ADEChallengeData2016" in sentence


def test_annotations_of_absent_images_are_one_sentence(config, tmp_path, refused):
    root = tmp_path / "own"
    ShapesGenerator(root=str(root), num_train=4, num_val=2, image_size=64, seed=1).ensure()
    gone = sorted((root / "train2017").iterdir())[0]
    gone.unlink()
    sentence = refused("train.py", config(DETECTION), "--data-root", root)
    assert "instances_train2017.json names 1 images" in sentence and gone.name in sentence


@pytest.mark.slow
def test_checkpoint_of_another_architecture_is_one_sentence(trained, config, refused):
    _, detector = trained["detection"]
    path = config(SEGMENTATION)
    for arguments in (("test.py", path, detector), ("train.py", path, "--resume", detector)):
        sentence = refused(*arguments)
        assert "does not fit this config's model" in sentence
        assert "decode_head." in sentence and "neck." in sentence
        assert "it was trained with config small, backbone mmvssm.GroupMamba" in sentence


@pytest.mark.slow
def test_detection_tta_is_refused(trained, refused):
    path, checkpoint = trained["detection"]
    assert "masks" in refused("test.py", path, checkpoint, "--tta")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [DETECTION, pytest.param(PRUNED_SEGMENTATION, marks=pytest.mark.nightly)],
    ids=["dense", "pruned"],
)
def test_mixed_precision_without_a_gpu(trained, config, tmp_path, succeed_here, text):
    """Backbone and neck compute in bfloat16, the losses stay finite and near those of float32."""
    limit = "train_cfg.max_epochs=1" if text == DETECTION else "train_cfg.max_iters=6"

    def train(work_dir, *options):
        options += ("--cfg-options", limit, *HERE)
        succeed_here("train.py", config(text), "--work-dir", work_dir, *options)
        return losses(tmp_path / work_dir)

    half = train("half", "--amp")
    full = losses(trained["detection"][1].parent) if text == DETECTION else train("full")
    assert half != full and sorted(half) == sorted(full) and len(half) == 6
    assert half[1]["loss"] == pytest.approx(full[1]["loss"], rel=0.05)
    assert all(
        value == value and abs(value) < 1e3 for log in half.values() for value in log.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (
            PRUNED_DETECTION,
            [
                "custom_hooks.0.num_iters=0",
                "model.backbone.pruning.alignment=none",
                "model.backbone.pruning.keep_ratio=0.4975",
            ],
            "cannot pack the 199 tokens kept of a 20x20 grid",
        ),
        pytest.param(
            PRUNED_SEGMENTATION.replace(RESTORED, RESTORED.split("\n")[1]),
            ["custom_hooks.0.num_iters=0"],
            "put dict(type='mmvssm.TokenRestoration') before other necks",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            PRUNED_SEGMENTATION,
            ["model.backbone.pruning=None"],
            "the model has no pruned backbone",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["none that cannot be packed", "no restoration", "a warm-up of nothing"],
)
def test_pruning_that_does_not_fit_is_one_sentence(config, here, text, options, said):
    code, _, err = here("train.py", config(text), "--cfg-options", *options, *HERE)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and said in errors[0], err[-2000:]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.backbone.pruning.keep_ratio=1.5"], "keep_ratio must be in (0, 1]"),
        (["model.backbone.pruning.layers=(2,0)"], "layers must be increasing numbers from 0 to 2"),
        (["model.backbone.pruning.layers=(0,1,2)"], "as many as there are layers, 3; got 2"),
        (["model.neck.0.fill=average"], "unknown fill 'average'"),
    ],
    ids=["keep_ratio", "unsorted", "lengths", "fill"],
)
def test_wrong_pruning_is_one_sentence(config, refused, options, said):
    assert said in refused("train.py", config(PRUNED_SEGMENTATION), "--cfg-options", *options)


@pytest.mark.slow
def test_a_training_that_explodes_is_one_sentence(config, tmp_path, here):
    options = ("optim_wrapper.optimizer.lr=1e30", "optim_wrapper.clip_grad=None", *HERE)
    code, out, err = here("train.py", config(DETECTION), "--cfg-options", *options)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "Traceback" not in err, err[-3000:]
    assert "is not finite" in errors[0] or "holds NaN or infinity" in errors[0]
    assert "lower the learning rate" in errors[0] and "Training is finished" not in out
    for file in (tmp_path / "work_dirs/small").glob("*.pth"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())
