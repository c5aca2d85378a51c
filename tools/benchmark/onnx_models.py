"""Compare exported models in onnxruntime with the libraries' own inference in PyTorch.

``export`` describes the files, ``parity`` compares predictions, and ``speed`` compares times. onnxruntime runs each
file twice: with standard operators only (portable), and with the scans in mmvssm's compiled operator (native). Images
are resized to other sizes than the exporter's example. Models without a checkpoint have random weights; we then lower
detectors' score threshold until they find the most objects allowed, so that all have the same work. Needs onnx,
onnxscript and onnxruntime.

Examples:
    python tools/benchmark/onnx_models.py parity --model CONFIG CHECKPOINT --images photos/
    python tools/benchmark/onnx_models.py parity --model CONFIG CHECKPOINT --size 160 160 --size 131 203
    python tools/benchmark/onnx_models.py speed --threads 2
    python tools/benchmark/onnx_models.py export --model configs/plainmamba_pruned_maskrcnn_coco.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import mmcv
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DATASETS
from timing import about, markdown_table, time_side_by_side, write_json
from torch import Tensor, nn

from mmvssm.datasets.layouts import list_files
from mmvssm.errors import UserError, add_traceback_option, run_tool
from mmvssm.models.pruning import PrunedTokens
from mmvssm.run.checkpoints import Checkpoint
from mmvssm.run.setup import build_model, open_config, prepare_data

CONFIGS = Path(__file__).parents[2] / "configs"
FULL_SIZE = ("groupmamba_upernet_ade20k.py", "groupmamba_maskrcnn_coco.py")
PARITY_SIZES = [(160, 160), (192, 256), (131, 203)]
SPEED_SIZES = [(512, 512), (800, 1280)]
OPERATORS = ("portable", "native")

LABELS, LOGITS, BOXES, SCORES, MASKS = 0.999, 1e-3, 0.1, 1e-3, 0.99
"""Share of equal labels, differences of logits, boxes (pixels) and scores, and mask IoU that count as the same."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("export", "parity", "speed"))
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        metavar=("CONFIG", "CHECKPOINT [FILE.onnx]"),
        help="repeatable; without a checkpoint: random weights, without a file: exported anew (default: GroupMamba-T "
        "UperNet and Mask R-CNN)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, action="append", metavar=("H", "W"), help="repeatable"
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="a folder (default: parity: the config's test set; speed: noise)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="the data set, as of tools/test.py")
    parser.add_argument("--max-images", type=int, default=20, help="of each size (default: 20)")
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--portable-only", action="store_true", help="without the native operator")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory, unlike our tools"
    )
    parser.add_argument("--out", help="default: work_dirs/benchmark/onnx_<what>.json")
    add_traceback_option(parser)
    # Arguments that opening a config and its data set also reads.
    parser.set_defaults(
        cfg_options=None, work_dir=None, launcher="none", local_rank=0,
        data_format=None, classes=None, reduce_zero_label=None, no_data_check=True,
    )  # fmt: skip
    args = parser.parse_args()
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if not find_spec(name):
            raise UserError(f"{name} is missing; pip install onnx onnxscript onnxruntime adds it")
    args.model = args.model or [[str(CONFIGS / name)] for name in FULL_SIZE]
    args.out = args.out or f"work_dirs/benchmark/onnx_{args.what}.json"
    if any(len(model) > 3 for model in args.model):
        raise UserError("--model takes one config, checkpoint and file; repeat it for more models")
    return args


@dataclass
class Model:
    """A model in PyTorch.

    Attributes:
        name: Name of its config.
        cfg: Its config.
        network: The model in evaluation mode.
        trained: Whether it has weights of a checkpoint.
        file: An earlier export of it.
    """

    name: str
    cfg: Config
    network: nn.Module
    trained: bool
    file: Optional[str] = None

    @property
    def is_detector(self) -> bool:
        """Whether it is a detector instead of a segmenter."""
        return self.cfg.default_scope == "mmdet"


