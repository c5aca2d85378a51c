"""Annotation files in COCO's format: what mmdet and pycocotools would stumble over, or take wrongly, in silence.

What either does was tried out, case by case. An annotation is refused where reading it ends in a
traceback, hangs, or gives boxes, masks or classes that are not those meant; it is counted in a
warning where the library leaves it out.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Optional

from rich.progress import track

from ..errors import UserError

_NAMES_SHOWN = 5
_MIN_OVERLAP = 0.5  # of a box and the extent of its polygons, over their union
_MAX_PROTRUSION = 0.01  # of a box beyond its image, as a share of the image
_MAX_DISTANCE = 10  # of a polygon from its image, in sizes of the image
_MANY = 100_000  # annotations, which take a second: with progress
_LISTS = ("images", "annotations", "categories")


@lru_cache(maxsize=4)
def read_coco(ann_file: str) -> dict[str, Any]:
    """An annotation file in COCO's format.

    Raises:
        UserError: If it is none.
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
                    f"from 0) is {_shown(record)}, not an object with fields"
                )
    return content


def category_names(ann_file: str) -> list[str]:
    """Names of an annotation file's categories, in the order that mmdet numbers them.

    Raises:
        UserError: If the file is not in COCO's format, has no category, one name or id twice, or
            one that cannot be a name or an id.
    """
    categories = read_coco(ann_file)["categories"]
    if not categories:
        raise UserError(f"{ann_file} has no categories; every class needs one with its own name")
    for category in categories:
        name, number = category.get("name"), category.get("id")
        if not isinstance(name, str) or not name:
            what = (
                f"called {_shown(name)}, which is no text" if "name" in category else "of no name"
            )
            raise UserError(f"{ann_file} has a category {what}: {_shown(category)}")
        if not _is_id(number):
            what = f"the id {_shown(number)}" if "id" in category else "no id"
            raise UserError(f"the category {name!r} in {ann_file} has {what}, and needs a number")
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
    """What a run does with an annotation file.

    Attributes:
        classes: Names of the classes that are wanted.
        trains: Whether a model is trained on it.
        evaluates: Whether pycocotools compares predictions with it.
        with_masks: Whether masks are read from it.
        compares_masks: Whether the evaluation is one of masks, too.
        filter_cfg: The data set's, which leaves out whole images.
    """

    classes: Sequence[str]
    trains: bool = True
    evaluates: bool = False
    with_masks: bool = False
    compares_masks: bool = False
    filter_cfg: dict[str, Any] = field(default_factory=dict)


def check_annotations(ann_file: str, use: Use) -> list[str]:
    """Check all that a run reads from an annotation file, except that its images are there.

    Args:
        ann_file: In COCO's format.
        use: What for.

    Returns:
        Warnings: what the library leaves out, with counts.

    Raises:
        UserError: If the run would fail on the file, or take it wrongly, or find nothing to train
            on: the worst of what was found, with a count and the first place.
    """
    content = read_coco(ann_file)
    images = _check_images(ann_file, content["images"])
    return _AnnotationCheck(ann_file, content, images, use).run()


# ---------------------------------------------------------------------------------------- findings


class _Place(NamedTuple):
    """A record of the file; its name is only made up when it is told."""

    kind: str
    record: dict
    number: int

    def __str__(self) -> str:
        if self.record.get("id") is None:
            return f"{self.kind} number {self.number}, counted from 0"
        return f"{self.kind} {_shown(self.record['id'])}"


