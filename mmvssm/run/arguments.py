"""Command-line arguments of the tools that train, test, predict and export."""

import argparse

import torch

from ..errors import add_traceback_option
from .settings import SettingsAction


def train_parser() -> argparse.ArgumentParser:
    """The arguments of tools/train.py."""
    parser = argparse.ArgumentParser(
        description="Train a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain); the "
        "config says which."
    )
    parser.add_argument("config", help="config file")
    _add_common(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train for N epochs: milestones, annealing, validation, checkpoints and hooks follow; with "
        "--resume the rates go on as in a run of N epochs",
    )
    length.add_argument(
        "--iters", type=int, metavar="N", help="the same for a config that counts iterations"
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="mixed-precision training: float16 on a GPU, bfloat16 backbone and neck on a CPU",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the config's base_batch_size to the actual batch size",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write losses and metrics for TensorBoard too (the package tensorboard has to be there)",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="run the config by mmengine alone, without our checks, hooks, samplers and loops, to find out whose "
        "problem it is; only safe loading of checkpoints and generated data remain",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue an interrupted training from this checkpoint, or, with no file named, from "
        "the last one in the work dir",
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The arguments of tools/test.py."""
    parser = argparse.ArgumentParser(
        description="Evaluate a detector (mmdet), a segmenter (mmseg) or a classifier (mmpretrain); the "
        "config says which."
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "checkpoint", help="checkpoint file, or an .onnx file that tools/export_onnx.py wrote"
    )
    _add_common(parser)
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write pictures of predictions here (of several processes, the first draws its share)",
    )
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds that --show shows a picture for"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="write predictions: to a .pkl file, or, for segmentation, as label maps to a folder",
    )
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation (several scales, flips)"
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="of an .onnx file: run the scans in mmvssm's compiled operator for onnxruntime",
    )
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """The arguments of tools/predict.py."""
    parser = argparse.ArgumentParser(
        description="Predict on images and videos with a detector (mmdet) or a segmenter (mmseg); "
        "the config says which.",
        epilog="The exit code is 0 if everything was predicted, 3 if files could not be read and were "
        "left out, and 1 or 2 if nothing was done.",
    )
    parser.add_argument(
        "config", help="config file; after a training with --data-root the one in its work dir"
    )
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, videos, folders of them (without the folders inside), or quoted patterns such "
        "as 'scans/**/*.tif'",
    )
    parser.add_argument(
        "--out-dir",
        required=True,
        metavar="DIR",
        help="folder for pictures and predictions; a new or an empty one",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        metavar="SCORE",
        help="leave out detections with lower scores, from pictures and JSON (default: 0.3)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="how many images that follow each other in the same size are predicted together, which "
        "is faster on a GPU (default: 1)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what to run on, such as cpu or cuda:1; default: a GPU if there is one",
    )
    parser.add_argument(
        "--show-tokens",
        action="store_true",
        help="of a pruned model also draw which tokens are kept of each image, and where others left",
    )
    add_cfg_options(parser)
    add_traceback_option(parser)
    parser.set_defaults(work_dir=None, launcher="none", local_rank=0)
    return parser


def export_onnx_parser() -> argparse.ArgumentParser:
    """The arguments of tools/export_onnx.py."""
    parser = argparse.ArgumentParser(
        description="Export a detector (mmdet) or a segmenter (mmseg) to ONNX; the config says which."
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument(
        "--opset",
        type=int,
        default=18,
        help="version of ONNX's standard operators, from 18 to 26, for detectors to 21 (default: 18)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=SettingsAction,
        metavar="KEY=VALUE",
        help="change settings of the config, such as model.test_cfg.mode=whole",
    )
    parser.set_defaults(work_dir=None, launcher="none", local_rank=0)
    add_traceback_option(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir",
        help="folder for logs, checkpoints and results (default: work_dirs/<config name>)",
    )
    add_data_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    add_traceback_option(parser)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Give a tool the options that name a data set."""
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="use the data set in this folder, in COCO's layout, (segmentation) ADE20K's or (classification) "
        "ImageNet's; classes, heads and evaluators follow",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names of --data-root; default: those in its annotation files (test: those the "
        "checkpoint was trained on)",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="whether 0 in the label maps of --data-root means unlabelled and classes count from "
        "1, as in ADE20K; default: as all the maps tell",
    )
    parser.add_argument(
        "--no-data-check",
        action="store_true",
        help="do not open all images and label maps before the run, as for giant data sets on slow "
        "storage; annotation files are checked all the same",
    )
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Give a tool ``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=SettingsAction,
        metavar="KEY=VALUE",
        help="change settings of the config, such as optim_wrapper.optimizer.lr=0.001; lists are "
        'key="[a,b]" or key=a,b, without spaces',
    )