def open_model(
    args: argparse.Namespace,
    path: str,
    checkpoint: Optional[str] = None,
    file: Optional[str] = None,
) -> Model:
    """Build a model with its checkpoint's or random weights."""
    args.config = path
    cfg = open_config(args)
    weights = Checkpoint.load(checkpoint) if checkpoint else None
    if args.what == "parity" and not args.images:
        prepare_data(cfg, args, ("test_dataloader",), weights)
    torch.manual_seed(0)
    network = build_model(cfg).eval()
    if weights:
        weights.check_fits(network)
    return Model(Path(path).stem, cfg, network, weights is not None, file)


# ------------------------------------------------------------------------------------------- export


def export(model: Model, opset: int) -> tuple[Any, dict[str, Any]]:
    """Export a model, unless there is an earlier export.

    Returns:
        The exported model, and facts about it.
    """
    import onnx

    from mmvssm.export.detector import DetectorGraph
    from mmvssm.export.onnx_export import build_onnx
    from mmvssm.export.segmenter import SegmenterGraph

    started = time.perf_counter()
    if model.file:
        proto = onnx.load(model.file)
    else:
        kind = DetectorGraph if model.is_detector else SegmenterGraph
        proto = build_onnx(kind(model.network, model.cfg.model).eval(), {}, opset)
    seconds = time.perf_counter() - started
    onnx.checker.check_model(proto.SerializeToString(), full_check=True)
    layers = model.network.backbone.modules()
    facts = dict(
        model=model.name,
        opset=next(entry.version for entry in proto.opset_import if not entry.domain),
        seconds=None if model.file else seconds,
        bytes=proto.ByteSize(),
        nodes=len(proto.graph.node),
        nodes_in_functions={f"{f.name}:{f.overload}": len(f.node) for f in proto.functions},
        scans=sum(hasattr(layer, "A_log") for layer in layers),
        scan_nodes=sum(node.op_type == "SelectiveScan" for node in proto.graph.node),
    )
    return proto, facts


def run_export(args: argparse.Namespace) -> list[dict]:
    """Export each model and describe the file."""
    table = markdown_table(
        ["model", "seconds", "MB", "nodes", "scans", "nodes of scans", "checker"]
    )
    records = []
    for paths in args.model:
        _, facts = export(open_model(args, *paths), args.opset)
        records.append(facts)
        table.add_row(
            [
                facts["model"],
                f"{facts['seconds']:.1f}" if facts["seconds"] else "",
                f"{facts['bytes'] / 1e6:.1f}",
                *(facts[name] for name in ("nodes", "scans", "scan_nodes")),
                "passes",  # or there was an error
            ]
        )
        print(" | ".join(map(str, table.rows[-1])), flush=True)
    print(table)
    return records


# ------------------------------------------------------------------------------------------ running


def sessions_of(proto: Any, args: argparse.Namespace) -> dict[str, Callable[[Tensor], dict]]:
    """Return functions that map an image, uint8 RGB ``(3, H, W)``, to the file's predictions."""
    from mmvssm.export.onnx_model import open_session

    def runner(native: bool) -> Callable[[Tensor], dict]:
        session = open_session(proto, native, args.threads)
        names = [output.name for output in session.get_outputs()]

        def run(image: Tensor) -> dict[str, Tensor]:
            outputs = session.run(None, {"images": image[None].float().numpy()})
            return dict(zip(names, map(torch.from_numpy, outputs)))

        return run

    operators = OPERATORS[:1] if args.portable_only else OPERATORS
    return {name: runner(name == "native") for name in operators}


def as_loaded(model: Model, image: Tensor) -> dict[str, list]:
    """Return an image, uint8 RGB ``(3, H, W)``, as the library's pipeline would."""
    if model.is_detector:
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    size = tuple(image.shape[1:])
    meta = dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0), img_id=0)
    return dict(inputs=[image.flip(0)], data_samples=[Sample(metainfo=meta)])


