"""Check annotation files in COCO's format for what mmdet and pycocotools fail on or misread.

We tried out, case by case, what the two do. We reject a file if they crash or hang on it, or misread its boxes, masks
or classes. We warn of records that they skip, with counts.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Optional

from rich.progress import track

from ..errors import UserError, shown

_MIN_OVERLAP = 0.5  # of a box and the extent of its polygons, over their union
_MAX_PROTRUSION = 0.01  # of a box beyond its image, as a share of the image
_MAX_DISTANCE = 10  # of a polygon from its image, in sizes of the image
_MANY = 100_000  # annotations that take a second; from there on we show progress
_LISTS = ("images", "annotations", "categories")


@lru_cache(maxsize=4)
def read_coco(ann_file: str) -> dict[str, Any]:
    """Read an annotation file in COCO's format.

    Raises:
        UserError: If it is not in that format.
    """
    try:
        with open(ann_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        if os.path.isfile(ann_file) and not os.path.getsize(ann_file):
            raise UserError(f"{ann_file} is empty") from error
        raise UserError(f"{ann_file} is not a readable JSON file ({error})") from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])  # COCO's own files of images to predict on have none
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in _LISTS):
        raise UserError(f"{ann_file} is not in COCO's format: it needs lists {', '.join(_LISTS)}")
    for key in _LISTS:
        for number, record in enumerate(content[key]):
            if not isinstance(record, dict):
                raise UserError(
                    f"{ann_file} is not in COCO's format: number {number} of its {key} (counted "
                    f"from 0) is {_as_json(record)}, not an object with fields"
                )
    return content


def category_names(ann_file: str) -> list[str]:
    """Return the names of an annotation file's categories, in the order that mmdet numbers them.

    Raises:
        UserError: If the file is not in COCO's format, or if it has no category, one name or id
            twice, or a category whose name or id is missing or of a wrong type.
    """
    categories = read_coco(ann_file)["categories"]
    if not categories:
        raise UserError(f"{ann_file} has no categories; every class needs one with its own name")
    found = _Findings(ann_file, "categories", len(categories))
    for index, category in enumerate(categories):
        found.has_sound_fields(_Place("category", category, index), {"name": _TEXT, "id": _ID})
    found.raise_if_refused()
    for key, what in (("name", "called"), ("id", "with the id")):
        value, count = Counter(category[key] for category in categories).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{ann_file} has two categories {what} {value!r}; every class needs one category "
                f"with its own {key}"
            )
    if len({isinstance(category["id"], str) for category in categories}) > 1:
        raise UserError(f"{ann_file} has categories whose ids are text and numbers; use one kind")
    return [category["name"] for category in categories]


@dataclass(frozen=True)
class Use:
    """The use of an annotation file in a run.

    Attributes:
        classes: Names of the classes that the run uses.
        trains: Whether a model is trained on it.
        evaluates: Whether pycocotools compares predictions with it.
        with_masks: Whether masks are read from it.
        compares_masks: Whether the evaluation also compares masks.
        filter_cfg: The data set's ``filter_cfg``, by which mmdet skips whole images.
    """

    classes: Sequence[str]
    trains: bool = True
    evaluates: bool = False
    with_masks: bool = False
    compares_masks: bool = False
    filter_cfg: dict[str, Any] = field(default_factory=dict)


def check_annotations(ann_file: str, use: Use) -> list[str]:
    """Check all that a run reads from an annotation file, except that its images exist.

    Args:
        ann_file: In COCO's format.
        use: Its use in the run.

    Returns:
        Warnings about skipped records, with counts.

    Raises:
        UserError: If the run would fail on the file, misread it or find nothing to train on. The
            message names the most frequent fault, with its count and first place.
    """
    content = read_coco(ann_file)
    images = _check_images(ann_file, content["images"])
    return _AnnotationCheck(ann_file, content, images, use).run()


# ------------------------------------------------------------------------------- kinds of fields


class _Kind(NamedTuple):
    """The valid values of a field.

    Attributes:
        fault: Describes a wrong value, after the field's name.
        is_sound: Whether a value is valid.
        needed_by: Program that fails if the value is missing or null; empty if none does.
    """

    fault: str
    is_sound: Callable[[Any], bool]
    needed_by: str = "mmdet"


def _are_numbers(values: list) -> bool:
    try:
        return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
    except OverflowError:  # an integer beyond all floats
        return False


def _is_number(value: Any) -> bool:
    return _are_numbers([value])


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _reference(to: str, ids: dict) -> _Kind:
    """A value of the type of ``ids``, which are all of one type: 1 never equals "1"."""
    is_text = isinstance(next(iter(ids)), str)
    return _Kind(
        f"of another type than the {to}'",
        lambda value: _is_id(value) and isinstance(value, str) is is_text,
    )


_ID = _Kind("that is no number", _is_id)  # or text, which mmdet takes but pycocotools does not
_NUMBER_ID = _Kind("that is no number", _is_number)
_TEXT = _Kind("that is empty or no text", lambda value: isinstance(value, str) and value != "")
_PIXELS = _Kind(
    "that is no number of pixels",
    lambda value: _is_number(value) and value > 0 and value == int(value),
)
_AREA = _Kind("that is no finite number", _is_number)
_BOX = _Kind(
    "that is not four finite numbers [x, y, width, height]",
    lambda value: isinstance(value, list) and len(value) == 4 and _are_numbers(value),
)
# mmdet treats a missing one, and null, as 0; pycocotools needs one.
_CROWD = _Kind("that is neither 0 nor 1", lambda value: value in (0, 1), needed_by="")
_EVALUATED_CROWD = _CROWD._replace(needed_by="the evaluation")

_IMAGE_FIELDS = {"id": _ID, "file_name": _TEXT, "width": _PIXELS, "height": _PIXELS}


# ---------------------------------------------------------------------------------------- findings


class _Place(NamedTuple):
    """A record of the file; its description is only made for messages."""

    kind: str
    record: dict
    number: int

    def __str__(self) -> str:
        if self.record.get("id") is None:
            return f"{self.kind} number {self.number}, counted from 0"
        return f"{self.kind} {_as_json(self.record['id'])}"


class _Findings:
    """Count the faults in the records of a file, each kind of fault with its first place."""

    def __init__(self, ann_file: str, kind: str, total: int) -> None:
        self.ann_file, self.kind, self.total = ann_file, kind, total
        self.refused: dict[str, list] = {}
        self.warned: dict[str, list] = {}

    def refuse(self, what: str, where: _Place, detail: str = "") -> None:
        self.refused.setdefault(what, [0, where, detail])[0] += 1

    def warn(self, what: str, where: _Place, detail: str = "") -> None:
        self.warned.setdefault(what, [0, where, detail])[0] += 1

    def has_sound_fields(self, where: _Place, kinds: dict[str, _Kind]) -> bool:
        """Whether a record's fields are present and valid; count the first fault."""
        for key, kind in kinds.items():
            value = where.record.get(key)
            if value is None:
                if kind.needed_by:
                    self.refuse(f"no {key}, which {kind.needed_by} needs", where)
                    return False
            elif not kind.is_sound(value):
                article = "an" if key[0] in "aeiou" else "a"
                detail = "" if key == "id" else _as_json(value)
                self.refuse(f"{article} {key} {kind.fault}", where, detail)
                return False
        return True

    def _message(self, what: str, count: int, where: _Place, detail: str) -> str:
        have = "have" if count > 1 else "has"
        first = f"{where}: {detail}" if detail else where
        return (
            f"{count} of {self.total} {self.kind} in {self.ann_file} {have} {what} (first: {first})"
        )

    def raise_if_refused(self) -> None:
        """Raise for the most frequent fault, if there is any."""
        if self.refused:
            what, found = max(self.refused.items(), key=lambda item: item[1][0])
            more = "; the file has other faults too" if len(self.refused) > 1 else ""
            raise UserError(self._message(what, *found) + more)

    def warnings(self) -> list[str]:
        return [self._message(what, *found) for what, found in self.warned.items()]


