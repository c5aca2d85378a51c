"""Run a set of trainings as processes, several at a time; skip finished ones and resume others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

from mmvssm.analysis.training_log import read_run
from mmvssm.errors import UserError, user_mistakes
from mmvssm.files import read_json, read_text, write_whole
from mmvssm.run.setup import print_once

RESULT, _OUTPUT, _PARTS, _ORIGIN = "result.json", "output.txt", "seconds.txt", "origin.json"
_AGAIN = "result_again.json"
_LOOK_EVERY = 0.2  # seconds
_TELL_EVERY = 300.0


@dataclass(frozen=True)
class Task:
    """A command that runs in its own process.

    Attributes:
        name: Unique name, for output.
        folder: Its work dir.
        command: Command to run. We add ``--work-dir``, and ``--resume`` if there is a checkpoint.
        finish: Called with the folder after the command; returns the result.
        after: Names of the tasks that must finish before.
        settings: Settings that determine the result, for JSON. We reject a folder whose run has other settings, instead
            of resuming that run or taking its result.
        prepare: Called before the process starts; ``folder`` exists then.
        weights: File that the command writes and tasks after it read. If it is gone when one of these is to run, the
            command runs again; the result stays that of the first run.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    finish: Callable[[Path], dict[str, Any]] = field(repr=False)
    after: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    prepare: Optional[Callable[[], None]] = field(default=None, repr=False)
    weights: Optional[Path] = None

    @property
    def result(self) -> Optional[dict[str, Any]]:
        """The result of ``finish`` and the ``seconds`` that the processes took; None before."""
        path = self.folder / RESULT
        with damaged(path):
            result = read_json(path, dict) if path.exists() else None
            if result is not None:
                _ = {key: float(value) for key, value in result.items()}["seconds"]
        return result


def damaged(path: Path) -> AbstractContextManager[None]:
    """Report errors about a file of a campaign in one line, as a :class:`UserError`."""
    return user_mistakes(f"{path} is damaged; restore it, or move the folder {path.parent} away")


def run_tasks(tasks: Sequence[Task], jobs: int = 1) -> None:
    """Run the unfinished tasks, each as soon as the tasks before it are finished.

    Every process has one thread. On Ctrl-C or SIGTERM we stop the processes, which save checkpoints; the next call
    resumes them.

    Args:
        tasks: Tasks in order of priority.
        jobs: Number of processes at a time.

    Raises:
        UserError: Before any task starts, if a folder has a run with other settings, or from another run of a task
            before it. At the end, if some tasks failed; we still run tasks that do not depend on them.
    """
    by_name = {task.name: task for task in tasks}
    for task in tasks:
        _refuse_another(task, by_name)
    done = {task.name for task in tasks if task.result is not None}
    again = _without_weights(tasks, by_name, done)
    for name in again:
        print_once(f"{name} runs again for those that start from its weights, which are gone")
    done -= again
    waiting = [task for task in tasks if task.name not in done]
    failed: list[Task] = []
    print_once(
        f"{len(done)} of {len(tasks)} runs were done before" if done else f"{len(tasks)} runs"
    )
    with _processes() as running:
        told = time.monotonic()
        while True:
            ready = [task for task in waiting if done.issuperset(task.after)]
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                origin = json.dumps(_origin(task, by_name))
                write_whole(task.folder / _ORIGIN, origin + "\n")
                if task.prepare:
                    task.prepare()
                running[task.name] = _Process(task)
            if not running:
                break
            time.sleep(_LOOK_EVERY)
            for process in [process for process in running.values() if process.ended]:
                task = running.pop(process.task.name).task
                if process.succeeded:
                    result = _write_result(task)
                    done.add(task.name)
                    print_once(f"[{len(done)} of {len(tasks)}] {task.name}: {_in_words(result)}")
                else:
                    failed.append(task)
                    print_once(f"{task.name} failed, see {task.folder / _OUTPUT}")
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                print_once("; ".join(process.progress for process in running.values()))
    if failed:
        left = f" and {len(waiting)} that wait for them were skipped" * bool(waiting)
        raise UserError(
            f"of {len(tasks)} runs {', '.join(task.name for task in failed)} failed{left}; the end of "
            f"{failed[0].folder / _OUTPUT} has the cause; the same command resumes from here"
        )


def _without_weights(
    tasks: Sequence[Task], by_name: Mapping[str, Task], done: set[str]
) -> set[str]:
    """Return the names of finished tasks whose weights are gone, and needed by what is still to run."""
    again: set[str] = set()
    while True:
        to_run = [task for task in tasks if task.name not in done - again]
        needed = {name for task in to_run for name in task.after} & done - again
        gone = {n for n in needed if by_name[n].weights and not by_name[n].weights.exists()}
        if not gone:
            return again
        again |= gone  # which may need weights of others in turn