@torch.no_grad()
def in_pytorch(model: Model, image: Tensor) -> dict[str, Tensor]:
    """Run the library's own inference on an image; name the outputs as exported files do."""
    with last_output(model.network.backbone) as seen:
        (sample,) = model.network.test_step(as_loaded(model, image))
    if model.is_detector:
        found = sample.pred_instances
        outputs = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
        if "masks" in found:
            outputs["masks"] = found.masks
    else:
        outputs = dict(logits=sample.seg_logits.data[None], labels=sample.pred_sem_seg.data)
    features = seen[0][-1] if isinstance(seen[0], (tuple, list)) else seen[0]
    if isinstance(features, PrunedTokens):
        kept = torch.zeros(1, features.grid[0] * features.grid[1], dtype=torch.bool)
        outputs["kept"] = kept.scatter(1, features.positions, True).unflatten(1, features.grid)
    return outputs


@contextmanager
def last_output(module: nn.Module) -> Iterator[list]:
    """Yield a list that collects a module's outputs inside the context."""
    seen: list = []
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        yield seen
    finally:
        handle.remove()


def pictures_of(model: Model, args: argparse.Namespace) -> list[str]:
    """List the image files on which we compare predictions."""
    if args.images:
        files = [str(Path(args.images, name)) for name in list_files(args.images)]
    else:
        dataset = DATASETS.build(model.cfg.test_dataloader.dataset)
        files = [dataset.get_data_info(i)["img_path"] for i in range(len(dataset))]
    if not files:
        raise UserError(f"there are no images in {args.images or 'the test set'}")
    return files[: args.max_images]


def read(path: str, size: Sequence[int]) -> Tensor:
    """Read and resize an image, uint8 RGB ``(3, H, W)``."""
    pixels = mmcv.imresize(mmcv.imread(path, channel_order="rgb"), tuple(size)[::-1])
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# ------------------------------------------------------------------------------------------- parity


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Compare two predictions for one image."""
    compared = _compare_maps if "logits" in expected else _compare_instances
    result = compared(found, expected)
    if "kept" in expected:
        result["tokens"] = int(expected["kept"].sum())
        result["other_tokens"] = int((found["kept"] & ~expected["kept"]).sum())
    return result


def _compare_maps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    return dict(
        labels=(found["labels"] == expected["labels"]).double().mean().item(),
        logits=(found["logits"] - expected["logits"]).abs().max().item(),
        scale=expected["logits"].abs().max().item(),
    )


def _compare_instances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    pairs = pair_up(found, expected)
    mine, theirs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    result: dict[str, Any] = dict(
        detections=(len(found["boxes"]), len(expected["boxes"])),
        paired=len(pairs),
        boxes=_largest(found["boxes"][mine] - expected["boxes"][theirs]),
        scores=_largest(found["scores"][mine] - expected["scores"][theirs]),
    )
    if "masks" in expected:
        a, b = found["masks"][mine], expected["masks"][theirs]
        both, either = ((a & b).sum((1, 2)), (a | b).sum((1, 2)))
        result["masks"] = torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()
        result["mask_pixels"] = either.tolist()
    return result


def _largest(differences: Tensor) -> float:
    return differences.abs().max().item() if differences.numel() else 0.0


def pair_up(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Match detections of the same label whose boxes overlap by more than half.

    Detections with almost equal scores may be in another order.

    Returns:
        Indices into ``found`` and ``expected``.
    """
    from mmdet.structures.bbox import bbox_overlaps

    overlaps = bbox_overlaps(expected["boxes"], found["boxes"])
    overlaps[expected["labels"][:, None] != found["labels"]] = 0
    pairs = []
    for theirs in range(len(overlaps)):
        overlap, mine = overlaps[theirs].max(0) if overlaps.shape[1] else (0.0, 0)
        if overlap > 0.5:
            pairs.append((int(mine), theirs))
            overlaps[:, mine] = 0
    return pairs


