"""The student's loss from a teacher, and that checkpoints contain nothing of the teacher."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from mmvssm.errors import UserError
from mmvssm.registry import MODELS
from support.pretraining import DISTILLED, require_mmpretrain, write_class_folders
from support.toy_training import losses as logged
from support.two_processes import in_two_processes

require_mmpretrain()
from mmpretrain.structures import DataSample  # noqa: E402

REPO = Path(__file__).parents[3]


class Spy(nn.Module):
    """A teacher that keeps what it sees.

    Args:
        num_classes: Of its answers, which are made of the means of the channels.
    """

    def __init__(self, num_classes=2):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
        self.norm = nn.BatchNorm2d(3)
        self.seen = []

    def init_weights(self):
        pass

    def forward(self, inputs):
        self.seen.append((inputs, self.training, torch.is_grad_enabled()))
        return self.fc(self.norm(inputs).mean((2, 3)))


class Backbone(nn.Sequential):
    def forward(self, x):
        return (super().forward(x),)


@pytest.fixture(autouse=True)
def scope():
    if "Spy" not in MODELS.module_dict:
        MODELS.register_module(module=Spy)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


def student(**settings):
    head = dict(
        type="mmvssm.DistillationHead",
        num_classes=2,
        in_channels=3,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    )
    head.update(settings.pop("head", {}))
    model = dict(
        type="mmvssm.DistilledClassifier",
        backbone=Backbone(nn.BatchNorm2d(3)),
        neck=dict(type="GlobalAveragePooling"),
        head=head,
        teacher=dict(type="mmvssm.Spy"),
    )
    torch.manual_seed(0)
    return MODELS.build({**model, **settings})


def samples(labels):
    return [DataSample().set_gt_label(label) for label in labels]


def cross_entropy(logits, targets):
    """Compute the cross entropy of probabilities by hand."""
    return -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()


@pytest.mark.parametrize("weight", [0.5, 0.3])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_the_one_computed_by_hand(kind, weight):
    head = dict(distillation=kind, distillation_weight=weight, temperature=3.0)
    model = student(head=head).train()
    model.load_teacher()
    x, labels = torch.randn(4, 3, 5, 6), [0, 1, 1, 0]
    found = model(x, samples(labels), mode="loss")
    feature = F.batch_norm(x, None, None, training=True).mean((2, 3))
    logits = feature @ model.head.fc.weight.T + model.head.fc.bias
    distilled = feature @ model.head.distillation_fc.weight.T + model.head.distillation_fc.bias
    smooth = torch.eye(2)[labels] * 0.9 + 0.1 / 2
    with torch.no_grad():
        teacher = model.teacher(x)
    if kind == "hard":
        of_teacher = cross_entropy(distilled, torch.eye(2)[teacher.argmax(1)])
    else:
        p, q = (teacher / 3).softmax(1), (distilled / 3).softmax(1)
        of_teacher = 9 * (p * (p / q).log()).sum(1).mean()
    expected = (1 - weight) * cross_entropy(logits, smooth) + weight * of_teacher
    assert found.keys() == {"loss_label", "loss_distillation"}
    torch.testing.assert_close(sum(found.values()), expected)
    sum(found.values()).backward()
    assert model.head.distillation_fc.weight.grad.abs().sum() > 0


def test_the_teacher_sees_what_mixup_and_cutmix_left_of_the_images():
    np.random.seed(0)  # CutMix's box may be empty, which would change nothing
    torch.manual_seed(0)
    augments = [dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]
    model = student(
        train_cfg=dict(augments=augments), data_preprocessor=dict(num_classes=2)
    ).train()
    model.load_teacher()
    seen_by_student = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen_by_student.append(args[0]))
    images = torch.randint(0, 255, (8, 3, 32, 32))
    for _ in range(2):
        batch = dict(inputs=list(images), data_samples=samples([0, 1] * 4))
        data = model.data_preprocessor(batch, training=True)
        model(**data, mode="loss")
    assert len(model.teacher.seen) == len(seen_by_student) == 2
    for (inputs, training, with_gradients), of_student in zip(model.teacher.seen, seen_by_student):
        assert inputs is of_student and not torch.equal(inputs, images.float())
        assert not training and not with_gradients


def test_the_teacher_is_no_part_of_the_model():
    model = student()
    assert model.teacher is None  # evaluation needs none
    model.init_weights()
    model.train()
    teacher = model.teacher
    assert not any("teacher" in name or name.startswith("norm") for name in model.state_dict())
    owned = {id(p) for p in model.parameters()}
    assert not owned & {id(p) for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert copy.deepcopy(model).teacher is teacher  # averaged weights share it
    model.double()
    assert teacher.fc.weight.dtype == torch.float64  # it follows the student, to a GPU as well


def test_a_teacher_in_bfloat16():
    model = student(teacher_bf16=True)
    model.load_teacher()
    x = torch.randn(4, 3, 5, 6)
    logits = model.ask_teacher(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model.teacher(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(teacher=dict(type="mmvssm.Spy", num_classes=3)), UserError, "has 3 classes and the"),
        (dict(teacher_checkpoint="absent.pth"), UserError, "no checkpoint file absent.pth"),
        (dict(teacher_checkpoint="other.pth"), UserError, "other.pth are not model.teacher's: .*Missing"),
        (dict(head=dict(type="LinearClsHead")), ValueError, "must be a mmvssm.DistillationHead"),
        (dict(head=dict(distillation="firm")), ValueError, "known are 'hard', 'soft'"),
        (dict(head=dict(distillation_weight=2)), ValueError, "from 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(settings, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, "other.pth")
    with pytest.raises(error, match=words) as caught:
        model = student(**settings)
        model.load_teacher()
        model(torch.randn(2, 3, 4, 4), samples([0, 1]), mode="loss")
    assert "\n" not in str(caught.value)


def test_timm_reads_no_file_by_itself(tmp_path):
    file = str(tmp_path / "teacher.pth")
    model = student(teacher=dict(type="TimmClassifier", model_name="any", checkpoint_path=file))
    with pytest.raises(UserError, match=r"name the file as model\.teacher_checkpoint"):
        model.load_teacher()


def test_timm_s_teachers_and_their_files(tmp_path):
    pytest.importorskip("timm")
    timm = dict(type="TimmClassifier", model_name="resnet10t", num_classes=2, pretrained=False)
    saved = student(teacher=timm)
    saved.load_teacher()
    weights = saved.teacher.model.state_dict()  # under timm's own names
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    model = student(teacher=timm, teacher_checkpoint=str(tmp_path / "teacher.pth"))
    model.load_teacher()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.ask_teacher(x), saved.ask_teacher(x))
    other = student(teacher=dict(timm, num_classes=7))
    with pytest.raises(UserError, match="7 classes"):
        other.load_teacher()


def test_two_processes_end_with_equal_weights(tmp_path):
    from mmengine.model import MMDistributedDataParallel
    from mmengine.optim import OptimWrapper

    def train(rank):
        model = student(
            backbone=Backbone(nn.Conv2d(3, 3, 3))
        )  # seeded, so that both teachers are alike
        model.load_teacher()
        before = copy.deepcopy(model.teacher.state_dict())
        model = MMDistributedDataParallel(model)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        torch.manual_seed(rank)
        for _ in range(3):
            images = torch.randn(4, 3, 6, 6)
            data = dict(inputs=list(images), data_samples=samples([rank, 1, 0, 1]))
            model.train_step(data, wrapper)
        after = model.module.teacher.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return {name: value.tolist() for name, value in model.module.state_dict().items()}

    first, second = in_two_processes(train, tmp_path)
    assert isinstance(first, dict), first
    assert first == second
    assert first["head.fc.weight"] != student().head.fc.weight.tolist()


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a data set, a config and a teacher's weights."""
    folder = tmp_path_factory.mktemp("project")
    write_class_folders(folder / "data", train=6)
    (folder / "config.py").write_text(DISTILLED.replace("CONFIGS", str(REPO / "configs")))
    cfg = Config.fromfile(folder / "config.py")
    init_default_scope("mmpretrain")
    torch.manual_seed(1)
    teacher = MODELS.build(cfg.model.teacher)
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, folder / "teacher.pth")
    return folder


