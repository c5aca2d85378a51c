"""Convert label maps of colours, or of 0 and 255, once, to maps of class numbers, which mmseg reads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from ..errors import UserError, brief, shown
from ..files import write_whole
from .formats import draw_validation, lines_of, made_from
from .images import refuse_unreadable
from .layouts import Layout, list_files, only_suffix
from .memory import Memory
from .pictures import map_files, read_label_maps

CONVERTED = "converted"  # the key of a layout whose maps we wrote
_TABLES = ("class_dict*.csv", "label_colors*.txt", "labelmap*.txt")
_ROWS = (  # name,r,g,b with perhaps more after a colon, and r g b name
    re.compile(r"(?P<name>.*\S)\s*[,:]\s*(?P<rgb>\d+\s*,\s*\d+\s*,\s*\d+)\s*(:.*)?"),
    re.compile(r"(?P<rgb>\d+\s+\d+\s+\d+)\s+(?P<name>\S.*)"),
)
_MOST_COLOURS = 64  # in maps without a table; more come from smoothing or compression
_MOST_BLURRED = 0.1  # share of pixels between 0 and 255 in a mask saved as JPEG
_NOT_A_CLASS = {"void", "unlabelled", "unlabeled", "ignore"}  # names in tables, in any case
_IGNORED = 255  # mmseg's ignore_index
_BLACK, _WHITE = 0, 0xFFFFFF
_BINARY = {_BLACK: "background", _WHITE: "foreground"}


def prepare_maps(
    root: str, layout: Layout, classes: Optional[Sequence[str]], work_dir: str, opens: bool
) -> Layout:
    """Return a layout with label maps of class numbers, and with a list of images for each split that was drawn.

    Args:
        root: The data set's folder.
        layout: What was recognised in it.
        classes: The class names, if they are known.
        work_dir: The run's work dir, in which we write.
        opens: Whether to look into all maps, or only into the first ones, for what they hold.

    Raises:
        UserError: If a map cannot be read, or its colours do not fit the classes.
    """
    stems, maps = {}, []
    for split, folder in layout.images.items():
        labels = os.path.join(root, layout.labels[split])
        suffix, end = only_suffix(os.path.join(root, folder)), layout.tail + only_suffix(labels)
        stems[split] = [n[: -len(suffix)] for n in list_files(os.path.join(root, folder))]
        # The check of the data names maps that are missing.
        pairs = [(os.path.join(labels, s + end), f"{split}/{s}.png") for s in stems[split]]
        maps.append([pair for pair in pairs if os.path.isfile(pair[0])])
    every, drawn = [source for part in maps for source, _ in part], "val" not in stems
    tables = [str(path) for pattern in _TABLES for path in sorted(Path(root).glob(pattern))]
    colours = _read_table(tables[0]) if tables else {}
    kind = _kind_of([part[0][0] for part in maps if part], ({0}, {255}, {0, 255}))
    if kind == "0 and 255" and opens:
        kind = _kind_of(every, ({0, 255},))
    if kind == "0 and 255":
        colours = _BINARY
    if not (kind or drawn):
        return replace(layout, classes=list(colours.values()))

    def make(folder: Path) -> dict[str, Any]:
        about = {"note": "", "classes": list(colours.values())}
        if drawn:
            chosen, about["note"] = draw_validation(stems["train"])
            for split, is_drawn in (("train", False), ("val", True)):
                lines = [stem for stem in stems["train"] if (stem in chosen) is is_drawn]
                write_whole(folder / f"{split}.txt", "\n".join(lines))
        if kind:
            known = colours or _count_colours(every)
            ignored = [name for name in known.values() if name.casefold() in _NOT_A_CLASS]
            names = [name for name in known.values() if name not in ignored]
            labels = {c: _IGNORED if n in ignored else names.index(n) for c, n in known.items()}
            jobs = [(source, str(folder / target)) for part in maps for source, target in part]
            _for_each(partial(_write_map, labels=labels), jobs)
            about["note"] += f"; {kind} became class numbers"
            about["note"] += f", pixels of {shown(ignored)} are ignored" if ignored else ""
            about["classes"] = names
        return about

    images = list_files(os.path.join(root, layout.images["train"])) if drawn else []
    sources = [os.path.join(root, layout.images["train"], name) for name in images]
    folder, about = made_from(root, work_dir, [*every, *tables, *sources], make)
    layout = replace(layout, classes=about["classes"], note=f"{about['note']}; files in {folder}")
    if kind:
        given = list(classes or layout.classes)
        _compare_names(root, layout.classes, given, is_fixed=bool(tables) and kind == "colours")
        labels = {split: str(folder / split) for split in layout.labels}
        layout = replace(layout, key=CONVERTED, classes=given, labels=labels, tail="")
    if drawn:
        splits = ("train", "val")
        layout = replace(
            layout,
            images=dict.fromkeys(splits, layout.images["train"]),
            labels=dict.fromkeys(splits, layout.labels["train"]),
            lists={split: str(folder / f"{split}.txt") for split in splits},
        )
    return layout


def _kind_of(paths: Sequence[str], binary: Sequence[set[int]]) -> str:
    """Return what maps hold if it is not class numbers: colours, or one of some sets of two values."""
    pictures = read_label_maps(paths, Memory())
    refuse_unreadable(paths, pictures, "label maps")
    modes = {picture.mode for picture in pictures}
    labels = {label for picture in pictures for label in picture.labels}
    if {picture.format for picture in pictures} == {"JPEG"} and (not labels or max(labels) > 250):
        return "0 and 255"  # it blurs all other values
    if modes and modes <= {"RGB", "RGBA"}:
        return "colours"
    return "0 and 255" if modes == {"L"} and labels in binary else ""


def _compare_names(root: str, found: Sequence[str], given: Sequence[str], is_fixed: bool) -> None:
    """Compare the classes of the colours with those given, which may rename counted colours."""
    unknown = any(name.startswith("#") and name not in found for name in given)
    if len(found) != len(given) or unknown or (is_fixed and list(found) != list(given)):
        raise UserError(
            f"the label maps of {root} have {len(found)} classes ({shown(found)}), and {len(given)} are expected "
            f"({shown(given)}); give --classes one name for each, in that order"
        )


def _read_table(path: str) -> dict[int, str]:
    """Return the classes of colours, in the order of their table."""
    table: dict[int, str] = {}
    for place, line in lines_of(path):
        row = next(filter(None, (pattern.fullmatch(line) for pattern in _ROWS)), None)
        if row is None and (line.startswith("#") or not table):
            continue  # a heading
        rgb = [int(number) for number in re.findall(r"\d+", row["rgb"])] if row else [256]
        name = row["name"].strip('" ') if row else ""
        if max(rgb) > 255 or name in table.values() or _code(np.array(rgb)) in table:
            raise UserError(
                f"{place}: {brief(line)} is not a new class and its new colour, of numbers up to 255"
            )
        table[int(_code(np.array(rgb)))] = name
    return table


def _code(rgb: np.ndarray) -> np.ndarray:
    """Return one number for each colour ``(..., 3)``."""
    return rgb.astype(np.int64) @ (1 << 16, 1 << 8, 1)


def _codes_in(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        if picture.mode not in ("RGB", "RGBA", "L"):
            raise ValueError(f"a {picture.mode} picture among others")
        if picture.format != "JPEG":
            return _code(np.asarray(picture.convert("RGB")))
        grey = np.asarray(picture.convert("L"))
    if np.mean((grey > 64) & (grey < 191)) > _MOST_BLURRED:
        raise ValueError("a JPEG file, which blurs all values but 0 and 255; save PNG")
    return np.where(grey < 128, _BLACK, _WHITE)


def _colours_in(path: str) -> list[int]:
    found = np.unique(_codes_in(path)).tolist()
    if len(found) > _MOST_COLOURS:
        raise ValueError(
            f"{len(found)} colours, too many to be classes: is it smoothed, or a JPEG file?"
        )
    return found


def _count_colours(paths: Sequence[str]) -> dict[int, str]:
    """Name every colour in some maps; black is the background and comes first."""
    found = set().union(*_for_each(_colours_in, paths))
    if found == set(_BINARY):
        return _BINARY
    if len(found) > _MOST_COLOURS:
        raise UserError(
            f"the label maps beside {paths[0]} have {len(found)} colours; give a table of them, a "
            "class_dict.csv with lines name,r,g,b"
        )
    return {code: "background" if code == _BLACK else f"#{code:06x}" for code in sorted(found)}


def _write_map(job: tuple[str, str], labels: dict[int, int]) -> None:
    """Write the labels of the colours of a map to a file."""
    source, target = job
    codes, known = _codes_in(source), np.array(sorted(labels))
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    strange = codes[known[places] != codes]
    if strange.size:
        raise ValueError(f"the colour {strange[0]:#08x}, of no class")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    of_places = np.array([labels[code] for code in known.tolist()], np.uint8)
    Image.fromarray(of_places[places]).save(target)


def _for_each(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """Apply a function to maps, in several processes if there are many; raise a UserError for the first it fails on."""
    found = []
    for result, problem in map_files(partial(_attempt, function), jobs, "label maps"):
        if problem:
            raise UserError(problem)
        found.append(result)
    return found


def _attempt(function: Callable[[Any], Any], job: Any) -> tuple[Any, str]:
    try:
        return function(job), ""
    except (OSError, SyntaxError, ValueError) as error:  # those of Pillow, and ours
        path = job if isinstance(job, str) else job[0]
        return None, f"{path} cannot be made a map of class numbers: {error}"
