"""Predict on images and videos, and write pictures and predictions to a folder."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice

from rich import get_console
from rich.progress import Progress

from ..analysis.pruning_view import pruned_backbone
from ..errors import UserError, is_interruption, shown
from ..version import __version__
from .checkpoints import Checkpoint
from .failures import explain_failure, run_failures
from .prediction.outputs import Outputs
from .prediction.predictor import Item, Predictor
from .prediction.sources import (
    Source,
    UnreadableError,
    count_frames,
    describe_image,
    find_sources,
    fps_of,
    open_video,
)
from .setup import LIBRARIES, open_config, print_once

_SCORE_THR = 0.3


class FilesSkipped(UserError):
    """Raised at the end if some files could not be read or predicted; all others were."""

    exit_code = 3


def predict(args: argparse.Namespace) -> None:
    """Predict on the inputs of the command line.

    Args:
        args: Parsed by :func:`~.arguments.predict_parser`.

    Raises:
        UserError: If an argument, the config or the checkpoint cannot be used; nothing is written then.
        FilesSkipped: At the end, if some files could not be read or predicted.
    """
    _check_arguments(args)
    sources, warnings = find_sources(args.inputs)
    cfg = open_config(args, libraries=LIBRARIES)
    if args.score_thr is not None and cfg.default_scope != "mmdet":
        raise UserError("--score-thr is for detectors, which this config's model is not")
    predictor = Predictor(cfg, Checkpoint.load(args.checkpoint), args.device)
    if args.show_tokens:
        pruned_backbone(predictor.model)
    for warning in warnings:
        print_once(f"warning: {warning}")
    info = {
        "config": args.config,
        "checkpoint": args.checkpoint,
        "version": f"mmvssm {__version__}",
    }
    score_thr = _SCORE_THR if args.score_thr is None else args.score_thr
    run = _Run(predictor)
    outputs = Outputs(args.out_dir, cfg, predictor, score_thr, info)
    with _exit_on_sigterm(), run_failures(), outputs:
        run.predict(sources, outputs, args.batch_size, args.show_tokens)
    print_once(f"Predictions: {args.out_dir}")
    if run.skipped:
        rest = "the others were predicted" if outputs.num_written else "so nothing was predicted"
        raise FilesSkipped(
            f"{len(run.skipped)} of {len(sources)} files could not be predicted ({shown(run.skipped)}); {rest}"
        )


def _check_arguments(args: argparse.Namespace) -> None:
    folder = args.out_dir
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        raise UserError(f"--score-thr {args.score_thr}: scores are between 0 and 1")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--out-dir {folder} is a file; name a folder")
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"--out-dir {folder} is not empty; name a new folder, or empty it")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that open files are completed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """One run over all sources.

    Args:
        predictor: The model and its test pipeline.

    Attributes:
        skipped: Files that could not be read or predicted.
        notes: Number of images by note.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.skipped: list[str] = []
        self.notes: Counter[str] = Counter()
        self._errors: list[Exception] = []
        self._predictor = predictor

    def predict(
        self, sources: Sequence[Source], outputs: Outputs, batch_size: int, show_tokens: bool
    ) -> None:
        """Predict on all sources, write the outputs, and print notes and the speed."""
        started, model_seconds = time.perf_counter(), 0.0
        with Progress(transient=True, disable=not get_console().is_terminal) as progress:
            task = progress.add_task("Predicting", total=sum(map(count_frames, sources)))
            for batch in in_batches(self._items(sources), batch_size):
                before, samples = time.perf_counter(), []
                with self._input_at_fault(batch):
                    samples = self._predictor([item.image for item in batch])
                model_seconds += time.perf_counter() - before
                for item, sample in zip(batch, samples):
                    with self._input_at_fault([item]):
                        outputs.add(item, sample, self._tokens(item) if show_tokens else None)
                progress.update(task, completed=outputs.num_written + len(self.skipped))
        if self._errors and not outputs.num_written:  # it is not the input
            raise self._errors[0]
        for what, count in self.notes.items():
            print_once(f"note: {_images(count)} {what}")
        count, seconds = outputs.num_written, time.perf_counter() - started
        if count:
            print_once(
                f"{_images(count)} in {seconds:.1f} s, {count / seconds:.2f} images per second "
                f"({count / model_seconds:.2f} by the model alone)"
            )

    def _items(self, sources: Iterable[Source]) -> Iterator[Item]:
        """Yield all images and all frames of videos; skip files that cannot be read."""
        for source in sources:
            try:
                yield from self._frames(source) if source.is_video else self._image(source)
            except UnreadableError as error:
                self._skip(source, str(error))

    def _skip(self, source: Source, why: str) -> None:
        if source.path not in self.skipped:  # by an earlier frame
            self.skipped.append(source.path)
            print_once(f"warning: {source.path} {why}; we skip it")

    @contextmanager
    def _input_at_fault(self, items: Sequence[Item]) -> Iterator[None]:
        """Skip items on any error that is not about the machine or the user's settings."""
        try:
            yield
        except Exception as error:
            explained = isinstance(error, (UserError, OSError)) or is_interruption(error)
            if explained or explain_failure(error):
                raise
            self._errors.append(error)
            for item in items:
                self._skip(item.source, f"cannot be predicted ({error!r})")

    def _image(self, source: Source) -> Iterator[Item]:
        notes = describe_image(source.path, self._predictor.loading)
        image = self._predictor.prepare(source.path)
        self.notes.update(f"with {note}" for note in notes)
        yield Item(source, image)

    def _frames(self, source: Source) -> Iterator[Item]:
        count = 0
        with open_video(source.path) as video:
            for count, pixels in enumerate(video, 1):
                yield Item(source, self._predictor.prepare(pixels), count - 1, fps_of(video))
            announced = video.frame_cnt
        if not count:
            raise UnreadableError("has no readable frame")
        if count < announced:
            print_once(
                f"warning: {source.path} announces {announced} frames, but only {count} could be read; "
                "it may be damaged"
            )

    def _tokens(self, item: Item) -> object:
        tokens = self._predictor.draw_tokens(item.image, os.path.basename(item.source.path))
        if tokens is None:
            self.notes["kept all tokens; no token picture was drawn"] += 1
        return tokens


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group consecutive items whose input to the model has the same shape.

    We never pad images to a common size: the model would then predict them a little differently than alone.

    Args:
        items: Images and frames.
        size: The most items of a batch.
    """
    for _, group in groupby(items, key=lambda item: item.image.input_shape):
        while batch := list(islice(group, size)):
            yield batch


def _images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"
