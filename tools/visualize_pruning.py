"""Draw the tokens that a pruned backbone keeps of an image, and print the FLOPs and time saved.

python tools/visualize_pruning.py configs/plainmamba_pruned_upernet_shapes.py CHECKPOINT IMAGE --out kept.png
"""

import argparse
import os
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmvssm  # noqa: F401  (registers the models)
from mmvssm.analysis import picture_file
from mmvssm.analysis.pruning_view import (
    draw_pruning,
    load_image,
    measure_saving,
    observe_pruning,
    patch_size_of,
    pruned_backbone,
    summarize,
)
from mmvssm.errors import UserError, add_traceback_option, run_tool, user_mistakes
from mmvssm.run.checkpoints import Checkpoint
from mmvssm.run.settings import SettingsAction, check_config_file, check_options
from mmvssm.safe_checkpoint import force_weights_only


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", help="a detector's or segmenter's config with model.backbone.pruning"
    )
    parser.add_argument("checkpoint", help="a checkpoint of that model, pruned or dense")
    parser.add_argument("image", help="an image file")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what to run on, such as cpu or cuda:1; default: a GPU if there is one",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=SettingsAction,
        default={},
        metavar="KEY=VALUE",
        help="change settings of the config, such as model.backbone.pruning.keep_ratio=0.7",
    )
    add_traceback_option(parser)
    return parser.parse_args()


def check_files(args: argparse.Namespace) -> None:
    """Check the files given before any slow work.

    Raises:
        UserError: If the config or the image cannot be read, or the picture cannot be written.
    """
    check_config_file(args.config)
    if not os.path.isfile(args.image):
        raise UserError(f"there is no image {args.image}")
    if mmcv.imread(args.image) is None:
        raise UserError(f"{args.image} is not an image that mmcv can read")
    picture_file(args.out)


def load_model(cfg: Config, args: argparse.Namespace) -> nn.Module:
    """Build the config's model in evaluation mode and load its weights.

    Raises:
        UserError: If the model cannot be built or prunes nothing, or the checkpoint does not fit it.
    """
    with user_mistakes(f"cannot build the model of {args.config}"):
        init_default_scope(cfg.get("default_scope", "mmengine"))
        model = MODELS.build(cfg.model)
    pruned_backbone(model)
    Checkpoint.load(args.checkpoint).check_fits(model)
    with user_mistakes(f"cannot use --device {args.device}"):
        return model.to(args.device).eval()


def main() -> None:
    """Draw the picture and print the numbers."""
    args = parse_args()
    check_files(args)
    force_weights_only()
    with user_mistakes(f"cannot read the config {args.config}"):
        cfg = Config.fromfile(args.config)
    check_options(cfg, args.cfg_options)
    with user_mistakes("cannot apply --cfg-options"):
        cfg.merge_from_dict(args.cfg_options)
    model = load_model(cfg, args)
    backbone = pruned_backbone(model)
    with user_mistakes(f"cannot prepare {args.image} with the config's test pipeline"):
        image, x = load_image(cfg, model, args.image)
    with user_mistakes(f"cannot run the backbone on {args.image}"):
        layers = observe_pruning(backbone, x)
        saving = measure_saving(backbone, x)
    numbers = summarize(layers, saving, args.device)
    title = "\n".join([f"{Path(args.image).name:.50}", *numbers])
    with user_mistakes(f"cannot write {args.out}"):
        draw_pruning(image, layers, patch_size_of(backbone), title).savefig(args.out)
    print(f"{args.image}: {'; '.join(numbers)}")


if __name__ == "__main__":
    run_tool(main)
