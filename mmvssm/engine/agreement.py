"""Decisions that every process of a distributed run takes alike."""

import torch
from mmengine.dist import all_reduce, get_world_size


def any_process(condition: bool) -> bool:
    """Whether ``condition`` holds in at least one process; a collective of one number.

    Args:
        condition: What this process found.
    """
    if get_world_size() == 1:
        return condition
    flag = torch.tensor(float(condition))
    all_reduce(flag, op="max")
    return bool(flag)
