"""tools/experiments/dense.py: its arms and their FLOPs, the splits, rejected arguments, reports, and runs of it."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import dense
import dense_campaign
import dense_report
import predictions
from dense_arms import ARMS, BACKBONES, DENSE, Backbone
from dense_campaign import DATA_SETS, Campaign, config_of
from dense_report import cost_of
from results import NOT_TUNED

from mmvssm.errors import UserError

TASKS = ["camvid", "bccd"]
SIZE = (96, 72)
NUM_TRAIN, NUM_TEST = 4, 3
TINY = {
    "GroupMamba": Backbone(
        dict(
            type="mmvssm.GroupMamba",
            arch=dict(stem_hidden_dim=8, embed_dims=[16] * 4, depths=[1] * 4, mlp_ratios=[2] * 4),
        ),
        [16] * 4,
    ),
    "PlainMamba": Backbone(
        dict(
            type="mmvssm.PlainMamba",
            arch=dict(
                embed_dims=16,
                num_layers=6,
                patch_size=8,
                num_convs_patch_embed=0,
                layers_with_dwconv=[],
                d_state=2,
            ),
            img_size=(64, 80),
            out_indices=(1, 3, 4, 5),
        ),
        16,
    ),
}
BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def write_image(path, random):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders of a few images of noise in the layouts of both data sets."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("training", NUM_TRAIN), ("test", NUM_TEST)):
        for i in range(count):
            write_image(root / f"camvid/images/{split}/{i}.jpg", random)
            labels = np.repeat(random.integers(0, 11, SIZE[0], dtype=np.uint8)[None], SIZE[1], 0)
            labels[0] = 255
            path = root / f"camvid/annotations/{split}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        names = [f"{split}{i}" for i in range(count)]
        for name in names:
            write_image(root / f"bccd/JPEGImages/{name}.jpg", random)
            corners = ((10, 10, 40, 40), (50, 20, 90, 70), (5, 40, 25, 60))
            boxes = [BOX.format(c, *box) for c, box in zip(("RBC", "WBC", "Platelets"), corners)]
            size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
            path = root / f"bccd/Annotations/{name}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<annotation>{size}{''.join(boxes)}</annotation>")
        path = root / f"bccd/ImageSets/Main/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names))
    return root


def campaign(roots, out, task="camvid", **settings):
    defaults = dict(data_root=str(roots / task), arms=list(ARMS), seeds=None, length=None)
    return Campaign(argparse.Namespace(task=task, out=str(out), **{**defaults, **settings}))


# ------------------------------------------------------------------------------------------- arms


def test_arms_start_from_what_is_trained():
    for name, arm in ARMS.items():
        assert arm.backbone in BACKBONES
        if arm.start:
            start = ARMS[arm.start]
            assert start.tuned and start.backbone == arm.backbone
            assert set(arm.seeds) <= set(start.seeds)
        else:
            assert arm.tuned and (not arm.options or name == "pruned from the start")
        assert name.endswith(NOT_TUNED) == (not arm.tuned)
        if name.endswith(NOT_TUNED):
            assert ARMS[name.removesuffix(NOT_TUNED)].options == arm.options
    tuned = [arm for arm in ARMS.values() if arm.start and arm.tuned]
    assert {arm.length for arm in tuned} == {ARMS["dense, trained on"].length}
    assert [len(ARMS[name].seeds) for name in ("GroupMamba", "ResNet-18", DENSE)] == [
        3,
        3,
        2,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.nightly)])
def test_equal_flops(task):
    """Of whole models within 5 %, and what each pruning saves of the backbone's within 1.5 points."""
    data_set = DATA_SETS[task]
    costs = {
        arm: cost_of(config_of(data_set, arm), data_set.shape)
        for arm in ARMS
        if arm in BACKBONES and dense_campaign._is_installed(arm)
    }
    total = costs["GroupMamba"]["total"].flops
    assert {arm: cost["total"].flops / total for arm, cost in costs.items()} == pytest.approx(
        dict.fromkeys(costs, 1), abs=0.05
    )
    full = costs["PlainMamba"]["backbone"].flops
    savings = {}  # arms with the same tokens have the same FLOPs
    for name, arm in ARMS.items():
        if arm.saving and arm.tuned:
            pruning = arm.options["model.backbone.pruning"]
            keys = ("layers", "keep_ratio", "reduction", "follow")
            key = tuple(str(pruning.get(name)) for name in keys)
            if key not in savings:
                cost = cost_of(config_of(data_set, name), data_set.shape)
                savings[key] = 1 - cost["backbone"].flops / full
            assert savings[key] == pytest.approx(arm.saving, abs=0.015), name
    assert len(savings) == 12