def is_same(result: dict[str, Any]) -> bool:
    """Whether two predictions count as the same."""
    if "logits" in result:
        return result["labels"] >= LABELS and result["logits"] <= LOGITS
    mine, theirs = result["detections"]
    return (
        mine == theirs == result["paired"]
        and result["boxes"] <= BOXES
        and result["scores"] <= SCORES
        and min(result.get("masks", [1.0]), default=1.0) > MASKS
    )


MAP_FIELDS = ["labels equal", "largest logit difference", "of the largest logit"]
INSTANCE_FIELDS = [
    *("detections", "not in both", "boxes (pixels)", "scores", "smallest mask IoU"),
    *("masks to 0.99",),
]


def _map_figures(results: list[dict]) -> list[str]:
    labels = sum(r["labels"] for r in results) / len(results)
    relative = max(r["logits"] / r["scale"] for r in results)
    return [f"{labels:.5%}", f"{max(r['logits'] for r in results):.1e}", f"{relative:.1e}"]


def _instance_figures(results: list[dict]) -> list[str]:
    unpaired = sum(sum(r["detections"]) - 2 * r["paired"] for r in results)
    masks = [iou for r in results for iou in r.get("masks", ())]
    return [
        str(sum(r["detections"][1] for r in results)),
        str(unpaired),
        f"{max(r['boxes'] for r in results):.1e}",
        f"{max(r['scores'] for r in results):.1e}",
        f"{min(masks):.4f}" if masks else "",
        str(sum(iou <= MASKS for iou in masks)),
    ]


def run_parity(args: argparse.Namespace) -> list[dict]:
    """Compare predictions image by image."""
    tables = {
        kind: markdown_table(
            ["model", "input", "operator", "images", "the same", *fields, "other tokens kept"]
        )
        for kind, fields in ((False, MAP_FIELDS), (True, INSTANCE_FIELDS))
    }
    records = []
    for paths in args.model:
        model = open_model(args, *paths)
        proto, facts = export(model, args.opset)
        files = pictures_of(model, args)
        sessions = sessions_of(proto, args)
        figures = _instance_figures if model.is_detector else _map_figures
        for size in args.size or PARITY_SIZES:
            results: dict[str, list] = {name: [] for name in sessions}
            for file in files:
                image = read(file, size)
                expected = in_pytorch(model, image)
                for name, run in sessions.items():
                    results[name].append(compare(run(image), expected))
            for name, found in results.items():
                others = [r for r in found if r.get("other_tokens")]
                table = tables[model.is_detector]
                start = [model.name, "x".join(map(str, size)), name]
                rows = [(found, f"{len(others)} images" if "tokens" in found[0] else "")]
                if others and len(others) < len(found):
                    rows.append(([r for r in found if not r["other_tokens"]], "without these"))
                for some, said in rows:
                    counts = [len(some), sum(map(is_same, some))]
                    table.add_row([*start, *counts, *figures(some), said])
                print(" | ".join(map(str, table.rows[-len(rows)])), flush=True)
                records.append(
                    dict(model=model.name, size=list(size), operator=name, images=found, file=facts)
                )
    for table in tables.values():
        if table.rows:
            print(table)
    return records


# -------------------------------------------------------------------------------------------- speed


