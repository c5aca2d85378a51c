"""Build a folder with the web page and exported models, and serve it to browsers on this machine."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union
from urllib.parse import quote, unquote

from mmengine.config import Config
from page_server import PageServer

import mmvssm
from mmvssm.datasets.walk import leaf_datasets
from mmvssm.errors import UserError, add_traceback_option, user_mistakes
from mmvssm.files import read_json, write_whole
from mmvssm.registry import TASK_UTILS
from mmvssm.run.arguments import add_cfg_options, export_onnx_parser
from mmvssm.run.checkpoints import is_checkpoint, named_checkpoint, read_config
from mmvssm.run.export_onnx import export_onnx
from mmvssm.run.setup import print_once

RUNTIME = "onnxruntime-web"
"""The folder beside the page that tools/install/onnxruntime_web.py fills."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # what every browser shows
_PAGE = (".html", ".css", ".js", ".svg")
_LARGEST_PICTURE = 10e6  # bytes of an example
_EXAMPLES = 6
_METHODS = {"UPerHead": "UperNet", "MaskRCNN": "Mask R-CNN", "FasterRCNN": "Faster R-CNN"}


class Trained(NamedTuple):
    """A trained model that the page shows.

    Attributes:
        config: The config file.
        checkpoint: The checkpoint file.
    """

    config: Path
    checkpoint: Path

    @property
    def name(self) -> str:
        """Name of its files, without a suffix."""
        return self.config.stem


def web_parser() -> argparse.ArgumentParser:
    """Return the argument parser of ``tools/web.py``."""
    parser = argparse.ArgumentParser(
        description="Build the web page with models in it, and serve it to browsers on this machine."
    )
    parser.add_argument(
        "config",
        nargs="?",
        help="config file, or a checkpoint that tools/train.py wrote (.pth); default: those of the demo models",
    )
    parser.add_argument("checkpoint", nargs="?", help="checkpoint file")
    parser.add_argument(
        "--work-dirs",
        default="work_dirs",
        metavar="DIR",
        help="folder of the demo models' work dirs, as `make train` writes them (default: work_dirs)",
    )
    parser.add_argument(
        "--out",
        default="build/web",
        metavar="DIR",
        help="write the page to DIR/site (default: build/web)",
    )
    parser.add_argument(
        "--port", type=int, default=8080, help="port of the server; 0: any free one (default: 8080)"
    )
    parser.add_argument(
        "--build-only", action="store_true", help="build the page and do not serve it"
    )
    add_cfg_options(parser)
    add_traceback_option(parser)
    return parser


def web(args: argparse.Namespace, page: Path) -> None:
    """Build the page with its models, and serve it until Ctrl-C.

    Args:
        args: Parsed by :func:`web_parser`.
        page: The folder with the page's source files.

    Raises:
        UserError: If there is no model to show, an export fails, or the port is in use.
    """
    site = Path(args.out) / "site"
    models = _models_to_show(args)
    if not (site / RUNTIME).is_dir():
        raise UserError(
            f"{site / RUNTIME} does not exist; fetch it with `make web` or "
            f"python tools/install/onnxruntime_web.py {site / RUNTIME}"
        )
    if args.build_only:
        build_site(site, page, models, args.cfg_options)
        print_once(f"The page: {site} (any web server can show it)")
        return
    with PageServer(site, args.port) as server:  # first, as a port in use would waste the build
        build_site(site, page, models, args.cfg_options)
        print_once(f"The page: {server.address} (Ctrl-C ends the server)")
        server.serve()


def _models_to_show(args: argparse.Namespace) -> list[Trained]:
    if args.config and (args.checkpoint or is_checkpoint(args.config)):
        return [Trained(Path(args.config), Path(args.checkpoint or args.config))]
    if args.config:
        raise UserError("give both a config and a checkpoint, or neither for the demo models")
    folders = sorted(Path(args.work_dirs).glob("*_shapes"))
    found = [Trained(folder / f"{folder.name}.py", _checkpoint_of(folder)) for folder in folders]
    found = [model for model in found if model.checkpoint and model.config.is_file()]
    if not found:
        raise UserError(
            f"no demo model was trained in {args.work_dirs} yet; train one with `make train-seg`, or name a config "
            "and a checkpoint of your own"
        )
    return found


def _checkpoint_of(folder: Path) -> Optional[Path]:
    """Return the newest best checkpoint of a work dir, else its last checkpoint, else None."""
    best = max(folder.glob("best_*.pth"), key=lambda path: path.stat().st_mtime, default=None)
    return best or named_checkpoint(folder)


