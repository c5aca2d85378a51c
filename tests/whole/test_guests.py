"""The backbones in projects that know nothing of mmengine, and in mmrotate: a training step, and a prediction.

Each test is skipped where its project is not installed; we install none of them.
"""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from mmvssm.models import FeaturePyramid, GroupMamba, PlainMamba, SpatialMamba, Vim, VMamba
from support.tiny_backbones import GROUP, PLAIN, SPATIAL, VIM, V

PYRAMIDS = {
    "groupmamba": lambda: GroupMamba(GROUP),
    "spatialmamba": lambda: SpatialMamba(SPATIAL),
    "vmamba": lambda: VMamba(V),
}
PLAINS = {
    "plainmamba": lambda: PlainMamba(PLAIN),
    "vim": lambda: Vim(dict(VIM, patch_size=16, stride=16)),
}
RESCALES = (4, 2, 1, 0.5)


class Pyramid(nn.Module):
    """A backbone of one map, with four of it."""

    def __init__(self, backbone):
        super().__init__()
        self.body = backbone
        self.out_channels = backbone.out_channels * 4
        self.neck = FeaturePyramid(self.out_channels, RESCALES, norm_cfg=dict(type="BN"))

    def forward(self, x):
        return self.neck(self.body(x))


BACKBONES = {
    **PYRAMIDS,
    **{name: lambda build=build: Pyramid(build()) for name, build in PLAINS.items()},
}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    return BACKBONES[request.param]()


def check_step(model, loss):
    """Every parameter that takes part has a finite gradient, the backbone's above all."""
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sum("stages." in name or "layers." in name for name in gradients) > 10
    assert all(grad.isfinite().all() for grad in gradients.values())


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet", "Segformer"])
def test_segmentation_models_pytorch(backbone, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install it to try")

    class Encoder(nn.Module, smp.encoders._base.EncoderMixin):
        _output_stride = 32

        def __init__(self, depth=5, **_):
            super().__init__()
            self.backbone, self._depth, self._in_channels = backbone, depth, 3
            self._out_channels = [3, 0, *backbone.out_channels]  # nothing at stride 2

        def forward(self, x):
            nothing = x.new_empty(x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2)
            return [x, nothing, *self.backbone(x)]

    smp.encoders.encoders["mmvssm"] = dict(encoder=Encoder, params={}, pretrained_settings={})
    model = getattr(smp, decoder)("mmvssm", encoder_weights=None, classes=3)
    images = torch.rand(2, 3, 64, 96)
    check_step(model, model(images).square().mean())
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 3, 64, 96)


@pytest.mark.slow
def test_torchvision_mask_rcnn(backbone):
    pytest.importorskip("torchvision", reason="pip install it to try")
    from torchvision.models.detection import MaskRCNN
    from torchvision.ops import FeaturePyramidNetwork

    class WithFPN(nn.Module):
        out_channels = 16

        def __init__(self):
            super().__init__()
            self.body = backbone
            self.fpn = FeaturePyramidNetwork(list(backbone.out_channels), self.out_channels)

        def forward(self, x):
            return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))

    sizes = tuple((size,) for size in (16, 32, 64, 128))
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
    model = MaskRCNN(WithFPN(), 3, min_size=96, max_size=128, rpn_anchor_generator=anchors)
    images = [torch.rand(3, 96, 128), torch.rand(3, 80, 100)]
    targets = [
        dict(
            boxes=torch.tensor([[8.0, 8.0, 60.0, 50.0]]),
            labels=torch.tensor([1]),
            masks=torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        )
        for image in images
    ]
    check_step(model, sum(model(images, targets).values()))
    with torch.no_grad():
        found = model.eval()(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores", "masks"}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "config",
    [
        "rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py",
        "oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py",
    ],
)
def test_mmrotate(config, name):
    try:
        mmrotate = pytest.importorskip("mmrotate", reason="pip install it to try")
    except AssertionError as error:
        pytest.skip(str(error))  # it asks for old versions of the others
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmengine.structures import InstanceData
    from mmrotate.registry import MODELS
    from mmrotate.structures.bbox import RotatedBoxes
    from mmrotate.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(f"{next(iter(mmrotate.__path__))}/.mim/configs/{config}").model
    types = dict(
        groupmamba=dict(type="mmvssm.GroupMamba", arch=GROUP),
        spatialmamba=dict(type="mmvssm.SpatialMamba", arch=SPATIAL),
        vmamba=dict(type="mmvssm.VMamba", arch=V),
        plainmamba=dict(type="mmvssm.PlainMamba", arch=PLAIN),
        vim=dict(type="mmvssm.Vim", arch=dict(VIM, patch_size=16, stride=16)),
    )
    cfg.backbone, channels = types[name], list(BACKBONES[name]().out_channels)
    cfg.neck.update(in_channels=channels, start_level=0)
    if name in PLAINS:
        pyramid = dict(type="mmvssm.FeaturePyramid", in_channels=channels, norm_cfg=dict(type="BN"))
        cfg.neck = [pyramid, cfg.neck]
    with DefaultScope.overwrite_default_scope("mmrotate"):
        torch.manual_seed(0)
        model = MODELS.build(cfg)
        sample = DetDataSample(
            metainfo=dict(img_shape=(128, 160), ori_shape=(128, 160), scale_factor=(1.0, 1.0))
        )
        box = RotatedBoxes(torch.tensor([[60.0, 60.0, 40.0, 24.0, 0.3]]))
        sample.gt_instances = InstanceData(bboxes=box, labels=torch.tensor([1]))
        image = torch.randint(0, 255, (3, 128, 160))
        data = dict(inputs=[image], data_samples=[sample])
        losses = model(**model.data_preprocessor(data, True), mode="loss")
        check_step(model, model.parse_losses(losses)[0])
        with torch.no_grad():
            (found,) = model.eval().test_step(data)
    assert found.pred_instances.bboxes.shape[1] == 5