# --------------------------------------------------------------------------------------- images


def _check_images(ann_file: str, records: list[dict]) -> dict[Any, dict]:
    """Return the images by their ids."""
    if not records:
        raise UserError(f"{ann_file} names no images")
    found = _Findings(ann_file, "images", len(records))
    images: dict[Any, dict] = {}
    by_name: dict[str, Any] = {}
    for index, image in enumerate(records):
        where = _Place("image", image, index)
        if not found.has_sound_fields(where, _IMAGE_FIELDS):
            continue
        number, name = image["id"], image["file_name"]
        if number in images:
            found.refuse("an id that another image has, whose annotations mmdet would mix", where)
        elif name in by_name:
            found.refuse(
                "a file_name that an image before has, so that each of the two is trained as if "
                "the other's objects were background",
                where,
                f"{name}, as image {_as_json(by_name[name])}",
            )
        else:
            images[number], by_name[name] = image, number
    if len({isinstance(number, str) for number in images}) > 1:
        raise UserError(
            f"{ann_file} has images whose ids are text and others whose ids are numbers, which "
            "pycocotools cannot sort; use one kind"
        )
    found.raise_if_refused()
    return images


# ---------------------------------------------------------------------------------- annotations


class _AnnotationCheck:
    """Check the annotations of one file in a single pass."""

    def __init__(
        self, ann_file: str, content: dict[str, Any], images: dict[Any, dict], use: Use
    ) -> None:
        self.ann_file, self.images, self.use = ann_file, images, use
        self.annotations = content["annotations"]
        self.classes = set(use.classes)
        self.categories = {c["id"]: c["name"] for c in content["categories"]}
        self.found = _Findings(ann_file, "annotations", len(self.annotations))
        self.fields = {
            "id": _NUMBER_ID if use.evaluates else _ID,
            "image_id": _reference("images", images),
            "category_id": _reference("categories", self.categories),
            "bbox": _BOX,
            "area": _AREA,
            "iscrowd": _EVALUATED_CROWD if use.evaluates else _CROWD,
        }
        self.ids: set = set()
        self.boxes_seen: set[tuple] = set()
        self.usable: Counter = Counter()  # annotations to train on, by category
        self.usable_images: set = set()
        self.images_in_use: set = set()
        self.num_boxes = self.num_corners = self.num_with_polygons = 0
        self.first_corners = self.first_apart = ""
        self.num_apart = 0
        self.notes: list[str] = []  # on the whole file
        self.unknown_categories: set = set()
        # Consequences for annotations that mmdet skips.
        fates = []
        if use.trains:
            fates.append("mmdet skips them in training")
        if use.evaluates:
            fates.append("the evaluation counts them as missed, whatever is predicted")
        self.fate = " and ".join(fates) or "mmdet skips them"

    def run(self) -> list[str]:
        few = len(self.annotations) < _MANY
        annotations = track(self.annotations, "Checking annotations", disable=few)
        for number, annotation in enumerate(annotations):
            where = _Place("annotation", annotation, number)
            if self._is_sound(annotation, where):
                self._check_values(annotation, where)
        self._check_numbering()
        self._check_boxes()
        self.found.raise_if_refused()
        self._check_what_remains()
        return self.found.warnings() + self.notes

    # -- fields

    def _is_sound(self, annotation: dict, where: _Place) -> bool:
        """Whether all fields are present and of the right type, so that their values can be checked."""
        if not self.found.has_sound_fields(where, self.fields):
            return False
        if annotation.get("iscrowd") is None:
            self.found.warn("no iscrowd; each is taken for a single object", where)
        number = annotation["id"]
        if number in self.ids:
            self.found.refuse(
                "an id that another annotation has, and mmdet insists on different ones", where
            )
            return False
        self.ids.add(number)
        return True

    # -- values

    def _check_values(self, annotation: dict, where: _Place) -> None:
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        image, category = self.images.get(image_id), self.categories.get(category_id)
        warn = self.found.warn
        if annotation["id"] == 0 and self.use.evaluates:
            warn(
                "the id 0, which pycocotools takes for 'no match', so that it counts as missed; "
                "count from 1",
                where,
            )
        if image is None:
            what = "an image_id that none of the images has; mmdet skips them"
            warn(what, where, f"image_id {_as_json(image_id)}")
            return
        if category is None:
            self.unknown_categories.add(category_id)
            what = "a category_id that none of the categories has; mmdet skips them"
            warn(what, where, f"category_id {_as_json(category_id)}")
            return
        if category not in self.classes:
            return  # The run does not use this class.
        self.images_in_use.add(image_id)
        if annotation.get("ignore"):
            return
        is_taken = self._takes_box(annotation, image, where)
        if is_taken and self.use.with_masks:
            is_taken = self._takes_mask(annotation, image, where)
        if is_taken and not annotation.get("iscrowd"):
            self.usable[category] += 1
            self.usable_images.add(image_id)

    def _takes_box(self, annotation: dict, image: dict, where: _Place) -> bool:
        """Whether mmdet keeps an annotation by its box."""
        x, y, width, height = annotation["bbox"]
        image_width, image_height = image["width"], image["height"]

        def warn(what: str) -> None:
            size = f"{image_width}x{image_height}"
            self.found.warn(what, where, f"{_as_json(annotation['bbox'])} in {size} pixels")

        self.num_boxes += 1
        right, below = x + width - image_width, y + height - image_height
        # Count boxes that fit the image only if read as two corners.
        if (
            max(right, below) > 1
            and 0 <= x < width <= image_width
            and 0 <= y < height <= image_height
        ):
            self.num_corners += 1
            self.first_corners = self.first_corners or f"{where}: {_as_json(annotation['bbox'])}"
        if width <= 0 or height <= 0:
            warn(f"a box of no width or height, or a negative one; {self.fate}")
            return False
        if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
            warn(f"a box outside its image; {self.fate}")
            return False
        allowed = max(1, _MAX_PROTRUSION * max(image_width, image_height))
        if max(-x, -y, right, below) > allowed:
            cut = "mmdet cuts them off there" if self.use.trains else "nothing predicted does"
            warn(f"a box that reaches beyond its image; {cut}")
        if width < 1 or height < 1:
            warn(f"a box of less than a pixel; {self.fate}")
            return False
        if annotation["area"] <= 0:
            warn("an area of zero or less, which means no object; mmdet skips them")
            return False
        key = (annotation["image_id"], annotation["category_id"], x, y, width, height)
        if key in self.boxes_seen and not annotation.get("iscrowd"):
            warn("the image, class and box of another one")
        self.boxes_seen.add(key)
        return True

    def _takes_mask(self, annotation: dict, image: dict, where: _Place) -> bool:
        """Whether mmdet keeps an annotation by its mask."""
        mask = annotation.get("segmentation")
        problem = _problem_of_mask(mask, image)
        if problem:
            self.found.refuse(problem, where)
            return False
        if isinstance(mask, dict):
            return True
        good = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if len(good) < len(mask):
            odd = any(len(polygon) % 2 for polygon in mask)
            what = f"a polygon of {'an odd number of values' if odd else 'fewer than three points'}"
            # pycocotools judges a list of polygons by its first.
            if self.use.compares_masks and mask[0] not in good:
                self.found.refuse(f"{what}, which pycocotools fails on or takes for another", where)
            elif good:
                self.found.warn(f"{what}, which mmdet skips", where)
            else:
                self.found.warn(f"{what} and no other; {self.fate}", where)
        if good:
            self._compare_with_box(annotation, good, where)
        return bool(good)

    def _compare_with_box(self, annotation: dict, polygons: list[list], where: _Place) -> None:
        x, y, width, height = annotation["bbox"]
        left, right = min(min(p[0::2]) for p in polygons), max(max(p[0::2]) for p in polygons)
        top, bottom = min(min(p[1::2]) for p in polygons), max(max(p[1::2]) for p in polygons)
        shared_width = max(0, min(right, x + width) - max(left, x))
        shared_height = max(0, min(bottom, y + height) - max(top, y))
        shared = shared_width * shared_height
        union = width * height + (right - left) * (bottom - top) - shared
        self.num_with_polygons += 1
        # Of thin objects, a rounded box differs much from its polygon.
        close = (
            max(abs(left - x), abs(top - y), abs(right - x - width), abs(bottom - y - height)) <= 2
        )
        if shared < _MIN_OVERLAP * union and not close:
            self.num_apart += 1
            extent = ", ".join(f"{value:g}" for value in (left, top, right - left, bottom - top))
            self.first_apart = self.first_apart or (
                f"{where}: bbox {_as_json(annotation['bbox'])}, polygons [{extent}]"
            )

    # -- the whole

    def _check_numbering(self) -> None:
        known = set(self.categories)
        if 0 in self.unknown_categories and known == set(range(1, len(known) + 1)):
            raise UserError(
                f"the annotations in {self.ann_file} number their categories from 0, its list of "
                "categories from 1, so that every class would be trained as the one before; use "
                "the same numbers in both"
            )

    def _check_boxes(self) -> None:
        layout = "COCO's boxes are [x, y, width, height] in pixels"
        if self.num_apart:
            apart = (
                f"{self.num_apart} of {self.num_with_polygons} boxes in {self.ann_file} are not "
                f"where their polygons are (first: {self.first_apart})"
            )
            if 2 * self.num_apart > self.num_with_polygons:
                raise UserError(f"{apart}; {layout}")
            self.notes.append(apart)
        if 2 * self.num_corners > self.num_boxes:
            raise UserError(
                f"{self.num_corners} of {self.num_boxes} boxes in {self.ann_file} reach beyond "
                f"their images, and would not if they were two corners (first: "
                f"{self.first_corners}); {layout}"
            )

    def _check_what_remains(self) -> None:
        use, found = self.use, self.found
        if not self.annotations:
            if use.trains:
                raise UserError(f"{self.ann_file} has no annotations to train on")
            if use.evaluates:
                self.notes.append(f"{self.ann_file} has no annotations: every metric will be -1")
        if not use.trains:
            return
        if not self.usable:
            why = (found.warnings() or ["they are of other classes, or marked as crowds"])[0]
            raise UserError(
                f"nothing is left to train on of {len(self.annotations)} annotations in "
                f"{self.ann_file}: {why}"
            )
        self.notes += self._check_filter(use.filter_cfg)
        unused = [name for name in use.classes if not self.usable[name]]
        if unused:
            self.notes.append(
                f"{self.ann_file} has no object to train on of {len(unused)} of the "
                f"{len(use.classes)} classes ({shown(unused)})"
            )

    def _check_filter(self, filter_cfg: dict[str, Any]) -> list[str]:
        """Warn of images that mmdet's filter skips; raise if none is left."""
        min_size = filter_cfg.get("min_size", 0)
        small = {n for n, i in self.images.items() if min(i["width"], i["height"]) < min_size}
        if not self.usable_images - small:
            raise UserError(
                f"nothing is left to train on of {len(self.images)} images in {self.ann_file}: all "
                f"that have objects are smaller than filter_cfg.min_size={min_size} pixels"
            )
        skipped = []
        if small:
            what = f"are smaller than filter_cfg.min_size={min_size} pixels"
            skipped.append((what, [n for n in self.images if n in small]))
        empty = [n for n in self.images if n not in self.images_in_use]
        # A few are usual: COCO has them.
        if filter_cfg.get("filter_empty_gt") and 2 * len(empty) > len(self.images):
            skipped.append(("have no objects", empty))
        return [
            f"{len(numbers)} of {len(self.images)} images in {self.ann_file} {what} and are "
            f"skipped in training (first: {self.images[numbers[0]]['file_name']})"
            for what, numbers in skipped
        ]