class _Findings:
    """Counts of what is wrong with the records of a file, each kind with its first place."""

    def __init__(self, ann_file: str, kind: str, total: int) -> None:
        self.ann_file, self.kind, self.total = ann_file, kind, total
        self.refused: dict[str, list] = {}
        self.warned: dict[str, list] = {}

    def refuse(self, what: str, where: _Place, detail: str = "") -> None:
        self.refused.setdefault(what, [0, where, detail])[0] += 1

    def warn(self, what: str, where: _Place, detail: str = "") -> None:
        self.warned.setdefault(what, [0, where, detail])[0] += 1

    def sentence(self, what: str, count: int, where: _Place, detail: str) -> str:
        return (
            f"{count} of {self.total} {self.kind} in {self.ann_file} "
            f"{'have' if count > 1 else 'has'} {what} "
            f"(first: {where}{': ' * bool(detail)}{detail})"
        )

    def stop(self) -> None:
        """Refuse the file if there is a reason to: the most frequent one is told."""
        if self.refused:
            what, found = max(self.refused.items(), key=lambda item: item[1][0])
            others = len(self.refused) - 1
            more = (
                f"; {others} other thing{'s are' if others > 1 else ' is'} wrong with it too"
                if others
                else ""
            )
            raise UserError(self.sentence(what, *found) + more)

    def warnings(self) -> list[str]:
        return [self.sentence(what, *found) for what, found in self.warned.items()]


# --------------------------------------------------------------------------------------- images


def _check_images(ann_file: str, records: list[dict]) -> dict[Any, dict]:
    """Images by their ids."""
    if not records:
        raise UserError(f"{ann_file} names no images")
    found = _Findings(ann_file, "images", len(records))
    images: dict[Any, dict] = {}
    by_name: dict[str, Any] = {}
    for index, image in enumerate(records):
        where = _Place("image", image, index)
        missing = [k for k in ("id", "file_name", "width", "height") if image.get(k) is None]
        if missing:
            found.refuse(f"no {missing[0]}, which mmdet needs", where)
            continue
        number, name, width, height = (image[k] for k in ("id", "file_name", "width", "height"))
        if not _is_id(number):
            found.refuse("an id that is no number", where)
        elif number in images:
            found.refuse("an id that another image has, whose annotations mmdet would mix", where)
        elif not isinstance(name, str) or not name:
            found.refuse("a file_name that is no name", where, _shown(name))
        elif name in by_name:
            found.refuse(
                "a file_name that an image before has, so that each of the two is trained as if "
                "the other's objects were background",
                where,
                f"{name}, as image {_shown(by_name[name])}",
            )
        elif not _is_size(width) or not _is_size(height):
            sizes = f"width {_shown(width)}, height {_shown(height)}"
            found.refuse("a width or height that is no number of pixels", where, sizes)
        else:
            images[number], by_name[name] = image, number
    kinds = {isinstance(number, str) for number in images}
    if len(kinds) > 1:
        raise UserError(
            f"{ann_file} has images whose ids are text and others whose ids are numbers, which "
            "pycocotools cannot sort; use one kind"
        )
    found.stop()
    return images


# ---------------------------------------------------------------------------------- annotations


_TRAINED_WITHOUT = "mmdet leaves them out of training"
_COUNTED_MISSED = "the evaluation counts them as missed, whatever is predicted"