def noise(size: Sequence[int]) -> Tensor:
    """Make a fixed image of coarse shapes and noise, uint8 ``(3, H, W)``."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 9, generator=generator) * 200
    smooth = F.interpolate(coarse, tuple(size), mode="bilinear")[0]
    return (smooth + torch.rand(3, *size, generator=generator) * 55).to(torch.uint8)


@torch.no_grad()
def let_it_find(model: Model, images: Sequence[Tensor]) -> None:
    """Lower the score threshold of random weights until each image has the most objects allowed."""
    settings = (model.network.test_cfg.rcnn, model.network.roi_head.test_cfg)
    most, lowest = settings[0].max_per_img, 1.0
    for image in images:
        for candidates in (most * 2**i for i in range(1, 8)):
            with last_output(model.network.roi_head.bbox_head) as seen:
                model.network.test_step(as_loaded(model, image))
            scores = seen[0][0].softmax(-1)[:, :-1].flatten().sort(descending=True).values
            for each in settings:
                each.score_thr = scores[min(candidates, len(scores) - 1)].item()
            if len(in_pytorch(model, image)["boxes"]) == most:
                break
        lowest = min(lowest, settings[0].score_thr)
    for each in settings:
        each.score_thr = lowest


def eager_run(model: Model, image: Tensor) -> Callable[[], Any]:
    """Return inference in PyTorch with the same post-processing as exported files."""
    data = as_loaded(model, image)
    if model.is_detector:
        return lambda: model.network.test_step(data)
    meta = [sample.metainfo for sample in data["data_samples"]]

    def segment() -> Tensor:
        # mmseg's test_step would interpolate the logits a second time, to the same size.
        x = model.network.data_preprocessor(data, False)["inputs"]
        logits = model.network.encode_decode(x, [dict(m, pad_shape=x.shape[2:]) for m in meta])
        return logits.argmax(1)

    return segment


@torch.no_grad()
def run_speed(args: argparse.Namespace) -> list[dict]:
    """Time PyTorch and onnxruntime in turn."""
    operators = OPERATORS[:1] if args.portable_only else OPERATORS
    table = markdown_table(
        ["model", "input", "detections", "PyTorch (ms)"]
        + [f"{name} (ms)" for name in operators]
        + [f"{name}, of PyTorch's time" for name in operators]
    )
    records = []
    sizes = args.size or SPEED_SIZES
    for paths in args.model:
        model = open_model(args, *paths)
        if args.images:
            images = [read(pictures_of(model, args)[0], size) for size in sizes]
        else:
            images = [noise(size) for size in sizes]
        if model.is_detector and not model.trained:
            let_it_find(model, images)
        proto, facts = export(model, args.opset)
        sessions = sessions_of(proto, args)
        del proto
        for size, image in zip(sizes, images):
            counts = dict(
                PyTorch=in_pytorch(model, image), **{n: f(image) for n, f in sessions.items()}
            )
            counts = {name: len(found.get("boxes", ())) for name, found in counts.items()}
            runs = dict(PyTorch=eager_run(model, image))
            runs |= {name: partial(run, image) for name, run in sessions.items()}
            # Idle threads of each spin for a while and would slow down the others.
            times = time_side_by_side(
                runs, "cpu", seconds=0.0, min_runs=args.runs, setup=lambda: time.sleep(0.1)
            )
            best = {name: min(seconds) for name, seconds in times.items()}
            middle = {name: statistics.median(seconds) for name, seconds in times.items()}
            records.append(
                dict(model=model.name, size=list(size), trained=model.trained, detections=counts,
                     seconds=times, fastest=best, median=middle, file=facts)
            )  # fmt: skip
            ratios = [f"{best[name] / best['PyTorch']:.2f}" for name in sessions]
            detections = "/".join(map(str, dict.fromkeys(counts.values())))
            row = [model.name, "x".join(map(str, size)), detections if model.is_detector else ""]
            row += [f"{best[name] * 1e3:.0f} ({middle[name] * 1e3:.0f})" for name in best]
            table.add_row(row + ratios)
            print(" | ".join(map(str, table.rows[-1])), flush=True)
    print(f"\nThe fastest of {args.runs} alternating runs each, their median in brackets:")
    print(table)
    return records


def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    machine = about("cpu", args.default_malloc)
    import onnxruntime

    machine["onnxruntime"] = onnxruntime.__version__
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    run = dict(export=run_export, parity=run_parity, speed=run_speed)[args.what]
    write_json(args.out, dict(machine, records=run(args)))


if __name__ == "__main__":
    run_tool(main)