# ------------------------------------------------------------------------------------------ masks


def _problem_of_mask(mask: Any, image: dict) -> str:
    """Return why a mask cannot be read; an empty text if it can."""
    if not mask:
        return "no segmentation, which this config's masks need; --data-root trains on boxes alone if none has one"
    if isinstance(mask, dict):
        return _problem_of_rle(mask, image)
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return "a segmentation that is neither a list of polygons nor RLE"
    # pycocotools hangs on polygons that are not finite, and runs out of memory on those far outside the image.
    if not all(map(_are_numbers, mask)):
        return "polygons with other values than finite numbers"
    limit = _MAX_DISTANCE * max(image["width"], image["height"])
    if any(polygon and max(max(polygon), -min(polygon)) > limit for polygon in mask):
        return "polygons far outside their image"
    return ""


def _problem_of_rle(mask: dict, image: dict) -> str:
    size, counts = mask.get("size"), mask.get("counts")
    expected = [image["height"], image["width"]]
    if size != expected:
        return f"RLE of another size than their image ({_as_json(size)}, not {expected})"
    pixels = _pixels_of(counts)
    if pixels is None:
        return "RLE whose counts cannot be read"
    if pixels != expected[0] * expected[1]:
        # With too few, pycocotools' decoder never ends.
        return "RLE whose counts do not add up to their image's pixels"
    return ""


def _pixels_of(counts: Any) -> Optional[int]:
    """Return the number of pixels of a run-length code (a list, or COCO's compressed text)."""
    if isinstance(counts, list):
        sound = all(isinstance(run, int) and run >= 0 for run in counts)
        return sum(counts) if sound else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    runs: list[int] = []
    run = shift = 0
    for character in counts.encode():  # five bits each, from the lowest on; 32: more follow
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        run |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            run -= (1 << shift) if bits & 16 else 0
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run = shift = 0
    return None if shift or min(runs, default=0) < 0 else sum(runs)


# ----------------------------------------------------------------------------------------- values


def _as_json(value: Any, length: int = 80) -> str:
    """Format a value of a file as JSON on one line, shortened to ``length``."""
    text = " ".join(json.dumps(value).split())
    return text if len(text) <= length else f"{text[:length]}..."
