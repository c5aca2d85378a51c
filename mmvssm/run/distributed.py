"""Set up distributed training, with or without GPUs."""

import os
import socket
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank, init_dist, is_distributed
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from ..errors import RunFailure, UserError
from ..processes import any_process
from .failures import run_failures

_SYNCHRONISED_NORMS = ("SyncBN", "MMSyncBN")
_ROUTES = Path("/proc/net/route")
_UP, _REJECT = 0x1, 0x200  # flags of a route


def init_processes(cfg: Config) -> None:
    """Join the processes that ``cfg.launcher`` started into one group.

    On GPUs this is mmengine's own initialisation. Without GPUs, mmengine would still ask CUDA for a device, so we
    create the group over gloo; mmengine then keeps it.

    Args:
        cfg: Training or test config. Without GPUs, we set a model wrapper for CPUs.

    Raises:
        UserError: If the launcher's environment is missing.
        RunFailure: If this process has no GPU, because there are more processes than GPUs.
    """
    if cfg.launcher == "none" or is_distributed():
        return
    env_cfg = cfg.get("env_cfg", {})
    # mmengine's initialisation would otherwise choose "spawn" for data workers.
    set_multi_processing(**env_cfg.get("mp_cfg", {}), distributed=True)
    choose_interface()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if cfg.launcher == "pytorch" and local_rank >= torch.cuda.device_count():
            raise RunFailure(  # only on the ranks without a GPU
                f"more processes than GPUs were started: this machine has "
                f"{torch.cuda.device_count()}"
            )
        with run_failures():
            init_dist(cfg.launcher, **env_cfg.get("dist_cfg", {}))
        choose_interface()  # of our own groups over gloo; mmengine has now asked Slurm for MASTER_ADDR
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if cfg.launcher != "pytorch" or missing:
        raise UserError(
            f"--launcher {cfg.launcher} cannot start here: this machine has no GPU, and without one only "
            "tools/dist_train.sh and tools/dist_test.sh, or torchrun with --launcher pytorch, start several processes"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    with run_failures():
        torch.distributed.init_process_group(backend="gloo")
    cfg.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )


def choose_interface() -> None:
    """Let gloo connect over the interface that leads to ``MASTER_ADDR``, if there may be several machines.

    By default gloo takes the address of the host's own name, which is the loopback device's on many machines; no other
    machine can connect to that. ``GLOO_SOCKET_IFNAME`` in the environment takes precedence.
    """
    master, size = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("WORLD_SIZE")
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == size or master in ("localhost", "127.0.0.1")
    if one_machine or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = socket.gethostbyname(master)
        routes = _ROUTES.read_text()
    except OSError:  # no such host, no IPv4, no Linux: gloo chooses
        return
    interface = interface_to(address, routes)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_to(address: str, routes: str) -> Optional[str]:
    """Return the network interface by which packets to an address leave this machine.

    Args:
        address: An IPv4 address. For a loopback address, which rank 0's own name may have on its machine, we take the
            default route.
        routes: Text of Linux's ``/proc/net/route``: a heading, and routes with addresses in hexadecimal.

    Returns:
        The interface of the most specific route, of several such the one with the lowest metric; None without a route.
    """
    address = "0.0.0.0" if address.startswith("127.") else address
    target = int.from_bytes(socket.inet_aton(address), sys.byteorder)
    found = []
    for line in routes.splitlines()[1:]:
        name, network, _, flags, _, _, metric, mask = line.split()[:8]
        if int(flags, 16) & (_UP | _REJECT) == _UP and target & int(mask, 16) == int(network, 16):
            found.append((bin(int(mask, 16)).count("1"), -int(metric), name))
    return max(found)[2] if found else None


def adapt_to_machine(cfg: Config) -> None:
    """Replace layers that need a GPU, and add a hook that several ranks need.

    Synchronised batch norm exists on GPUs only; without one it becomes plain batch norm. If ranks have separate batch
    norm statistics, they are averaged after each epoch and before validation, so that all ranks evaluate the same
    model.

    Args:
        cfg: Changed in place.
    """
    if not torch.cuda.is_available():
        _replace_norms(cfg.model)
        cfg.pop("sync_bn", None)
    if cfg.launcher != "none":
        hooks = list(cfg.get("custom_hooks") or [])
        if not any(hook.get("type") == "SyncBuffersHook" for hook in hooks):
            cfg.custom_hooks = [*hooks, ConfigDict(type="SyncBuffersHook")]


def collect_over_network(runner: Runner) -> None:
    """Let evaluators of a run on several machines collect results over the network.

    By default they write files for rank 0, which needs a common disk; an evaluator with ``collect_dir`` still does.

    Args:
        runner: Before it builds its evaluators.
    """
    if not any_process(int(os.environ.get("LOCAL_RANK", 0)) != get_rank()):  # one machine
        return
    build = runner.build_evaluator

    def build_and_set(evaluator: Any) -> Evaluator:
        built = build(evaluator)
        for metric in built.metrics:
            if metric.collect_dir is None:
                metric.collect_device = "gpu"  # mmengine's word for collectives, also without a GPU
        return built

    runner.build_evaluator = build_and_set


def _replace_norms(node: Any) -> None:
    """Turn synchronised norms in a model config into plain ones, in place.

    mmengine's ``revert_sync_batchnorm`` acts on a model. That is too late: the runner builds and wraps the model in one
    step, and PyTorch's wrapper rejects ``SyncBatchNorm`` on CPUs.
    """
    if isinstance(node, dict):
        if node.get("type") in _SYNCHRONISED_NORMS:
            node["type"] = "BN"
        for value in node.values():
            _replace_norms(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _replace_norms(value)
