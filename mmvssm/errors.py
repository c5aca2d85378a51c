"""Errors that the user can fix, reported in one line instead of a traceback."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable

from mmengine.dist import is_distributed

TRACEBACK_VARIABLE = "MMVSSM_TRACEBACK"
_SIGPIPE = 128 + 13  # the exit code of programs that a closed pipe ends
HINT = f"(--traceback, or {TRACEBACK_VARIABLE}=1, shows where in the code this surfaced)"

# Some releases of mmengine prefix what a constructor raised with "class `X` in module.path: ".
_BUILD_PREFIX = re.compile(r"^class `[^`]+` in [\w./-]+: ")


class UserError(Exception):
    """A mistake that the user can correct; its message is one clear line that says how."""

    exit_code = 1


class RunFailure(UserError):
    """The machine failed one process of a run (memory, disk, workers); that process reports it, whatever its rank."""


class Stopped(UserError):
    """A signal ended the run.

    Args:
        message: One line of text.
        signal_number: Number of the signal; the exit code is 128 plus this number, as in shells.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_interruption(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or was raised while Ctrl-C was handled, as in mmengine's formatting of a config.

    Args:
        error: The exception.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` as one line, without the prefixes of mmengine's config and registry.

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
    """Convert exceptions raised inside to :class:`UserError`.

    For steps that only read the user's input (config, model definition, files), where every exception is about that
    input.

    Args:
        doing: Prefix of the message, such as ``"cannot build the model"``.
        kinds: Exceptions to convert.

    Raises:
        UserError: In place of any of those exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        sentence = one_line(error)
        raise UserError(f"{doing}: {sentence}" if doing else sentence) from error


class _ShowTraceback(argparse.Action):
    """Sets the environment variable that :func:`run_tool` reads."""

    def __call__(self, *args: Any) -> None:
        os.environ[TRACEBACK_VARIABLE] = "1"


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--traceback``, which :func:`run_tool` names in its output."""
    parser.add_argument(
        "--traceback",
        action=_ShowTraceback,
        nargs=0,
        help="show where in the code a mistake surfaced",
    )


def run_tool(main: Callable[[], None]) -> None:
    """Run a command-line tool; a :class:`UserError` becomes one line on stderr and its exit code.

    A second line names ``--traceback``, which shows the traceback by setting ``MMVSSM_TRACEBACK`` to 1. Of several
    processes only the first of each machine prints, except for a :class:`RunFailure`.

    Args:
        main: The tool's main function.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        if is_interruption(error) and not isinstance(error, Stopped):
            print("error: interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        if _output_is_lost() and isinstance(error, OSError):  # as in `predict.py ... | head`
            sys.exit(_SIGPIPE)
        if not isinstance(error, UserError):
            raise
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        if isinstance(error, RunFailure) or is_first_of_machine():
            print(f"error: {printable(str(error))}\n{HINT}", file=sys.stderr)
        sys.exit(error.exit_code)


def _output_is_lost() -> bool:
    """Whether stdout is closed or full; Python's own flush at its end succeeds then."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def is_first_of_machine() -> bool:
    """Whether this is a machine's first rank of a run; also works before torchrun's processes form a group."""
    if not is_distributed() and "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def printable(text: str, keep: str = "") -> str:
    """Replace characters that control a terminal, or that no encoding has, by spaces, except those in ``keep``."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


_NAMES_SHOWN = 3
_LONGEST_NAME = 60  # characters of a file's content that a message repeats


def shown(names: Sequence[Any]) -> str:
    """List the first few of ``names``, which may be any objects from a file."""
    return ", ".join(map(brief, names[:_NAMES_SHOWN])) + ", ..." * (len(names) > _NAMES_SHOWN)


def brief(words: Any) -> str:
    """Shorten text from a file for a message and replace its control characters."""
    text = printable(str(words)[: _LONGEST_NAME + 1])
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