@pytest.mark.parametrize("task", TASKS)
def test_same_head_schedule_and_augmentation(task):
    base, *others = (
        config_of(DATA_SETS[task], arm).to_dict() for arm in ARMS if not ARMS[arm].start
    )
    for other in others:
        different = {key for key in base if base[key] != other[key]}
        assert different <= {"model", "custom_imports"}
        parts = {key for key in other["model"] if other["model"][key] != base["model"].get(key)}
        assert parts <= {"backbone", "neck", "decode_head", "auxiliary_head"}
        for head in parts - {"backbone", "neck"}:
            widths = dict(in_channels=base["model"][head]["in_channels"])
            assert {**other["model"][head], **widths} == base["model"][head]


@pytest.mark.parametrize("task", TASKS)
def test_trained_on_one_split_and_tested_once_on_another(roots, tmp_path, task):
    found = campaign(roots, tmp_path / "out", task)
    assert found.data.num_images == dict(train=NUM_TRAIN, test=NUM_TEST)
    cfg = Config.fromfile(found.write_config("pruned, hold", 1))
    assert cfg.load_from == str(found.weights(DENSE, 1))
    assert cfg.randomness.seed == 1 and cfg.model.backbone.pruning.alignment == "hold"
    assert cfg.default_hooks.checkpoint.save_best is None
    length = cfg.train_cfg.max_iters if task == "camvid" else cfg.train_cfg.max_epochs
    assert cfg.train_cfg.val_interval == length == DATA_SETS[task].length
    train, val, test = (cfg[f"{split}_dataloader"].dataset for split in ("train", "val", "test"))
    if task == "camvid":
        assert train.data_prefix.img_path == "images/training"
        assert val.data_prefix == test.data_prefix
        assert test.data_prefix.seg_map_path == "annotations/test"
    else:
        files = (train.ann_file, val.ann_file, test.ann_file, cfg.test_evaluator.ann_file)
        of_train, *of_test = (
            {Path(i["file_name"]).stem for i in json.loads(Path(f).read_text())["images"]}
            for f in files
        )
        assert of_train == {f"train{i}" for i in range(NUM_TRAIN)}
        assert of_test == [{f"test{i}" for i in range(NUM_TEST)}] * 3


def test_commands(roots, tmp_path):
    tasks = campaign(roots, tmp_path, seeds=[0, 3]).tasks
    assert len({task.folder for task in tasks.values()}) == len(tasks)
    trained, tested = tasks["pruned, hold", 3], tasks["pruned, hold, not tuned", 3]
    assert trained.after == tested.after == (f"{DENSE}, seed 3",)
    assert Path(trained.command[1]).name == "train.py" and trained.command[-2:] == (
        "--iters",
        "600",
    )
    assert Path(tested.command[1]).name == "test.py"
    assert tested.command[-1] == str(tasks[DENSE, 3].weights)
    assert tasks["GroupMamba, long", 0].command[-1] == "6000"
    few = campaign(roots, tmp_path / "few", arms=["pruned, none"], length=2)
    assert list(few.tasks) == [(arm, s) for s in (0, 1) for arm in (DENSE, "pruned, none")]
    assert few.tasks["pruned, none", 0].command[-1] == "2"


