"""Operators that are called directly, without the checks of the public functions, refuse what would end the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvssm.ops import neighbor_table
from mmvssm.ops.selective_scan import cpu as scan_cpu
from mmvssm.ops.sparse_depthwise_conv import cpu as conv_cpu

SCAN = torch.ops.mmvssm.selective_scan
SCAN_BACKWARD = torch.ops.mmvssm.selective_scan_backward
CONV = torch.ops.mmvssm.sparse_depthwise_conv
CONV_BACKWARD = torch.ops.mmvssm.sparse_depthwise_conv_backward


def scan(**changes):
    """Arguments of the scan's operator."""
    shapes = dict(u=(1, 4, 2, 3), delta=(1, 4, 2, 3), A=(2, 3, 1), B=(1, 4, 2, 1), C=(1, 4, 2, 1))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors.update(dict.fromkeys(("D", "delta_bias", "order", "source", "gap", "rest")))
    return [*{**tensors, **changes}.values(), True]


def conv(**changes):
    """Arguments of the convolution's operator."""
    table = neighbor_table(torch.arange(4)[None], (2, 2), 3)
    tensors = dict(
        x=torch.zeros(1, 4, 3), weight=torch.zeros(3, 1, 3, 3), neighbors=table, bias=None
    )
    return list({**tensors, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(delta=torch.zeros(1, 3, 2, 3)),
        dict(u=torch.zeros(0, 4, 2, 3)),
        dict(u=torch.zeros(1, 0, 2, 3)),
        dict(B=torch.zeros(1, 4, 2, 2)),
        dict(order=torch.zeros(2, 3, dtype=torch.int32)),
        dict(gap=torch.zeros(2, 4, dtype=torch.int32)),
        dict(u=torch.zeros(4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True])
def test_scan(changes, grad):
    arguments = scan(**changes)
    if grad:
        arguments[0] = arguments[0].requires_grad_()
    with pytest.raises(ValueError, match="selective_scan: "):
        SCAN(*arguments)
    with pytest.raises(ValueError, match="selective_scan: "):
        SCAN_BACKWARD(torch.zeros(1, 4, 2, 3), *scan(**changes), torch.zeros(6))


def test_more_states_than_the_kernel_counts():
    many = dict(A=torch.zeros(2, 3, 1).expand(2, 3, 2**25))
    many.update(B=torch.zeros(1, 4, 2, 1).expand(1, 4, 2, 2**25))
    many.update(C=many["B"])
    with pytest.raises(ValueError, match="A has 33554432 states; 1048576 is the most"):
        SCAN(*scan(**many))


@pytest.mark.parametrize(
    "grad_y, states", [((1, 3, 2, 3), 6), ((1, 4, 2, 3), 5), ((1, 3, 3), 6), ((4, 3), 6)]
)
def test_gradients_of_the_scan(grad_y, states):
    with pytest.raises(ValueError, match="selective_scan_backward: grad_y must have"):
        SCAN_BACKWARD(torch.zeros(grad_y), *scan(), torch.zeros(states))


@pytest.mark.parametrize(
    "changes",
    [
        dict(x=torch.zeros(1, 5, 3)),
        dict(x=torch.zeros(1, 4, 2)),
        dict(x=torch.zeros(4)),
        dict(weight=torch.zeros(3, 1, 5, 5)),
        dict(weight=torch.zeros(())),
        dict(neighbors=torch.zeros(1, 4, 9, dtype=torch.int64)),
        dict(bias=torch.zeros(2)),
    ],
    ids=str,
)
def test_convolution(changes):
    with pytest.raises(ValueError, match="sparse_depthwise_conv: expected x"):
        CONV(*conv(**changes))
    with pytest.raises(ValueError, match="sparse_depthwise_conv: expected x"):
        CONV_BACKWARD(torch.zeros(1, 4, 3), *conv(**changes), True, True, False)


def test_gradients_of_the_convolution():
    with pytest.raises(ValueError, match="sparse_depthwise_conv: expected x"):
        CONV_BACKWARD(torch.zeros(1, 3, 3), *conv(), True, True, False)


def exhaust(operator, threads):
    """Call an operator with arguments that its kernel packs anew, or keeps a state for, without memory for that."""
    import resource

    torch.get_num_threads = lambda: threads
    if operator == "scan":
        states = dict(A=torch.zeros(2, 3, 2**19))
        states.update(B=torch.zeros(1, 4, 2, 1).expand(1, 4, 2, 2**19))
        call, arguments = SCAN, scan(**states, C=states["B"].clone())
        arguments[3] = arguments[3].contiguous()
    else:
        many = 2**22
        call, arguments = CONV, conv(x=torch.zeros(1, 4, many), weight=torch.zeros(many, 1, 3, 3))
    SCAN(*scan()), CONV(*conv())  # starts the threads
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27, before[1]))
    try:
        with pytest.raises((MemoryError, RuntimeError), match=r"out of memory\.$"):
            call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
@pytest.mark.skipif(
    not (scan_cpu.available() and conv_cpu.available()), reason="the kernels are not compiled"
)
@pytest.mark.parametrize("operator", ["scan", "conv"])
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_is_an_error(operator, threads):
    """In a process of its own: tests before it leave freed memory, which would be used again."""
    code = f"from test_direct_calls import exhaust; exhaust({operator!r}, {threads})"
    repository = Path(__file__).parents[3]
    paths = map(str, (Path(__file__).parent, repository, repository / "tests"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fitting_arguments_pass():
    y, states = SCAN(*scan())
    assert SCAN_BACKWARD(y, *scan(), states)[0].shape == y.shape
    y, states = SCAN(*scan(u=torch.zeros(1, 4, 1, 3)), True)
    assert y.shape == (1, 4, 3)
    gradients = SCAN_BACKWARD(y, *scan(u=torch.zeros(1, 4, 1, 3)), states)
    assert [x.shape for x in gradients[:2]] == [(1, 4, 1, 3), (1, 4, 2, 3)]
    assert CONV(*conv(weight=torch.zeros(3, 9))).shape == (1, 4, 3)
