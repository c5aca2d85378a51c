"""Set up the worker processes of data loaders."""

import multiprocessing.queues
import os
import signal
import sys
import threading
from typing import Any

from torch._utils import ExceptionWrapper

from ...private_names import on_queue_feeder_error
from ...processes import end_with_parent
from ...registry import FUNCTIONS


@FUNCTIONS.register_module()
def init_worker(worker_id: int) -> None:
    """Make a worker report errors to the trainer, and end with it and not earlier.

    - A batch that cannot be sent (usually ``/dev/shm`` is full) raises an exception in the trainer. Otherwise Python
      prints a traceback, drops the batch, and the trainer hangs: with mmengine's ``pseudo_collate``, a background
      thread moves tensors to shared memory.
    - Ctrl-C and a cluster's SIGTERM reach every process of a run. Workers ignore them, since the trainer decides what
      to do and may need the next batch.
    - When the trainer is killed, workers could wait for it forever and hold their memory. On Linux the kernel ends
      them too.
    - Connection errors after the trainer exits are not reported; the trainer has already printed the cause.

    PyTorch itself seeds Python's, NumPy's and its own random numbers by worker and epoch; mmengine's default repeats
    one seed each time workers start.

    Args:
        worker_id: Number of the worker within its data loader.
    """
    on_queue_feeder_error(_send_error)
    sys.excepthook = _report_unless_parent_left
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, daemon=True).start()


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, item: Any) -> None:
    """Send ``error`` instead of the ``(number, batch)`` that could not be sent."""
    wrapped = ExceptionWrapper((type(error), error, error.__traceback__), where="in a data worker")
    queue.put((item[0], wrapped))


def _report_unless_parent_left(kind: type, error: BaseException, traceback: Any) -> None:
    """Handle exceptions of the thread that sends tensors; ignore a connection that the trainer closed."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _exit_on_parent_sigterm() -> None:
    """End at a SIGTERM from the parent; ignore those from others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
