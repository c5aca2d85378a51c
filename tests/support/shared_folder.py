"""Make slow things once for all processes that run the tests."""

import fcntl
import os
from contextlib import contextmanager


@contextmanager
def shared_folder(tmp_path_factory, name):
    """A folder of that name, the same for all processes, of which one at a time is in here."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    folder = folder / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