def tensors_in(part):
    """Yield all tensors in a checkpoint."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (dict, list, tuple)):
        for value in part.values() if isinstance(part, dict) else part:
            yield from tensors_in(value)


def start(project, work_dir, *options):
    command = [sys.executable, REPO / "tools/train.py", "config.py", "--data-root", "data"]
    return subprocess.Popen(
        [*map(str, command), "--work-dir", work_dir, *options],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_saves_no_teacher(project):
    process = start(project, "whole")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    process = start(project, "killed", "--cfg-options", "train_dataloader.num_workers=1")
    end = time.monotonic() + 200
    while not (project / "killed/epoch_1.pth").exists() or len(logged(project / "killed")) < 7:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(project, "killed", "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Resuming from" in output
    assert json.dumps(logged(project / "killed")) == json.dumps(logged(project / "whole"))
    whole, killed = (
        torch.load(project / name / "epoch_2.pth", weights_only=True)
        for name in ("whole", "killed")
    )
    for part in ("state_dict", "ema_state_dict"):
        assert whole[part].keys() == killed[part].keys()
        assert not any("teacher" in name for name in whole[part])
        assert all(torch.equal(value, killed[part][name]) for name, value in whole[part].items())
    # Weights, averaged ones and the optimizer's two moments, which leaves no room for a teacher.
    held = list(tensors_in(whole))
    teacher = torch.load(project / "teacher.pth", weights_only=True)["state_dict"]
    own = sum(value.nbytes for value in whole["state_dict"].values())
    assert sum(value.nbytes for value in held) < 4.1 * own
    assert sum(value.nbytes for value in teacher.values()) > 0.2 * own
