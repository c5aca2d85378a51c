"""Data-loading worker processes."""

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
    """Let a worker say what goes wrong, and end when its parent does, not before.

    - A batch that cannot be handed over (a full ``/dev/shm``, most often) reaches the training
      process as an exception. Python would print a traceback and drop the batch, and the training
      process would wait for it for ever: mmengine's ``pseudo_collate`` leaves tensors to be put into
      shared memory on the way out, by a thread whose errors nobody sees.
    - Ctrl-C and a cluster's SIGTERM reach every process of a run. What they mean is for the training
      process to decide, which may need the next batch to finish properly.
    - When the training process is killed, its workers can be left waiting for a reader that will
      never come, each holding its memory. On Linux the kernel is asked to end them too.
    - A training process that stops in the middle of taking over a batch is no news to report from here: it has said
      why it stops.

    Random numbers are seeded by PyTorch itself: Python's, NumPy's and its own, by worker and epoch.
    (mmengine's default repeats one seed each time workers start.)

    Args:
        worker_id: Number of the worker within its data loader.
    """
    on_queue_feeder_error(_send_error)
    sys.excepthook = _report_unless_parent_left
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_parent_only, daemon=True).start()


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, item: Any) -> None:
    """Send ``error`` in place of the ``(number, batch)`` that could not be sent."""
    wrapped = ExceptionWrapper((type(error), error, error.__traceback__), where="in a data worker")
    queue.put((item[0], wrapped))


def _report_unless_parent_left(kind: type, error: BaseException, traceback: Any) -> None:
    """What the thread that hands over tensors calls when its connection breaks."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _heed_parent_only() -> None:
    """End at the parent's SIGTERM, and at nobody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