class _AnnotationCheck:
    """Goes through the annotations of one file once."""

    def __init__(
        self, ann_file: str, content: dict[str, Any], images: dict[Any, dict], use: Use
    ) -> None:
        self.ann_file, self.images, self.use = ann_file, images, use
        self.annotations = content["annotations"]
        self.classes = set(use.classes)
        self.categories = {c["id"]: c["name"] for c in content["categories"]}
        self.found = _Findings(ann_file, "annotations", len(self.annotations))
        # All alike: that was checked.
        self.image_ids_are_text = isinstance(next(iter(images)), str)
        self.category_ids_are_text = isinstance(next(iter(self.categories)), str)
        self.ids: set = set()
        self.boxes_seen: set[tuple] = set()
        self.usable: Counter = Counter()  # annotations that are trained on, by category
        self.usable_images: set = set()
        self.images_in_use: set = set()
        self.num_boxes = self.num_corners = self.num_with_polygons = 0
        self.first_corners = self.first_apart = ""
        self.num_apart = 0
        self.notes: list[str] = []  # on the whole file
        self.unknown_categories: Counter = Counter()
        # What becomes of annotations that mmdet does not take.
        fates = [_TRAINED_WITHOUT] * use.trains + [_COUNTED_MISSED] * use.evaluates
        self.fate = " and ".join(fates) or "mmdet leaves them out"

    def run(self) -> list[str]:
        many = len(self.annotations) >= _MANY
        shown = track(self.annotations, "Checking annotations", disable=not many)
        for number, annotation in enumerate(shown):
            where = _Place("annotation", annotation, number)
            if self._has_sound_fields(annotation, where):
                self._look_at(annotation, where)
        self._judge_numbering()
        self._judge_boxes()
        self.found.stop()
        self._judge_what_is_left()
        return self.found.warnings() + self.notes

    # -- fields

    def _has_sound_fields(self, annotation: dict, where: _Place) -> bool:
        """Whether all is there and of the right type, so that its values mean anything."""
        refuse = self.found.refuse
        needed = ("id", "image_id", "category_id", "bbox", "area")
        missing = [key for key in needed if annotation.get(key) is None]
        if missing:
            refuse(f"no {missing[0]}, which mmdet needs", where)
            return False
        number, box, area = annotation["id"], annotation["bbox"], annotation["area"]
        if not _is_id(number, text=not self.use.evaluates):
            refuse("an id that is no number", where)
        elif number in self.ids:
            refuse("an id that another annotation has, and mmdet insists on different ones", where)
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            what = "a bbox that is not four finite numbers [x, y, width, height]"
            refuse(what, where, _shown(box))
        elif not _is_number(area):
            refuse("an area that is no finite number", where, _shown(area))
        elif not self._has_sound_crowd(annotation, where):
            pass
        elif not self._could_name(annotation["image_id"], self.image_ids_are_text):
            refuse(
                "an image_id of another type than images'", where, _shown(annotation["image_id"])
            )
        elif not self._could_name(annotation["category_id"], self.category_ids_are_text):
            shown = _shown(annotation["category_id"])
            refuse("a category_id of another type than the categories'", where, shown)
        else:
            self.ids.add(number)
            return True
        if _is_id(number):
            self.ids.add(number)
        return False

    def _has_sound_crowd(self, annotation: dict, where: _Place) -> bool:
        crowd = annotation.get("iscrowd")
        if crowd is None:
            # mmdet takes a missing one, and null, for 0; pycocotools wants one.
            if self.use.evaluates:
                self.found.refuse("no iscrowd, which the evaluation needs (0, or 1)", where)
                return False
            self.found.warn("no iscrowd; each is taken for a single object", where)
        elif crowd not in (0, 1) or isinstance(crowd, str):
            self.found.refuse("an iscrowd that is neither 0 nor 1", where, _shown(crowd))
            return False
        return True

    @staticmethod
    def _could_name(reference: Any, ids_are_text: bool) -> bool:
        """Whether a reference could be an id by its type: 1 and "1" never meet."""
        return _is_id(reference) and isinstance(reference, str) is ids_are_text

    # -- values

    def _look_at(self, annotation: dict, where: _Place) -> None:
        image = self.images.get(annotation["image_id"])
        category = self.categories.get(annotation["category_id"])
        warn = self.found.warn
        if annotation["id"] == 0 and self.use.evaluates:
            warn(
                "the id 0, which pycocotools takes for 'no match', so that it counts as missed; "
                "count from 1",
                where,
            )
        if image is None:
            shown = f"image_id {_shown(annotation['image_id'])}"
            warn("an image_id that none of the images has; they are left out", where, shown)
            return
        if category is None:
            self.unknown_categories[annotation["category_id"]] += 1
            shown = f"category_id {_shown(annotation['category_id'])}"
            warn("a category_id that none of the categories has; they are left out", where, shown)
            return
        if category not in self.classes:
            return  # as wished
        self.images_in_use.add(annotation["image_id"])
        if annotation.get("ignore"):
            return
        is_taken = self._takes_box(annotation, image, where)
        if is_taken and self.use.with_masks:
            is_taken = self._takes_mask(annotation, image, where)
        if is_taken and not annotation.get("iscrowd"):
            self.usable[category] += 1
            self.usable_images.add(annotation["image_id"])

    def _takes_box(self, annotation: dict, image: dict, where: _Place) -> bool:
        """Whether mmdet keeps an annotation by its box."""
        x, y, width, height = annotation["bbox"]
        image_width, image_height = image["width"], image["height"]

        def warn(what: str) -> None:
            size = f"{image_width}x{image_height}"
            self.found.warn(what, where, f"{_shown(annotation['bbox'])} in {size} pixels")

        self.num_boxes += 1
        left, right = -min(0, x), x + width - image_width
        above, below = -min(0, y), y + height - image_height
        # As corners these would fit. Do they as they are?
        if (
            max(right, below) > 1
            and 0 <= x < width <= image_width
            and 0 <= y < height <= image_height
        ):
            self.num_corners += 1
            self.first_corners = self.first_corners or f"{where}: {_shown(annotation['bbox'])}"
        if width <= 0 or height <= 0:
            warn(f"a box of no width or height, or a negative one; {self.fate}")
            return False
        if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
            warn(f"a box outside its image; {self.fate}")
            return False
        if max(left, right, above, below) > max(
            1.0, _MAX_PROTRUSION * max(image_width, image_height)
        ):
            cut = "mmdet cuts them off there" if self.use.trains else "nothing predicted does"
            warn(f"a box that reaches beyond its image; {cut}")
        if width < 1 or height < 1:
            warn(f"a box of less than a pixel; {self.fate}")
            return False
        if annotation["area"] <= 0:
            warn("an area of zero or less, which means no object; mmdet leaves them out")
            return False
        key = (annotation["image_id"], annotation["category_id"], x, y, width, height)
        if key in self.boxes_seen and not annotation.get("iscrowd"):
            warn("the image, class and box of another one")
        self.boxes_seen.add(key)
        return True

    def _takes_mask(self, annotation: dict, image: dict, where: _Place) -> bool:
        """Whether mmdet keeps an annotation by its mask."""
        mask = annotation.get("segmentation")
        if not mask:
            self.found.refuse(
                "no segmentation, which this config's masks need; train a box detector on them",
                where,
            )
            return False
        if isinstance(mask, dict):
            problem = _problem_of_rle(mask, image)
            if problem:
                self.found.refuse(problem, where)
            return not problem
        if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
            self.found.refuse("a segmentation that is neither a list of polygons nor RLE", where)
            return False
        # pycocotools never comes back from polygons that are not finite, or has no memory for those
        # that are far out.
        if not all(map(_are_numbers, mask)):
            self.found.refuse("polygons with other values than finite numbers", where)
            return False
        limit = _MAX_DISTANCE * max(image["width"], image["height"])
        if any(polygon and max(max(polygon), -min(polygon)) > limit for polygon in mask):
            self.found.refuse("polygons far outside their image", where)
            return False
        good = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if len(good) < len(mask):
            odd = any(len(polygon) % 2 for polygon in mask)
            what = (
                f"a polygon {'of an odd number of values' if odd else 'of fewer than three points'}"
            )
            # pycocotools judges a list of polygons by its first.
            if self.use.compares_masks and mask[0] not in good:
                self.found.refuse(f"{what}, which pycocotools fails on or takes for another", where)
            elif good:
                self.found.warn(f"{what}, which is left out", where)
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
                f"{where}: bbox {_shown(annotation['bbox'])}, polygons [{extent}]"
            )

    # -- the whole

    def _judge_numbering(self) -> None:
        known = set(self.categories)
        if 0 in self.unknown_categories and known == set(range(1, len(known) + 1)):
            raise UserError(
                f"the annotations in {self.ann_file} number their categories from 0, its list of "
                "categories from 1, so that every class would be trained as the one before; use "
                "the same numbers in both"
            )

    def _judge_boxes(self) -> None:
        layout = "COCO's boxes are [x, y, width, height] in pixels"
        if 2 * self.num_apart > self.num_with_polygons:
            raise UserError(
                f"{self.num_apart} of {self.num_with_polygons} boxes in {self.ann_file} are not "
                f"where their polygons are (first: {self.first_apart}); {layout}"
            )
        if 2 * self.num_corners > self.num_boxes:
            raise UserError(
                f"{self.num_corners} of {self.num_boxes} boxes in {self.ann_file} leave their "
                f"images, and would not if they were two corners (first: {self.first_corners}); "
                f"{layout}"
            )
        if self.num_apart:
            self.notes.append(
                f"{self.num_apart} of {self.num_with_polygons} boxes in {self.ann_file} are not "
                f"where their polygons are (first: {self.first_apart})"
            )

    def _judge_what_is_left(self) -> None:
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
        self.notes += self._judge_images(use.filter_cfg)
        unused = [name for name in use.classes if not self.usable[name]]
        if unused:
            self.notes.append(
                f"{self.ann_file} has no object to train on of {len(unused)} of the "
                f"{len(use.classes)} classes ({_listed(unused)})"
            )

    def _judge_images(self, filter_cfg: dict[str, Any]) -> list[str]:
        """What mmdet's filter leaves of the images."""
        min_size = filter_cfg.get("min_size", 0)
        small = {n for n, i in self.images.items() if min(i["width"], i["height"]) < min_size}
        if not self.usable_images - small:
            raise UserError(
                f"nothing is left to train on of {len(self.images)} images in {self.ann_file}: all "
                f"that have objects are smaller than filter_cfg.min_size={min_size} pixels"
            )
        left_out = []
        if small:
            what = f"are smaller than filter_cfg.min_size={min_size} pixels"
            left_out.append((what, [n for n in self.images if n in small]))
        empty = [n for n in self.images if n not in self.images_in_use]
        # A few are nothing unusual: COCO has them.
        if filter_cfg.get("filter_empty_gt") and 2 * len(empty) > len(self.images):
            left_out.append(("have no objects", empty))
        return [
            f"{len(numbers)} of {len(self.images)} images in {self.ann_file} {what} and are left "
            f"out of training (first: {self.images[numbers[0]]['file_name']})"
            for what, numbers in left_out
        ]