def build_site(
    site: Path, page: Path, models: Sequence[Trained], cfg_options: Optional[dict[str, Any]] = None
) -> None:
    """Write the page, its models and example pictures to a folder; models that are up to date stay.

    Args:
        site: The folder to write.
        page: The folder with the page's source files.
        models: The models, in the order of the page's list.
        cfg_options: Changes to the models' configs.

    Raises:
        UserError: If a model cannot be exported or a file cannot be written.
    """
    listed, before = [], _listed_before(site)
    with user_mistakes(f"cannot write to {site}", (OSError,)):
        for folder in ("models", "examples"):
            (site / folder).mkdir(parents=True, exist_ok=True)
    for model in models:
        cfg = read_config(str(model.config), import_custom_modules=False)
        with user_mistakes("cannot apply --cfg-options"):
            cfg.merge_from_dict(cfg_options or {})
        if cfg.get("default_scope") == "mmpretrain":
            raise UserError(f"{model.config}: the page shows detectors and segmenters only")
        _export(model, cfg, site, cfg_options)
        listed.append(
            {
                "title": _title(cfg),
                "file": quote(f"models/{model.name}.onnx"),
                "examples": _copy_examples(cfg, site),
            }
        )
    unwanted = before - _files_of(listed)
    for path in (*site.glob("models/*"), *site.glob("examples/*")):
        if path.relative_to(site).as_posix() in unwanted:
            path.unlink()
    titles = Counter(entry["title"] for entry in listed)
    for entry, model in zip(listed, models):
        if titles[entry["title"]] > 1:
            entry["title"] += f" ({model.name})"
    for path in page.iterdir():
        if path.suffix in _PAGE:
            _write(site / path.name, path.read_bytes())
    _write(site / "models.json", json.dumps(listed, indent=1))


def _files_of(listed: Any) -> set[str]:
    return {unquote(name) for entry in listed for name in (entry["file"], *entry["examples"])}


def _listed_before(site: Path) -> set[str]:
    """Return the files that an earlier build wrote; others in the folders are not ours."""
    try:
        return _files_of(read_json(site / "models.json", list))
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _export(model: Trained, cfg: Config, site: Path, cfg_options: Optional[dict[str, Any]]) -> None:
    """Export a model, unless the file was exported from the same weights, config and code."""
    out = site / "models" / f"{model.name}.onnx"
    stamp = site.parent / f"{model.name}.sha256"
    with user_mistakes(f"cannot read the checkpoint {model.checkpoint}", (OSError,)):
        fingerprint = _fingerprint(model, cfg)
    if out.is_file() and stamp.is_file() and stamp.read_text() == fingerprint:
        print_once(f"{out}: up to date")
        return
    print_once(f"Exporting {model.checkpoint}")
    args = export_onnx_parser().parse_args([str(model.config), str(model.checkpoint), str(out)])
    args.cfg_options = cfg_options
    export_onnx(args)
    _write(stamp, fingerprint)


def _write(path: Path, content: Union[str, bytes]) -> None:
    with user_mistakes(f"cannot write {path}", (OSError,)):
        write_whole(path, content)


def _fingerprint(model: Trained, cfg: Config) -> str:
    """Return a hash of all that an exported file depends on: weights, config and code."""
    weights = model.checkpoint.stat()
    given = [cfg.to_dict(), str(model.checkpoint.resolve()), weights.st_size, weights.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode())
    for path in package_sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def package_sources() -> list[Path]:
    """Return the Python files of the package, in a fixed order."""
    return sorted(Path(mmvssm.__file__).parent.rglob("*.py"))


def _title(cfg: Config) -> str:
    """Return a model's name in the page, such as "UperNet on PlainMamba, pruned"."""
    head = cfg.model.get("decode_head")
    method = head.type if isinstance(head, dict) else cfg.model.type
    method, backbone = (x.split(".")[-1] for x in (method, cfg.model.backbone.type))
    pruned = ", pruned" if cfg.model.backbone.get("pruning") else ""
    return f"{_METHODS.get(method, method)} on {backbone}{pruned}"


def _copy_examples(cfg: Config, site: Path) -> list[str]:
    """Copy a few pictures of the config's test data, if they exist, and return their names."""
    if cfg.get("prepare_data"):
        with user_mistakes("cannot prepare the data set"):
            TASK_UTILS.build(cfg.prepare_data).ensure()
    dataset = next(leaf_datasets(cfg.test_dataloader.dataset))
    prefix = dataset.get("data_prefix") or {}
    source = Path(dataset.get("data_root") or "", prefix.get("img") or prefix.get("img_path") or "")
    # A checkpoint's own config names no data, and not the working directory.
    pictures = _pictures_in(source) if source.is_dir() and source != Path() else []
    if not pictures:
        print_once(f"No example pictures: {source} has none that browsers can show")
    names = []
    for path in pictures:
        content = path.read_bytes()
        # So models of one data set share a picture, and an address takes the name as it is.
        digest = hashlib.sha256(content).hexdigest()[:16]
        names.append(f"examples/{digest}{path.suffix.lower()}")
        _write(site / names[-1], content)
    return names


def _pictures_in(folder: Path) -> list[Path]:
    """Return a few pictures of a folder, evenly spread over their sorted names."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _PICTURES]
    found = [path for path in found if path.stat().st_size <= _LARGEST_PICTURE]
    return found[:: max(1, len(found) // _EXAMPLES)][:_EXAMPLES]
