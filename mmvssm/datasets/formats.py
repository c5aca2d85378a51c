"""Convert Pascal VOC, YOLO and Roboflow's COCO, once, to COCO's JSON files as mmdet reads them.

All that we convert lies in ``<work_dir>/data``, in a folder for each state of the files that it was made from. We write
nothing into the data set's own folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

import cv2
import numpy as np
import yaml

from ..errors import UserError, brief, shown
from ..files import signature, write_whole
from .annotations import read_coco
from .images import loaded_size
from .layouts import ABOUT, ROBOFLOW, VOC_FOLDERS, Layout, list_files
from .memory import Memory
from .pictures import Loading, read_images

_VERSION = 1  # raise it when what we write changes
_SEED = 0
_SLACK = 0.01  # by which YOLO's coordinates may leave the image, as a share of it


def draw_validation(names: Sequence[str]) -> tuple[set[str], str]:
    """Draw a fifth of some names, always the same ones, and describe that."""
    count = max(len(names) // 5, 1)
    drawn = np.random.RandomState(_SEED).permutation(sorted(names))[:count].tolist()
    return set(
        drawn
    ), f"; no split to validate on, so {count} of {len(names)} images drawn (seed {_SEED})"


def made_from(
    root: str, work_dir: str, sources: Sequence[str], make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of what was made from some files, and make it unless it exists.

    Args:
        root: The data set's folder.
        work_dir: The run's work dir.
        sources: The files; if one changes, another folder is made.
        make: Fills an empty folder, which gets its name when it is complete, and describes it.

    Returns:
        The folder, and what ``make`` returned.

    Raises:
        UserError: If the folder cannot be written.
    """
    root = os.path.abspath(root)
    files = [(path, signature(path)) for path in sorted(set(sources)) if os.path.isfile(path)]
    state = json.dumps([_VERSION, root, files]).encode()
    name = f"{os.path.basename(root)}_{hashlib.sha256(state).hexdigest()[:12]}"
    folder = Path(work_dir, "data", name).absolute()
    unfinished = folder.with_name(f".{name}.{os.getpid()}")
    ours = [path for path in (folder.parent, Path(work_dir)) if not path.exists()]
    try:
        if not folder.is_dir():
            unfinished.mkdir(parents=True)
            write_whole(unfinished / ABOUT, json.dumps(make(unfinished)))
            unfinished.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another run may have been faster
            raise UserError(f"cannot write the converted data set to {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # of folders that are not empty
            for path in ours:
                path.rmdir()
    return folder, json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def prepare_instances(root: str, layout: Layout, work_dir: str) -> Layout:
    """Return a layout with a file in COCO's format for each split.

    Raises:
        UserError: If a file cannot be read or a label is wrong, with its place.
    """
    converter = {"voc": _read_voc, "yolo": _read_yolo}.get(layout.key)
    is_roboflow = any(label.endswith(ROBOFLOW) for label in layout.labels.values())
    drawn = "val" not in layout.labels
    if not (converter or is_roboflow or drawn):
        return layout
    parts: Sequence[str] = list(layout.labels.values())
    if converter:
        tops = {part.split("/")[0] for part in (*parts, *layout.images.values())}
        tops.update(label for _, label in VOC_FOLDERS)
        parts = [n for n in os.listdir(root) if n in tops or n.endswith((".yaml", ".yml"))]

    def make(folder: Path) -> dict[str, Any]:
        contents = (converter or _read_coco)(root, layout)
        note = ""
        if is_roboflow:
            _tidy_roboflow(contents)
        if drawn:
            contents, note = _draw(contents["train"])
        for split, content in contents.items():
            write_whole(folder / f"{split}.json", json.dumps(content))
        return {"note": note}

    sources = [path for part in parts for path in _files_below(os.path.join(root, part))]
    folder, about = made_from(root, work_dir, sources, make)
    labels = {split: str(folder / f"{split}.json") for split in (*layout.labels, *["val"] * drawn)}
    images = {s: "" if converter else layout.images.get(s, layout.images["train"]) for s in labels}
    return replace(layout, images=images, labels=labels, note=f"{about['note']}; files in {folder}")


def _files_below(path: str) -> list[str]:
    walk = os.walk(path, followlinks=True)
    return [os.path.join(f, name) for f, _, names in walk for name in names] or [path]


def _read_coco(root: str, layout: Layout) -> dict[str, dict]:
    return {s: read_coco(os.path.join(root, label)) for s, label in layout.labels.items()}


def _tidy_roboflow(contents: dict[str, dict]) -> None:
    """Drop the category that only groups the others; number annotations from 1, as pycocotools needs."""
    used = {str(a.get("category_id")) for c in contents.values() for a in c["annotations"]}
    for content in contents.values():
        groups = {str(category.get("supercategory")) for category in content["categories"]}
        content["categories"] = [
            category
            for category in content["categories"]
            if str(category.get("id")) in used or str(category.get("name")) not in groups
        ]
        for number, annotation in enumerate(content["annotations"], start=1):
            annotation["id"] = number


def _draw(content: dict[str, list]) -> tuple[dict[str, dict], str]:
    """Split the content of an annotation file in two."""
    chosen, note = draw_validation([str(image.get("file_name")) for image in content["images"]])
    ids = {str(i.get("id")) for i in content["images"] if str(i.get("file_name")) in chosen}
    parts = {}
    for split, is_drawn in (("train", False), ("val", True)):
        parts[split] = dict(content)
        for key, field in (("images", "id"), ("annotations", "image_id")):
            records = [r for r in content[key] if (str(r.get(field)) in ids) is is_drawn]
            parts[split][key] = records
    return parts, note


def _as_coco(names: Sequence[str], records: Sequence[tuple]) -> dict[str, list]:
    """Return the content of an annotation file of ``(file name, (width, height), objects)``.

    Objects are ``(class number from 0, box [x, y, width, height], points (N, 2) or None, is difficult)``, in pixels.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for file_name, (width, height), objects in records:
        number = len(images) + 1
        images.append(dict(id=number, file_name=file_name, width=width, height=height))
        for label, box, points, is_difficult in objects:
            area = box[2] * box[3] if points is None else cv2.contourArea(np.float32(points))
            annotation = dict(id=len(annotations) + 1, image_id=number, category_id=label + 1)
            # Pascal VOC's evaluation, too, counts a difficult object neither as a hit nor as a miss.
            annotation.update(bbox=box, area=area, iscrowd=int(is_difficult))
            if points is not None:
                annotation["segmentation"] = [np.ravel(points).tolist()]
            annotations.append(annotation)
    categories = [dict(id=number, name=name) for number, name in enumerate(names, start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def _images_in(root: str, folder: str) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return path below the root, and size as loaded, of a folder's images, by their path in it without suffix."""
    names = list_files(os.path.join(root, folder))
    paths = [os.path.join(root, folder, name) for name in names]
    found = {}
    for name, path, picture in zip(names, paths, read_images(paths, Loading().backend, Memory())):
        if picture.problem:
            raise UserError(f"{path} {picture.problem}; restore it, or remove it and its labels")
        size = loaded_size(picture, Loading())
        found[os.path.splitext(name)[0]] = (os.path.normpath(os.path.join(folder, name)), size)
    return found


def _number(text: Optional[str]) -> float:
    """Return the number that a text is; NaN if it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def lines_of(path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file that are not blank, each with its place for messages."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable text file ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _read_voc(root: str, layout: Layout) -> dict[str, dict]:
    images = _images_in(root, next(iter(layout.images.values())))
    parent = next(p for _, p in VOC_FOLDERS if os.path.isdir(os.path.join(root, p)))
    found = {path.stem: _read_xml(path) for path in sorted(Path(root, parent).glob("*.xml"))}
    names = sorted({name for _, objects in found.values() for name, _, _ in objects})
    # The first pixel is 1 in Pascal VOC, and 0 in what some programs write.
    corners = [value for _, objects in found.values() for _, box, _ in objects for value in box[:2]]
    first = min([1, *corners]) >= 1
    records = {}
    for stem, (size, objects) in found.items():
        if stem not in images:
            raise UserError(f"{os.path.join(root, parent, stem)}.xml has no image of that name")
        boxes = [
            (
                names.index(name),
                [x - first, y - first, right - x + first, below - y + first],
                None,
                difficult,
            )
            for name, (x, y, right, below), difficult in objects
        ]
        file_name, loaded = images[stem]
        # The check of the data compares the two sizes.
        records[stem] = (file_name, size if min(size) > 0 else loaded, boxes)
    contents = {}
    for split, label in layout.labels.items():
        listed = records
        if label.endswith(".txt"):
            listed = dict(reversed(place) for place in lines_of(os.path.join(root, label)))
            for stem, place in listed.items():
                if stem not in records:
                    raise UserError(f"{place}: there is no {parent}/{brief(stem)}.xml")
        contents[split] = _as_coco(names, [records[stem] for stem in listed])
    return contents


def _read_xml(path: Path) -> tuple[list[int], list[tuple[str, list[float], bool]]]:
    """Return an image's size, and each object's name, corners, and whether it is difficult."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse(*_: Any) -> None:  # nested ones can fill the memory
        raise UserError(f"{path} declares XML entities, which annotations do not need; remove them")

    parser.EntityDeclHandler, parser.CharacterDataHandler = refuse, builder.data
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not a readable XML file ({error})") from error
    tree = builder.close()
    size = [_number(tree.findtext(f"size/{side}")) for side in ("width", "height")]
    objects = []
    for number, node in enumerate(tree.iter("object"), start=1):
        name = (node.findtext("name") or "").strip()
        corners = [_number(node.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax")]
        if not name or not np.isfinite(corners).all():
            raise UserError(
                f"{path}, object {number}: it lacks a name, or four numbers in its bndbox"
            )
        objects.append((name, corners, (node.findtext("difficult") or "").strip() == "1"))
    return [int(n) if math.isfinite(n) else 0 for n in size], objects


def _read_yolo(root: str, layout: Layout) -> dict[str, dict]:
    names = _yolo_names(root)
    contents = {}
    for split, folder in layout.labels.items():
        labels = os.path.join(root, folder)
        records, count = [], 0
        for stem, (file_name, size) in _images_in(root, layout.images[split]).items():
            path = os.path.join(labels, f"{stem}.txt")
            is_there = os.path.isfile(path)  # without one, the image has no objects
            count += is_there
            records.append((file_name, size, _yolo_objects(path, size, names) if is_there else []))
        if not count:
            raise UserError(
                f"none of the {len(records)} images of {labels} has a label file of its name there"
            )
        contents[split] = _as_coco(names, records)
    return contents


def _yolo_names(root: str) -> list[str]:
    """Return the class names of the data set's YAML file, in the order of their numbers."""
    found = {}
    for path in sorted(p for p in Path(root).iterdir() if p.suffix in (".yaml", ".yml")):
        try:
            content = yaml.safe_load(path.read_bytes())
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a readable YAML file ({brief(error)})") from error
        if isinstance(content, dict) and "names" in content:
            found[path] = content
    if len(found) != 1:
        raise UserError(
            f"{root} needs one YAML file with names, and has {len(found)} ({shown(list(found))})"
        )
    path, content = found.popitem()
    names = content["names"]
    if isinstance(names, dict):
        names = [names.get(number) for number in range(len(names))]
    words = [str(n) for n in names if type(n) in (str, int)] if isinstance(names, list) else []
    if not words or len(set(words)) < len(names):
        raise UserError(
            f"{path} needs names that are a list of different words, or words numbered from 0"
        )
    if "kpt_shape" in content:
        raise UserError(f"{path} describes keypoints (kpt_shape); we read boxes and polygons")
    return words


def _yolo_objects(path: str, size: tuple[int, int], names: Sequence[str]) -> list[tuple]:
    """Read a label file: in each line a class and a box or the points of a polygon, as shares of the image."""
    objects = []
    for place, line in lines_of(path):
        label, *shares = map(_number, line.split())
        if not np.isfinite(shares).all() or len(shares) < 4 or len(shares) % 2:
            raise UserError(
                f"{place}: {brief(line)} is not a class with the numbers of a box or a polygon"
            )
        if label not in range(len(names)):
            raise UserError(
                f"{place}: there is no class {label:g}; the {len(names)} names count from 0"
            )
        if min(shares) < -_SLACK or max(shares) > 1 + _SLACK:
            raise UserError(
                f"{place}: {brief(line)} is outside the image, whose sides count from 0 to 1"
            )
        points = np.round(np.reshape(shares, (-1, 2)) * size, 2)
        if len(shares) == 4:
            box, points = [*(points[0] - points[1] / 2).tolist(), *points[1].tolist()], None
        else:
            box = [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]
        objects.append((int(label), box, points, False))
    return objects
