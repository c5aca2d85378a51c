"""Published weights by name: ``mmvssm://NAME`` wherever a checkpoint may be named.

A file is looked for in the folder, or at the address, that the environment variable ``MMVSSM_WEIGHTS`` names, then in
the cache of ``torch.hub``, and downloaded into that cache otherwise. We host no weights: addresses are the authors'.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from ..errors import UserError
from ..files import write_whole
from ..safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely
from .backbones.base import PRETRAINED
from .backbones.common import WRAPPINGS
from .published import convert_whole, inert_globals, unwrap
from .weights_table import PublishedModel, find_model

SCHEME = "mmvssm://"
VARIABLE = "MMVSSM_WEIGHTS"


def locate(name: str) -> Path:
    """The file of a published model, downloaded if it is nowhere on this machine.

    The SHA-256 of a download is recorded beside it, and compared whenever the file is used.

    Raises:
        UserError: If there is no such model, if its file can neither be found nor downloaded, or if it has changed.
    """
    model = find_model(name)
    place, file = os.environ.get(VARIABLE, ""), f"{name}.pth"
    address = model.address
    if "://" in place:
        address = f"{place.rstrip('/')}/{file}"
    elif place:
        path = Path(place).expanduser() / file
        if path.is_file():
            return path
    path = Path(torch.hub.get_dir()) / "mmvssm" / file
    record = path.with_suffix(".sha256")
    if not path.is_file():
        if model.on_page and address == model.address:
            raise UserError(
                f"the weights of {name} cannot be downloaded by a program: {address} links their file; {_by_hand(path)}"
            )
        _download(model, address, path)
        write_whole(record, _sha256(path) + "\n")
    elif record.is_file() and record.read_text().strip() != _sha256(path):
        raise UserError(
            f"{path} is not the file that was downloaded (its SHA-256 differs from the one in {record}); remove both "
            "to download it again"
        )
    return path


def _download(model: PublishedModel, address: str, path: Path) -> None:
    """Download a file that takes its name when it is known to be whole and to hold nothing but weights."""
    print_log(f"Downloading {address} (licence of the weights: {model.licence})", "current")
    partial = path.with_suffix(f".{os.getpid()}.download")  # of several processes each has its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(partial))
        with inert_globals():
            load_checkpoint_safely(partial)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # urllib's are OSErrors, and so is a timeout
        why = str(error).replace(str(partial), "what came")
        raise UserError(
            f"cannot download {model.name} from {address} ({why}); {_by_hand(path)}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _by_hand(path: Path) -> str:
    return (
        f"download the file by hand and put it at {path}, or as {path.name} into the folder that the environment "
        f"variable {VARIABLE} names; or train from random weights with --from-scratch (init_cfg=None)"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_published(
    name: str, key: Optional[str] = None, map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a published model's weights under our names.

    Args:
        name: One of :func:`list_models`.
        key: Where in the file the weights are, such as ``"model"``; by default averaged (EMA) weights where there are
            any.
        map_location: As for :func:`torch.load`.

    Returns:
        A checkpoint: ``state_dict`` and ``meta``.

    Raises:
        UserError: If they cannot be found, downloaded or read.
    """
    path = locate(name)
    try:
        with inert_globals():
            checkpoint = load_checkpoint_safely(path, map_location)
        converted = convert_checkpoint(checkpoint, str(path), key)
    except (UnsafeCheckpointError, ValueError) as error:
        raise UserError(str(error)) from error
    if converted is None:
        raise UserError(f"{path} does not hold the weights of a published model, as {name} should")
    return converted


