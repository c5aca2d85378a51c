"""Decisions that every process of a distributed run takes alike."""

import torch
from mmengine.dist import all_reduce, get_world_size


def any_process(condition: bool) -> bool:
    """Whether ``condition`` holds in at least one process; a collective of one number.

    Args:
        condition: What this process found.
    """
    return any_process_each(condition)[0]


def any_process_each(*conditions: bool) -> list[bool]:
    """:func:`any_process` of each of several conditions, in one collective of as many numbers.

    Args:
        conditions: What this process found; as many in every process.
    """
    if get_world_size() == 1:
        return [bool(condition) for condition in conditions]
    flags = torch.tensor([float(condition) for condition in conditions])
    all_reduce(flags, op="max")
    return [bool(flag) for flag in flags]
