"""Mistakes a user can make, and what can befall a run."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; its message is one clear sentence for them."""

    exit_code = 1
    # Of several processes only the first of each machine speaks, for what all there meet alike.
    every_rank = False
    told_elsewhere = False


class RunFailure(UserError):
    """What the surroundings did to a run (memory, disk, network), perhaps to one process only."""

    every_rank = True


class Stopped(UserError):
    """A signal ended the run.

    Args:
        message: One sentence.
        signal_number: Of the signal; shells call such an end by 128 plus that number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_interruption(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or was raised while that was being handled, as mmengine does in formatting a config.

    Args:
        error: What was raised.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class FirstProcessFailed(UserError):
    """What the first of several processes did for all of them failed, and it says why.

    Args:
        message: One sentence.
        exit_code: With which the first process ends.
    """

    told_elsewhere = True

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
