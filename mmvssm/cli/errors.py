"""Mistakes a user can make, told in one sentence instead of a traceback."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

from mmengine.dist import is_distributed

from ..engine import Stopped, UserError, is_interruption

TRACEBACK_VARIABLE = "MMVSSM_TRACEBACK"
HINT = f"(--traceback, or {TRACEBACK_VARIABLE}=1, shows where in the code this surfaced)"

# Where each launcher tells a process its number on its machine.
_LOCAL_RANK = {
    "pytorch": "LOCAL_RANK",
    "slurm": "SLURM_LOCALID",
    "mpi": "OMPI_COMM_WORLD_LOCAL_RANK",
}

# Some releases of mmengine prefix what a constructor raised with "class `X` in module.path: ".
_BUILD_PREFIX = re.compile(r"^class `[^`]+` in [\w./-]+: ")


def one_sentence(error: BaseException) -> str:
    """The message of ``error`` on one line, without what the config machinery wraps around it.

    Args:
        error: Any exception.

    Returns:
        A non-empty line of text.
    """
    # str(KeyError) is the repr of its argument, quotes included.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    while _BUILD_PREFIX.match(text):
        text = _BUILD_PREFIX.sub("", text)
    if isinstance(error, KeyError) and " " not in text:
        return f"the config lacks the key {text!r}"
    return text or type(error).__name__


@contextmanager
def user_mistakes(
    doing: str = "", kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what is raised inside into a :class:`UserError`.

    For the steps that only read what the user gave (config, model definition, files), where
    every exception is about that input.

    Args:
        doing: What was being done, put before the message, such as ``"cannot build the model"``.
        kinds: Which exceptions are about that input.

    Raises:
        UserError: In place of any of those exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        sentence = one_sentence(error)
        raise UserError(f"{doing}: {sentence}" if doing else sentence) from error


class _ShowTraceback(argparse.Action):
    """Sets the variable that :func:`run_tool` looks for."""

    def __call__(self, *args: Any) -> None:
        os.environ[TRACEBACK_VARIABLE] = "1"


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Give a tool the option ``--traceback`` that :func:`run_tool` speaks of."""
    parser.add_argument(
        "--traceback",
        action=_ShowTraceback,
        nargs=0,
        help="show where in the code a mistake surfaced",
    )


def run_tool(main: Callable[[], None]) -> None:
    """Run a command-line tool; a :class:`UserError` becomes one line on stderr and its exit code.

    A second line says how to see more: the whole traceback appears with ``--traceback``, which sets
    the environment variable ``MMVSSM_TRACEBACK`` to 1. Of several distributed processes only the first
    of each machine speaks, because a file may be missing on one machine alone.

    Args:
        main: The tool's main function.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        if is_interruption(error) and not isinstance(error, Stopped):
            print("error: interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if not isinstance(error, UserError):
            raise
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if not (error.told_elsewhere or _is_told_by_another(error, "pytorch", is_distributed())):
            text = "".join(c if c.isprintable() else " " for c in str(error))
            print(f"error: {text}\n{HINT}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def before_processes_meet(launcher: str) -> Iterator[None]:
    """Let the first process of each machine speak for the others before they are joined to a group.

    Args:
        launcher: That of the command line; with ``"none"`` every process is on its own.
    """
    try:
        yield
    except UserError as error:
        error.told_elsewhere |= _is_told_by_another(error, launcher, launcher != "none")
        raise


def _is_told_by_another(error: UserError, launcher: str, distributed: bool) -> bool:
    if error.every_rank or not distributed:
        return False
    return os.environ.get(_LOCAL_RANK[launcher], "0") != "0"
