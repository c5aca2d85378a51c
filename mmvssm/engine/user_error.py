"""Mistakes a user can make, and what can befall a run."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; its message is one clear sentence for them."""

    exit_code = 1
    # Of several processes only the first speaks, for what all of them meet alike.
    every_rank = False


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
