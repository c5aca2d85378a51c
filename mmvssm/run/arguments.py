"""Define the command-line arguments of the tools that train, test, predict and export."""

import argparse
import math
import sys
from typing import Any, Optional

import torch

from ..errors import add_traceback_option
from .checkpoints import is_checkpoint
from .settings import SettingsAction


def train_parser() -> argparse.ArgumentParser:
    """The arguments of tools/train.py."""
    parser = _parser("Train a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain).")
    _add_run_options(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train for N epochs; milestones, annealing, intervals and hooks change with the length; with --resume, "
        "the learning rate continues as in a run of N epochs",
    )
    length.add_argument(
        "--iters", type=int, metavar="N", help="as --epochs, for a config that counts iterations"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="start from random weights where the config names pretrained ones (init_cfg)",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="train in mixed precision: on a GPU bfloat16 if it has that, else float16 with scaled losses; on a CPU "
        "bfloat16 for backbone and neck",
    )
    parser.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), help="--amp, in this dtype on a GPU"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="images a step on each GPU or process"
    )
    parser.add_argument(
        "--image-size",
        type=_positive,
        metavar="PIXELS",
        help="train and test with images of this size: the longer side of a detector's test images, else the training "
        "crop; all sizes of the config follow in proportion",
    )
    parser.add_argument("--lr", type=_rate, metavar="RATE", help="the optimizer's learning rate")
    parser.add_argument(
        "--layer-decay",
        type=_share,
        metavar="RATE",
        help="multiply the learning rate by this for each layer from the backbone's last to its first, such as 0.8",
    )
    parser.add_argument(
        "--early-stop",
        type=_positive,
        metavar="N",
        help="end when N validations in a row have not improved the metric",
    )
    parser.add_argument(
        "--logger",
        action="append",
        default=[],
        choices=("tensorboard", "wandb", "mlflow"),
        help="also log losses and metrics there (needs that package); repeatable",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the config's base_batch_size to the actual batch size",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="the same as --logger tensorboard",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="run the config with mmengine alone: none of our hooks, checks or samplers; only safe loading of "
        "checkpoints and generated data remain",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint; without a file name, from the last one in the work dir",
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The arguments of tools/test.py."""
    parser = _parser(
        "Evaluate a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain).",
        checkpoint="checkpoint file, or an .onnx file written by tools/export_onnx.py",
    )
    _add_run_options(parser)
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write pictures of predictions to this folder; in a distributed run, only rank 0's share",
    )
    parser.add_argument(
        "--wait-time",
        type=float,
        default=2,
        metavar="SECONDS",
        help="how long --show shows each picture (default: 2)",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="write predictions to a .pkl file, or, for segmentation, as label maps to a folder",
    )
    parser.add_argument(
        "--tta", action="store_true", help="augment at test time (several scales, flips)"
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="for an .onnx file: run the scans with mmvssm's compiled operator for onnxruntime",
    )
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """The arguments of tools/predict.py."""
    parser = _parser(
        "Predict on images and videos with a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain).",
        config="config file; after training with --data-root, the one in the work dir",
        checkpoint="checkpoint file",
        epilog="The exit code is 0 if everything was predicted, 3 if unreadable files were skipped, and 1 or 2 if "
        "nothing was done.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, videos, folders of them (without subfolders), or quoted patterns such as 'scans/**/*.tif'",
    )
    parser.add_argument(
        "--out-dir",
        required=True,
        metavar="DIR",
        help="new or empty folder for pictures and predictions",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        metavar="SCORE",
        help="drop detections with lower scores from pictures and JSON (default: 0.3)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="predict up to N consecutive images of the same size together, which is faster on a GPU (default: 1)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run on, such as cpu or cuda:1 (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--show-tokens",
        action="store_true",
        help="for a pruned model: also draw which tokens of each image are kept, and where the others are pruned",
    )
    add_cfg_options(parser)
    return parser


def export_onnx_parser() -> argparse.ArgumentParser:
    """The arguments of tools/export_onnx.py."""
    parser = _parser(
        "Export a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain) to ONNX.",
        checkpoint="checkpoint file",
    )
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument(
        "--opset",
        type=int,
        default=18,
        help="version of ONNX's standard operators, from 18 to 26, for detectors to 21 (default: 18)",
    )
    add_cfg_options(parser)
    return parser


def _positive(text: str) -> int:
    """A whole number from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _rate(text: str) -> float:
    """A finite number from 0 on."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def _share(text: str) -> float:
    """A number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


class _CheckpointFirst(Exception):
    """The first positional argument is a checkpoint."""


class _Config(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: Any = None) -> None:
        namespace.config = value
        if is_checkpoint(value) and namespace.checkpoint != value:
            raise _CheckpointFirst(value)


class _Parser(argparse.ArgumentParser):
    """Takes a checkpoint that holds its config as both: ``CHECKPOINT ...`` stands for ``CHECKPOINT CHECKPOINT ...``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See the base class."""
        args = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_known_args(args, namespace)
        except _CheckpointFirst as found:
            path = str(found)
            if args.count(path) == 1:
                args.insert(args.index(path), path)
            return super().parse_known_args(args, argparse.Namespace(checkpoint=path))


def _parser(
    description: str,
    config: str = "config file",
    checkpoint: Optional[str] = None,
    epilog: Optional[str] = None,
) -> argparse.ArgumentParser:
    """Make a parser with the arguments that all tools share; ``config`` and ``checkpoint`` are help texts."""
    parser = (_Parser if checkpoint else argparse.ArgumentParser)(
        description=f"{description} The config says which.", epilog=epilog
    )
    if checkpoint:
        config = f"{config}; not needed before a checkpoint that tools/train.py wrote (.pth)"
        parser.add_argument("config", action=_Config, help=config)
        parser.add_argument("checkpoint", help=checkpoint)
    else:
        parser.add_argument("config", help=config)
    add_traceback_option(parser)
    parser.set_defaults(work_dir=None, launcher="none", local_rank=0)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir",
        help="folder for logs, checkpoints and results (default: work_dirs/<config name>)",
    )
    add_data_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="launcher of a distributed run",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a data set."""
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="use the data set in this folder: COCO, Pascal VOC or YOLO for detection, label maps beside images for "
        "segmentation, a folder a class for classification; classes, heads and evaluators follow",
    )
    parser.add_argument(
        "--data-format",
        choices=("coco", "voc", "yolo", "ade20k"),
        help="which of several layouts in --data-root to use (default: the only one)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names of --data-root (default: those in its annotation files; for a test, those of the checkpoint)",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="whether 0 in the label maps of --data-root means unlabelled and classes count from 1, as in ADE20K "
        "(default: inferred from all maps)",
    )
    parser.add_argument(
        "--no-data-check",
        action="store_true",
        help="skip opening all images and label maps before the run, as for huge data sets on slow storage; annotation "
        "files are still checked",
    )
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=SettingsAction,
        metavar="KEY=VALUE",
        help="change settings of the config, such as optim_wrapper.optimizer.lr=0.001; lists are "
        'key="[a,b]" or key=a,b, without spaces',
    )
