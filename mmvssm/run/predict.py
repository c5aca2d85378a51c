"""What tools/predict.py does."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple, Optional

from rich import get_console
from rich.progress import Progress

from ..analysis.pruning_view import pruned_backbone
from ..errors import UserError
from ..version import __version__
from .checkpoints import Checkpoint
from .failures import run_failures
from .prediction.outputs import Outputs
from .prediction.predictor import Predictor, Prepared
from .prediction.sources import Source, UnreadableError, Video, describe_image, find_sources
from .setup import open_config, say

_SCORE_THR = 0.3
_SHOWN = 3


class SomeLeftOut(UserError):
    """Files could not be read; what could be was predicted."""

    exit_code = 3


class Item(NamedTuple):
    """An image, or a frame of a video.

    Attributes:
        source: Its file.
        frame: Which frame of a video it is, counted from 0.
        image: What the pipeline made of it.
        video: Of which it is a frame.
    """

    source: Source
    frame: Optional[int]
    image: Prepared
    video: Optional[Video]


class Summary(NamedTuple):
    """What a run did.

    Attributes:
        num_images: Images and frames predicted.
        seconds: That reading, predicting, drawing and writing took.
        model_seconds: Of these, the model.
        unreadable: Files that were left out, and why.
    """

    num_images: int
    seconds: float
    model_seconds: float
    unreadable: dict[str, str]


def predict(args: argparse.Namespace) -> Summary:
    """What tools/predict.py does.

    Args:
        args: Parsed by :func:`predict_parser`.

    Raises:
        UserError: If the arguments, the config or the checkpoint will not do, and nothing was written
            then; or, as :class:`SomeLeftOut`, at the end if there were files that cannot be read.
    """
    _check_numbers(args)
    _check_unused(args.out_dir)
    sources, warnings = find_sources(args.inputs)
    cfg = open_config(args)
    if args.score_thr is not None and cfg.default_scope != "mmdet":
        raise UserError("--score-thr is for detectors; this config's model is a segmenter")
    predictor = Predictor(cfg, Checkpoint.load(args.checkpoint), args.device)
    if args.show_tokens:
        pruned_backbone(predictor.model)
    for warning in warnings:
        say(f"warning: {warning}")
    info = {
        "config": args.config,
        "checkpoint": args.checkpoint,
        "version": f"mmvssm {__version__}",
    }
    score_thr = _SCORE_THR if args.score_thr is None else args.score_thr
    with run_failures(), Outputs(args.out_dir, cfg, predictor, score_thr, info) as outputs:
        summary = _predict_all(sources, predictor, outputs, args.batch_size, args.show_tokens)
    _report(summary, len(sources), args.out_dir)
    return summary


def _check_numbers(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least one image at a time")
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: scores are between 0 and 1")


def _check_unused(folder: str) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--out-dir {folder} is a file; name a folder")
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"--out-dir {folder} is not empty; name a new folder, or empty it")


def _predict_all(
    sources: list[Source],
    predictor: Predictor,
    outputs: Outputs,
    batch_size: int,
    show_tokens: bool,
) -> Summary:
    run = _Run(predictor)
    started, model_seconds = time.perf_counter(), 0.0
    video = None
    with Progress(transient=True, disable=not get_console().is_terminal) as progress:
        task = progress.add_task("Predicting", total=_num_images(sources))
        for batch in in_batches(run.items(sources), batch_size):
            before = time.perf_counter()
            samples = predictor([item.image for item in batch])
            model_seconds += time.perf_counter() - before
            for item, sample in zip(batch, samples):
                if item.video is not video:
                    video = item.video
                    outputs.end_video()
                    if video:
                        outputs.start_video(video.fps)
                tokens = None
                if show_tokens:
                    tokens = predictor.draw_tokens(item.image, os.path.basename(item.source.path))
                    run.notes["of which all tokens are kept, so that none are drawn"] += not tokens
                outputs.add(item.source, item.frame, item.image.pixels, sample, tokens)
            progress.update(task, completed=outputs.num_written + len(run.unreadable))
    outputs.end_video()
    for what, count in run.notes.items():
        if count:
            say(f"note: {count} image{'s' * (count > 1)} {what}")
    seconds = time.perf_counter() - started
    return Summary(outputs.num_written, seconds, model_seconds, run.unreadable)


def _num_images(sources: Iterable[Source]) -> Optional[int]:
    """Images and frames of videos; None if a video does not say how many it has."""
    total = 0
    for source in sources:
        count = 1
        if source.is_video:
            try:
                with closing(Video(source.path)) as video:
                    count = video.num_announced
            except UnreadableError:
                count = 1
        if not count:
            return None
        total += count
    return total


class _Run:
    """Reads sources one after the other, and remembers what is to be said of them.

    Args:
        predictor: Whose pipeline reads and prepares.

    Attributes:
        unreadable: Files that were left out, and why.
        notes: Of how many images what was not used.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.unreadable: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        self._predictor = predictor

    def items(self, sources: Iterable[Source]) -> Iterator[Item]:
        """All images, and all frames of videos, that can be read."""
        for source in sources:
            try:
                yield from self._frames(source) if source.is_video else self._image(source)
            except UnreadableError as error:
                self.unreadable[source.path] = str(error)
                say(f"warning: {source.path} {error}; it is left out")

    def _image(self, source: Source) -> Iterator[Item]:
        notes = describe_image(source.path, self._predictor.loading)
        prepared = self._predictor.prepare(source.path)
        self.notes.update(f"with {note}" for note in notes)
        yield Item(source, None, prepared, None)

    def _frames(self, source: Source) -> Iterator[Item]:
        with closing(Video(source.path)) as video:
            count = 0
            for count, pixels in enumerate(video, 1):
                yield Item(source, count - 1, self._predictor.prepare(pixels), video)
        if not count:
            raise UnreadableError("has no frame that can be read")
        if count < video.num_announced:
            say(
                f"warning: {source.path} says that it has {video.num_announced} frames, of which "
                f"{count} could be read; it may be damaged"
            )


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group items that follow each other and are given to the model in the same size.

    Others are never together: padded to a common size, each would be predicted a little differently
    than alone.
    """
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == size or item.image.input_shape != batch[0].image.input_shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _report(summary: Summary, num_sources: int, folder: str) -> None:
    """Say what was done.

    Raises:
        SomeLeftOut: If files could not be read.
    """
    count, seconds = summary.num_images, summary.seconds
    if count:
        say(
            f"{count} image{'s' * (count > 1)} in {seconds:.1f} s, {count / seconds:.2f} images per second "
            f"({count / summary.model_seconds:.2f} by the model alone)"
        )
    say(f"Predictions: {folder}")
    if summary.unreadable:
        names = list(summary.unreadable)
        listing = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        rest = "the others were predicted" if count else "so nothing was predicted"
        raise SomeLeftOut(
            f"{len(names)} of {num_sources} files could not be read ({listing}); {rest}"
        )
