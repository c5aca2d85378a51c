"""Data-loading worker processes."""

import ctypes
import os
import random
import signal
import sys

import numpy as np
import torch

from ..registry import FUNCTIONS

_PR_SET_PDEATHSIG = 1


@FUNCTIONS.register_module()
def init_worker(worker_id: int) -> None:
    """Seed a worker and let it end with its parent.

    PyTorch gives every worker of every epoch a seed of its own; NumPy and Python take theirs from
    it. (mmengine's default repeats one seed each time workers start.)

    When the training process is killed, its workers can be left waiting for a reader that will
    never come, each holding its memory. On Linux the kernel is asked to end them too.

    Args:
        worker_id: Number of the worker within its data loader.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    if sys.platform == "linux":
        parent = torch.multiprocessing.parent_process()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent.pid:  # it was already gone
            os._exit(1)