# ------------------------------------------------------------------------------------------ masks


def _problem_of_rle(mask: dict, image: dict) -> str:
    """What is wrong with a run-length code, or nothing."""
    size, counts = mask.get("size"), mask.get("counts")
    expected = [image["height"], image["width"]]
    if size != expected:
        return f"RLE of another size than their image ({_shown(size)}, not {expected})"
    pixels = _pixels_of(counts)
    if pixels is None:
        return "RLE whose counts cannot be read"
    if pixels != expected[0] * expected[1]:
        # Of too few, pycocotools' decoder runs on for ever.
        return "RLE whose counts do not add up to their image's pixels"
    return ""


def _pixels_of(counts: Any) -> Optional[int]:
    """How many pixels a run-length code describes, a list or COCO's compressed text of it."""
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


def _is_number(value: Any) -> bool:
    return _are_numbers([value])


def _are_numbers(values: list) -> bool:
    try:
        return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
    except OverflowError:  # an integer beyond all floats
        return False


def _is_size(value: Any) -> bool:
    return _is_number(value) and value > 0 and value == int(value)


def _is_id(value: Any, text: bool = True) -> bool:
    return _is_number(value) or (text and isinstance(value, str))


def _shown(value: Any, length: int = 80) -> str:
    """A value of a file, as JSON writes it, on one line that is not too long."""
    text = " ".join(json.dumps(value).split())
    return text if len(text) <= length else f"{text[:length]}..."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + ", ..." * (len(names) > _NAMES_SHOWN)