def test_an_arm_whose_package_is_missing_is_left_out(roots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense_campaign, "find_spec", lambda name: None)
    found = campaign(roots, tmp_path, arms=["ConvNeXt", "Swin"])
    assert found.arms == ["Swin"]
    assert "ConvNeXt is left out: it needs mmpretrain" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arms", "hold"], "unknown arms 'hold'; known are 'GroupMamba', "),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--length", "0"], "--length must be at least 1"),
        (["--seeds", "1", "1"], "--seeds 1 1: each seed once"),
    ],
)
def test_what_is_refused(roots, monkeypatch, arguments, words):
    command = ["dense.py", "--task", "camvid", "--data-root", str(roots / "camvid"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=words):
        dense.parse_args()


def test_data_of_another_layout_is_refused(roots, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*training; CamVid is expected in images/"):
        campaign(roots, tmp_path, data_root=str(roots))
    shutil.copytree(roots / "bccd", tmp_path / "bccd")
    (tmp_path / "bccd/ImageSets/Main/test.txt").unlink()
    with pytest.raises(UserError, match=r"no .*Main/test\.txt; BCCD is expected as"):
        campaign(tmp_path, tmp_path / "out", "bccd")


def test_runs_of_other_lengths_do_not_mix(roots, tmp_path):
    campaign(roots, tmp_path, length=2)
    with pytest.raises(UserError, match="have length 2, not None; name another --out"):
        campaign(roots, tmp_path)


# ---------------------------------------------------------------------------------------- results


@pytest.fixture
def one(roots, tmp_path):
    """A campaign of one run of each arm on label maps, which has not begun."""
    return campaign(roots, tmp_path / "out", seeds=[0])


def test_metrics_of_label_maps(one):
    folder, labels = one.folder("Swin", 0), one.data.labels
    shutil.copytree(labels, folder / predictions.MAPS)
    found = one.data_set.metrics(folder, labels)
    assert found["mIoU"] == found["aAcc"] == 100
    one_is_wrong = folder / predictions.MAPS / "0.png"
    Image.fromarray(np.full(SIZE[::-1], 4, np.uint8)).save(one_is_wrong)
    truth = [np.array(Image.open(labels / f"{i}.png")) for i in range(NUM_TEST)]
    counts = [np.array([(t == c).sum() for c in range(11)]) for t in truth]
    right, there = counts[1] + counts[2], sum(counts)
    ious = right / there
    ious[4] = there[4] / (there[4] + (counts[0].sum() - counts[0][4]))
    found = one.data_set.metrics(folder, labels)
    assert found["IoU of sky"] == pytest.approx(ious[0] * 100)
    assert found["IoU of pavement"] == pytest.approx(ious[4] * 100)
    assert found["mIoU"] == pytest.approx(ious.mean() * 100)
    scores = one.data_set.scores(folder, labels)
    assert min(scores, key=scores.get) == "0.png" and scores["1.png"] == scores["2.png"] == 1


def test_metrics_of_boxes(roots, tmp_path):
    found = campaign(roots, tmp_path / "out", "bccd", seeds=[0])
    folder, labels = found.folder("Swin", 0), found.data.labels
    folder.mkdir(parents=True)
    truth = json.loads(labels.read_text())["annotations"]
    boxes = [dict(box, score=0.9) for box in truth]

    def write(boxes):
        (folder / predictions.BOXES).write_text(json.dumps(boxes))
        return found.data_set.metrics(folder, labels), found.data_set.scores(folder, labels)

    metrics, scores = write(boxes)
    assert set(metrics.values()) == {100.0} and len(metrics) == 6
    assert set(scores) == {f"JPEGImages/test{i}.jpg" for i in range(NUM_TEST)}
    assert set(scores.values()) == {1.0}
    # Two thirds of one class's boxes are found, and one more is unsure.
    boxes[0]["score"] = 0.1
    metrics, scores = write([boxes[0], *boxes[3:]])
    assert metrics["AP of RBC"] == pytest.approx(100)
    assert metrics["AP of WBC"] == metrics["AP of Platelets"] == pytest.approx(100 * 67 / 101)
    assert sorted(scores.values()) == [0, 1, 1]
    assert set(write([])[0].values()) == {0.0}


def test_a_result_without_the_metric_is_refused(one):
    for name, content in (("result.json", '{"seconds": 3}'), ("result.json", "[]")):
        path = one.folder("Swin", 0) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        with pytest.raises(UserError, match=r"result of Swin lacks mIoU|result\.json is damaged"):
            one.results("Swin")


def test_results_count_wherever_their_runs_were(one):
    """A result alone, without weights and settings of its run."""
    path = one.folder("Swin", 0) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"mIoU": 40.0, "seconds": 3}')
    assert one.results("Swin")["runs"] == [dict(seed=0, mIoU=40.0, seconds=3)]
    assert one.results("Swin")["iterations"] == 1500 and one.results("Vim")["runs"] == []


def test_runs_of_another_machine_count(one, tmp_path):
    mine = one.folder("Swin", 0) / "result.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mIoU": 40.0, "seconds": 3}')
    arms = {
        arm: dict(
            iterations=one.results(arm)["iterations"],
            options=ARMS[arm].options,
            runs=[dict(seed=0, mIoU=41.0, seconds=4), dict(seed=7, mIoU=42.0, seconds=4)],
        )
        for arm in ("Swin", "Vim", "pruned, decay")
    }
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(dict(arms=arms)))
    one.take(path)
    assert [run["mIoU"] for run in one.results("Swin")["runs"]] == [40.0]
    for arm in ("Vim", "pruned, decay"):
        assert one.results(arm)["runs"] == [dict(seed=0, mIoU=41.0, seconds=4)]
    assert one.results("GroupMamba")["runs"] == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}", "is not a results.json that this tool wrote"),
        (
            '{"arms": {"Vim": {"iterations": 7, "options": {}, "runs": [{"seed": 0}]}}}',
            r"has Vim with 7 iterations and \{\}, not 1500 and \{\}",
        ),
    ],
)
def test_other_results_are_not_taken(one, tmp_path, text, words):
    path = tmp_path / "theirs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        one.take(path)
    assert one.results("Vim")["runs"] == []