def with_published(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that loads checkpoint files load published ones under our names.

    The training settings beside their weights are read as inert stand-ins, and dropped. A file of anything else is
    loaded, or refused, as before.

    Args:
        load: Takes the file as its first argument, and raises ``UnsafeCheckpointError`` or
            :class:`pickle.UnpicklingError` if the file holds objects.
    """

    @functools.wraps(load)  # mmengine logs its name
    def load_and_convert(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = load(path, *args, **kwargs)
        except (UnsafeCheckpointError, pickle.UnpicklingError):
            with inert_globals():
                checkpoint = _convert_if_published(load(path, *args, **kwargs), path)
            if checkpoint is None:
                raise
            return checkpoint
        converted = _convert_if_published(checkpoint, path)
        return checkpoint if converted is None else converted

    return load_and_convert


def _convert_if_published(checkpoint: Any, path: Any) -> Optional[dict[str, Any]]:
    if not isinstance(checkpoint, Mapping):
        return None
    try:
        return convert_checkpoint(checkpoint, str(path))
    except ValueError as error:  # perhaps another project's, which calls some layers the same
        print_log(f"{path} is left under its own names: {error}", "current", logging.WARNING)
        return None


def convert_checkpoint(
    checkpoint: Mapping[str, Any], path: str, key: Optional[str] = None
) -> Optional[dict[str, Any]]:
    """Convert what a checkpoint file holds, if that is a published model.

    Args:
        checkpoint: Weights by name, or such a mapping under a key of :data:`.WRAPPINGS`.
        path: Its file, for the log.
        key: Under which key to look instead.

    Returns:
        ``state_dict`` under our names, with ``backbone.`` before the backbone's, and ``meta``; None if the weights are
        of no published model.

    Raises:
        ValueError: If ``key`` is given and holds no weights, or if weights with a published model's names are not its.
    """
    keys = [k for k in WRAPPINGS if isinstance(checkpoint.get(k), Mapping)]
    try:
        weights = unwrap(checkpoint, key)
    except ValueError:
        if key is not None:
            raise
        return None
    conversion = convert_whole(weights)
    if conversion is None:
        return None
    if len(keys) > 1:
        print_log(
            f"{path} holds weights under {', '.join(keys)}; taken: {key or keys[0]}", "current"
        )
    if conversion.unused:
        print_log(f"{path}: used nowhere: {', '.join(conversion.unused)}", "current")
    meta = {"arch": conversion.arch, "published": path, **_classes_of(checkpoint)}
    return {"state_dict": conversion.state_dict, "meta": meta}


def _classes_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a detector or segmenter, where mmdet 3 and mmseg 1 look for them; 2 and 0 wrote ``CLASSES``."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    if isinstance(meta.get("dataset_meta"), dict):
        return {"dataset_meta": meta["dataset_meta"]}
    names = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}
    found = {name: value for name, value in names.items() if isinstance(value, (list, tuple))}
    return {"dataset_meta": found} if "classes" in found else {}


def drop_pretrained(part: Any) -> Iterator[str]:
    """Let a model start at random: an ``init_cfg`` that names a checkpoint becomes None, as does ``pretrained``.

    Args:
        part: A model's config, or a part of it, changed in place.

    Yields:
        What would have been loaded.
    """
    if isinstance(part, dict):
        if isinstance(part.get("pretrained"), str):
            yield part["pretrained"]
            part["pretrained"] = None
        init_cfg = part.get("init_cfg")
        if isinstance(init_cfg, dict) and init_cfg.get("type") in PRETRAINED:
            yield str(init_cfg.get("checkpoint"))
            part["init_cfg"] = None
    for value in part.values() if isinstance(part, dict) else part:
        if isinstance(value, (dict, list, tuple)):
            yield from drop_pretrained(value)


def _load_by_name(filename: str, map_location: Any = "cpu") -> dict[str, Any]:
    """What mmengine calls for ``mmvssm://NAME``, or ``mmvssm://NAME#KEY`` with the key of the weights to take."""
    name, _, key = filename.removeprefix(SCHEME).partition("#")
    return load_published(name, key or None, map_location)


_load_by_name.loads_weights_only = True  # type: ignore[attr-defined]


def register_scheme() -> None:
    """Let mmengine load ``mmvssm://NAME``. Idempotent; other addresses are loaded as before."""
    CheckpointLoader.register_scheme(SCHEME, _load_by_name, force=True)
