"""Count parameters and FLOPs of a config's model, or of one of mmvssm's models by name.

Examples:
    python tools/analysis_tools/get_flops.py configs/groupmamba_maskrcnn_coco.py --shape 800 1280
    python tools/analysis_tools/get_flops.py GroupMambaClassifier --cfg-options arch=small --shape 224 224
"""

import argparse
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from prettytable import PrettyTable
from torch import nn

import mmvssm  # noqa: F401  (registers the models)
from mmvssm.analysis.flops import count
from mmvssm.errors import UserError, add_traceback_option, run_tool, user_mistakes
from mmvssm.models.weights import drop_pretrained
from mmvssm.run.setup import explain_missing_mmpretrain


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a config file, or the name of a model such as GroupMamba")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="height and width, or one number for both; by default 800 1280 for detectors, "
        "512 2048 for segmenters, 224 for the rest",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, default={}, help="override settings"
    )
    add_traceback_option(parser)
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """Build the model named on the command line, with random weights.

    Raises:
        UserError: If there is no such config or model.
    """
    if not args.model.endswith(".py"):
        with user_mistakes():
            return MODELS.build(dict(type=f"mmvssm.{args.model}", **args.cfg_options))
    if not Path(args.model).is_file():
        raise UserError(f"there is no config file {args.model}")
    with user_mistakes(f"cannot build the model of {args.model}"), explain_missing_mmpretrain():
        cfg = Config.fromfile(args.model)
        cfg.merge_from_dict(args.cfg_options)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        list(drop_pretrained(cfg.model))
        return MODELS.build(cfg.model)


def default_shape(model: nn.Module) -> tuple[int, int]:
    """Return the height and width at which papers report FLOPs."""
    if hasattr(model, "decode_head"):
        return 512, 2048
    is_detector = hasattr(model, "data_preprocessor") and not is_classifier(model)
    return (800, 1280) if is_detector else (224, 224)


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model is an mmpretrain classifier; detectors call their heads ``*_head``."""
    return hasattr(model, "data_preprocessor") and hasattr(model, "head")


def run_once(model: nn.Module, image: torch.Tensor) -> object:
    """Run a backbone, classifier, segmenter or detector on ``(1, 3, H, W)``, without post-processing."""
    if not hasattr(model, "data_preprocessor"):
        return model(image)
    head = getattr(model, "decode_head", None)
    if hasattr(head, "query_embed"):  # Mask2Former's takes samples, too, which that mode lacks
        model.forward = lambda image: head(model.extract_feat(image), [])
        return model(image)
    if hasattr(model, "decode_head") or is_classifier(model):
        return model(image, mode="tensor")
    from mmdet.models.roi_heads import CascadeRoIHead
    from mmdet.structures import DetDataSample

    if isinstance(getattr(model, "roi_head", None), CascadeRoIHead) and model.roi_head.with_mask:
        predict_masks_of_a_hundred(model.roi_head)
    shape = tuple(image.shape[-2:])
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1, 1))
    )
    return model(image, [sample], mode="tensor")


def predict_masks_of_a_hundred(roi_head: nn.Module) -> None:
    """Let a cascade predict masks of 100 boxes, as all models do at inference, and not of all proposals."""
    forward = roi_head._mask_forward

    def limited(stage: int, maps: tuple, rois: torch.Tensor) -> dict:
        masks = forward(stage, maps, rois[:100])["mask_preds"]
        return dict(mask_preds=masks[:1].expand(len(rois), -1, -1, -1))

    roi_head._mask_forward = limited


def main() -> None:
    """Print the table of parameters and FLOPs."""
    args = parse_args()
    model = build(args).eval()
    shape = tuple(args.shape * 2)[:2] if args.shape else default_shape(model)
    image = torch.rand(1, 3, *shape)
    costs = count(model, lambda: run_once(model, image))
    table = PrettyTable(["part", "parameters (M)", "FLOPs (G)", "of which scan (G)"], align="r")
    table.align["part"] = "l"
    for name, cost in costs.items():
        table.add_row(
            [
                name,
                f"{cost.parameters / 1e6:.3f}",
                f"{cost.flops / 1e9:.3f}",
                f"{cost.scan_flops / 1e9:.3f}",
            ],
            divider=name == list(costs)[-2],
        )
    print(f"{args.model} at {shape[0]}x{shape[1]}, {costs['total'].parameters:,} parameters")
    print(table)
    print("A multiply-add counts once, the scan as 9 L D N + L D per direction.")


if __name__ == "__main__":
    run_tool(main)