class _Process:
    """The process of a task; its time is recorded however it ends."""

    def __init__(self, task: Task) -> None:
        self.task = task
        command = [*task.command, "--work-dir", str(task.folder)]
        if (task.folder / "last_checkpoint").exists():
            command.append("--resume")
        self._begun = time.monotonic()
        with open(task.folder / _OUTPUT, "a") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def ended(self) -> bool:
        if self._process.poll() is None:
            return False
        with open(self.task.folder / _PARTS, "a") as parts:
            parts.write(f"{time.monotonic() - self._begun:.1f}\n")
        return True

    @property
    def succeeded(self) -> bool:
        return self._process.returncode == 0

    @property
    def progress(self) -> str:
        minutes = f"{self.task.name}: {(time.monotonic() - self._begun) / 60:.0f} min"
        try:
            curve = read_run(str(self.task.folder)).training["loss"]
        except (UserError, KeyError):  # nothing logged yet, or nothing that trains
            return minutes
        return f"{minutes}, iteration {curve.steps[-1]}, loss {curve.values[-1]:.3f}"

    def end(self) -> None:
        """Send SIGTERM, so that it saves, and wait for its end."""
        self._process.terminate()
        self._process.wait()
        _ = self.ended


@contextmanager
def _processes() -> Iterator[dict[str, _Process]]:
    """Yield a dictionary of processes by name; stop those that still run at the end of the context."""

    def stop(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    running: dict[str, _Process] = {}
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield running
    finally:
        for process in running.values():
            process.end()
        signal.signal(signal.SIGTERM, before)


def _origin(task: Task, tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Return a run's settings and the results of the tasks before it."""
    found = dict(
        settings=dict(task.settings), after={name: tasks[name].result for name in task.after}
    )
    return json.loads(json.dumps(found))  # tuples as lists, as a file has them


def _refuse_another(task: Task, tasks: Mapping[str, Task]) -> None:
    path = task.folder / _ORIGIN
    _seconds(task)  # now rather than at its end
    if not path.exists():
        return
    with damaged(path):
        before = read_json(path, dict)
        settings, after = before["settings"], dict(before["after"])
    now = _origin(task, tasks)
    others = [name for name, result in now["after"].items() if after.get(name) != result]
    if others:
        what = f"that came from another run of {others[0]}"
    elif settings != now["settings"]:
        key, was, expected = _first_difference(settings, now["settings"])
        what = f"with {key} {was}, not {expected}"
    else:
        return
    raise UserError(
        f"{task.folder} has a run {what}. Move that folder away, or have all runs written elsewhere"
    )


def _first_difference(was: Any, now: Any, key: str = "") -> tuple[str, Any, Any]:
    """Return the dotted key of the first difference and both values; None for a missing one."""
    if isinstance(was, dict) and isinstance(now, dict):
        pairs = {name: (was.get(name), now.get(name)) for name in (*was, *now)}
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = {str(index): pair for index, pair in enumerate(zip(was, now))}
    else:
        return key, was, now
    name, pair = next((name, pair) for name, pair in pairs.items() if pair[0] != pair[1])
    return _first_difference(*pair, f"{key}.{name}".lstrip("."))


def _seconds(task: Task) -> float:
    path = task.folder / _PARTS
    with damaged(path):
        return sum(map(float, read_text(path).split())) if path.exists() else 0.0


def _write_result(task: Task) -> dict[str, Any]:
    result = task.finish(task.folder)
    result["seconds"] = _seconds(task)
    # What came from the first run's weights keeps its origin.
    name = _AGAIN if (task.folder / RESULT).exists() else RESULT
    write_whole(task.folder / name, json.dumps(result) + "\n")
    return result


def _in_words(result: dict[str, Any]) -> str:
    values = {key: value for key, value in result.items() if key != "seconds"}
    return ", ".join(
        [
            *(f"{key} {value:.2f}" for key, value in values.items()),
            f"{result['seconds'] / 60:.1f} min",
        ]
    )


def with_requirements(names: Iterable[str], requires: Callable[[str], Iterable[str]]) -> set[str]:
    """Return some arms and all that they need, directly or not.

    Args:
        names: Names of arms.
        requires: Returns the names of the arms that one needs.
    """
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += requires(name)
    return found


def settle(out: Path, settings: Mapping[str, Any]) -> None:
    """Save the settings that all runs in a folder share.

    Args:
        out: The folder, created if it is missing.
        settings: Settings for JSON, by the name of their option.

    Raises:
        UserError: If existing runs have other settings.
    """
    path = out / "campaign.json"
    if not path.exists():
        write_whole(path, json.dumps(settings) + "\n")
        return
    with damaged(path):
        before = read_json(path, dict)
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"the runs in {out} have {key.replace('_', '-')} {before.get(key)}, not {value}; name another --out"
            )


def last_metric(folder: Path, key: str) -> float:
    """Return a metric of a training's last evaluation.

    Args:
        folder: The training's work dir.
        key: Name of the metric, such as ``'accuracy/top1'``.

    Raises:
        UserError: If no evaluation logged it.
    """
    metrics = read_run(str(folder)).metrics
    if key not in metrics:
        found = ", ".join(metrics) or "none"
        raise UserError(f"no evaluation in {folder} logged {key}; metrics that are there: {found}")
    return metrics[key].values[-1]
