"""Call a function in two processes of one gloo group; a call that hangs fails."""

import multiprocessing
import os
import queue
import time
from datetime import timedelta

import torch


def in_two_processes(function, folder, seconds=60, **options):
    """Call ``function(rank)`` in two forked processes.

    Args:
        function: Need not be picklable; what it returns or raises has to be.
        folder: An empty one for the processes to find each other.
        seconds: After which both are killed and the test fails.
        options: Of ``init_process_group``.

    Returns:
        What it returned by rank, or ``"Type: message"`` of the exception that it raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(function, rank, folder, results, options), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    try:
        found = dict(results.get(timeout=max(0, end - time.monotonic())) for _ in processes)
    except queue.Empty:
        raise AssertionError(f"the processes were not done after {seconds} seconds") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(2)]


def _run(function, rank, folder, results, options):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    # Shorter than the test's own time, so that the one left alone is heard too.
    options = {"timeout": timedelta(seconds=30), **options}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, **options
    )
    try:
        outcome = function(rank)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    results.put((rank, outcome))
    results.close()
    results.join_thread()
    # The other may still need this one's connection.
    time.sleep(3600)