def test_nothing_to_report(one):
    with pytest.raises(UserError, match=r"no run in .*out is finished; run without --report"):
        dense_report.report(one, time=False)


def test_table():
    results = {
        "pruned, hold": {
            "runs": [dict(mIoU=40.0), dict(mIoU=41.0)],
            "flops": 2.393,
            "milliseconds a image": 110.2,
        },
        "pruned, hold, not tuned": dict(runs=[dict(mIoU=20.0)]),
        "pruned, none, not tuned": dict(runs=[dict(mIoU=10.0)]),
    }
    lines = dense_report.table_of(results, "mIoU").splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head == ["arm", "FLOPs (G)", "ms a image", "mIoU", "runs", "not tuned"]
    assert rows == [
        ["pruned, hold", "2.39", "110", "40.50 ± 0.71", "40.00, 41.00", "20.00"],
        ["pruned, none, not tuned", "", "", "10.00", "10.00", ""],
    ]


# ------------------------------------------------------------------------------------------- runs


def run(monkeypatch, roots, out, task, *arguments):
    """Run the tool with tiny backbones."""
    for name, backbone in TINY.items():
        monkeypatch.setitem(BACKBONES, name, backbone)
    command = ["dense.py", "--task", task, "--data-root", str(roots / task), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, *arguments])
    dense.main()


ARGUMENTS = ("--seeds", "0", "--length", "1")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_campaign(roots, tmp_path, monkeypatch, capsys):
    """A training, and a pruned model that starts from it; nothing runs the second time."""
    arguments = (*ARGUMENTS, "--no-time", "--arms", "pruned, decay, not tuned")
    run(monkeypatch, roots, tmp_path, "camvid", *arguments)
    output = capsys.readouterr().out
    assert "[2 of 2] pruned, decay, not tuned, seed 0: mIoU" in output
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    (trained,) = arms[DENSE]["runs"]
    assert trained["mIoU"] == pytest.approx(
        np.mean([v for k, v in trained.items() if k.startswith("IoU of")])
    )
    assert arms[DENSE]["iterations"] == 1
    assert (tmp_path / "predictions.jpg").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text() in output
    run(monkeypatch, roots, tmp_path, "camvid", *arguments)
    assert "2 of 2 runs were done before" in capsys.readouterr().out
    taken = ("--take", str(tmp_path / "results.json"))
    run(monkeypatch, roots, tmp_path / "elsewhere", "camvid", *arguments, *taken)
    assert "2 of 2 runs were done before" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("task", TASKS)
def test_a_campaign_with_times_whose_weights_get_lost(roots, tmp_path, monkeypatch, capsys, task):
    monkeypatch.setattr(dense_report, "_SECONDS", 0.1)
    arms = ("--arms", "GroupMamba", "pruned, merging")
    run(monkeypatch, roots, tmp_path, task, *ARGUMENTS, *arms)
    output = capsys.readouterr().out
    metric = DATA_SETS[task].metric
    assert f"[3 of 3] pruned, merging, seed 0: {metric}" in output
    found = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert set(found) == {"GroupMamba", DENSE, "pruned, merging"}
    for result in found.values():
        for step in dense_report.STEPS:
            assert result[f"milliseconds a {step}"] > 0 and result[f"megabytes a {step}"] > 0
    assert found["pruned, merging"]["backbone_flops"] < found[DENSE]["backbone_flops"]
    for name in ("time.png", "predictions.jpg"):
        assert (tmp_path / name).stat().st_size > 10_000
    interrupted = tmp_path / "GroupMamba/seed0"
    (interrupted / "result.json").unlink()
    for path in (
        *interrupted.glob("predictions/1.png"),
        *interrupted.glob("predictions.bbox.json"),
    ):
        path.unlink()
    run(monkeypatch, roots, tmp_path, task, *ARGUMENTS, *arms, "--no-time")
    assert "GroupMamba, seed 0 ended within its evaluation; we repeat that" in (
        capsys.readouterr().out
    )
    (repeated,) = json.loads((tmp_path / "results.json").read_text())["arms"]["GroupMamba"]["runs"]
    assert repeated[metric] == found["GroupMamba"]["runs"][0][metric]
    for path in tmp_path.rglob("*.pth"):
        path.unlink()
    more = (*ARGUMENTS, "--no-time", "--arms", "GroupMamba", "pruned, hold", "pruned, merging")
    run(monkeypatch, roots, tmp_path, task, *more)
    output = capsys.readouterr().out
    assert f"{DENSE}, seed 0 runs again" in output and "GroupMamba, seed 0 runs" not in output
    again = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert again[DENSE]["runs"] == found[DENSE]["runs"]
    assert again["pruned, hold"]["runs"]
