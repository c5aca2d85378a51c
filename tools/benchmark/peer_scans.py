"""Other projects' selective scans on CPUs, and the worker that runs one of them for peers.py.

The worker needs torch and what that one project needs, so that its interpreter can be of another environment. Each scan
takes ``u`` and ``delta (B, L, D)``, ``A (D, N)``, ``B`` and ``C (B, L, N)``, and gives ``y (B, L, D)``.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PASSES = ("forward", "forward and backward")

Inputs = dict[str, Tensor]
Build = Callable[[Inputs], Callable[[], Tensor]]
"""Prepare a scan of some inputs, which is not timed; what it returns is."""


class Scan(NamedTuple):
    """A selective scan of some project.

    Attributes:
        build: Prepares it.
        needs: Module without which it cannot run.
        install: How to install it.
        differentiable: Whether it has a backward pass that we time. Loops in PyTorch have none: autograd fills a tensor
            as large as the input for each token.
        tokens_last: Whether ``u``, ``delta``, ``B``, ``C`` and ``y`` have tokens last. They are views then, not copies.
    """

    build: Build
    needs: str
    install: str = ""
    differentiable: bool = False
    tokens_last: bool = False


def build_definition(inputs: Inputs) -> Callable[[], Tensor]:
    """Prepare our definition of the scan in plain PyTorch, token by token."""
    from mmvssm.ops.selective_scan.naive import selective_scan_naive

    given = with_one_walk(inputs)
    return lambda: selective_scan_naive(**given)[:, :, 0]


def with_one_walk(inputs: Inputs) -> Inputs:
    """Add the axis of walks that our scan has."""
    return {name: x[None] if name == "A" else x[:, :, None] for name, x in inputs.items()}


def build_mamba_ssm(inputs: Inputs) -> Callable[[], Tensor]:
    """Prepare mamba-ssm's reference in plain PyTorch; its kernels need a GPU."""
    # The reference's module imports this extension, which only CUDA builds have.
    sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return lambda: selective_scan_ref(**inputs, delta_softplus=True)


def build_mambapy(inputs: Inputs) -> Callable[[], Tensor]:
    """Prepare mambapy's parallel scan, as its Mamba block uses it."""
    from mambapy.pscan import pscan

    def scan() -> Tensor:
        step = F.softplus(inputs["delta"])
        decay = torch.exp(step[..., None] * inputs["A"])
        drive = (step * inputs["u"])[..., None] * inputs["B"][:, :, None]
        return (pscan(decay, drive) @ inputs["C"][..., None]).squeeze(3)

    return scan


def build_ipex(inputs: Inputs) -> Callable[[], Tensor]:
    """Prepare the scan of Intel's extension for PyTorch."""
    from intel_extension_for_pytorch.llm.modules import MambaMixer

    return lambda: MambaMixer.selective_scan_fn(**inputs, delta_softplus=True)


def build_onnxruntime(inputs: Inputs, walks: int = 1) -> Callable[[], Tensor]:
    """Prepare onnxruntime's LinearAttention, whose heads are the scan's channels, on a model of its own.

    Its ``S <- exp(decay) * S + key * value`` and ``query * S`` are the scan if the decay is ``step * A``, the key
    ``B``, the value ``step * u`` and the query ``C``. All heads of a walk share key and query. The standard operator of
    opset 27 shares no query, and onnxruntime 1.32 has no kernel of it for CPUs.

    Args:
        inputs: Those of a scan, perhaps with ``D`` and ``delta_bias (D,)``.
        walks: Number of walks that lie side by side in the last axis of ``u``, ``delta``, ``B`` and ``C``, and in the
            first of the others.
    """
    import onnx.parser
    import onnxruntime

    given = ", ".join(f"float[{_AXES[name]}] {name}" for name in inputs)
    raw, y = "delta", "y"
    before = after = ""
    if "delta_bias" in inputs:
        raw, before = "raw", "raw = Add (delta, delta_bias)"
    if "D" in inputs:
        y, after = "scanned", "skip = Mul (u, D)  y = Add (scanned, skip)"
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        scan ({given}) => (float[b, l, d] y)
        {{
            last = Constant <value = int64[1] {{-1}}> ()
            packed = Constant <value = int64[3] {{0, 0, -1}}> ()
            {before}
            step = Softplus ({raw})
            value = Mul (step, u)
            column = Unsqueeze (step, last)
            exponent = Mul (column, A)
            decay = Reshape (exponent, packed)
            {y}, state = com.microsoft.LinearAttention <q_num_heads = {walks}, kv_num_heads = {inputs["u"].shape[2]},
                scale = 1.0, update_rule = "gated"> (C, B, value, , decay)
            {after}
        }}""")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(session.run(["y"], feeds)[0])


_AXES = dict(
    u="b, l, d", delta="b, l, d", A="d, n", B="b, l, m", C="b, l, m", D="d", delta_bias="d"
)


class _GgmlMemory(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("none", ctypes.c_bool)]


def build_ggml(inputs: Inputs) -> Callable[[], Tensor]:
    """Prepare ggml's operator, in the libraries that pywhispercpp brings along."""
    library = _ggml_library("libggml-cpu")
    base = _ggml_library("libggml-base")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for function in ("init", "new_tensor_4d", "ssm_scan", "new_graph", "get_data"):
        getattr(base, f"ggml_{function}").restype = pointer
    library.ggml_backend_cpu_init.restype = pointer

    channels, states = inputs["A"].shape
    batch, length, _ = inputs["u"].shape
    elements = sum(x.numel() for x in inputs.values()) + inputs["u"].numel()
    memory = 4 * (elements + 2 * batch * channels * states) + 2**20
    context = pointer(base.ggml_init(_GgmlMemory(memory, None, False)))

    def tensor(x: Tensor, *shape: int) -> pointer:
        kind = 26 if x.dtype == torch.int32 else 0  # GGML_TYPE_I32 and GGML_TYPE_F32
        made = pointer(base.ggml_new_tensor_4d(context, kind, *map(integer, shape)))
        ctypes.memmove(base.ggml_get_data(made), x.contiguous().data_ptr(), 4 * x.numel())
        return made

    base.ggml_get_data.argtypes = [pointer]
    start = tensor(torch.zeros(batch, channels, states), states, 1, channels, batch)
    u = tensor(inputs["u"], 1, channels, length, batch)
    delta = tensor(inputs["delta"], channels, length, batch, 1)
    A = tensor(inputs["A"], states, channels, 1, 1)
    B, C = (tensor(inputs[name], states, 1, length, batch) for name in "BC")
    images = tensor(torch.arange(batch, dtype=torch.int32), batch, 1, 1, 1)
    # The last argument, of newer releases, is how many final states to keep.
    found = pointer(base.ggml_ssm_scan(context, start, u, delta, A, B, C, images, integer(1)))
    graph = pointer(base.ggml_new_graph(context))
    base.ggml_build_forward_expand(graph, found)
    processor = pointer(library.ggml_backend_cpu_init())
    library.ggml_backend_cpu_set_n_threads(processor, torch.get_num_threads())
    kind = ctypes.c_float * inputs["u"].numel()  # the states follow
    y = torch.frombuffer(kind.from_address(base.ggml_get_data(found)), dtype=torch.float32)
    y = y.view(batch, length, channels)

    def scan() -> Tensor:
        status = base.ggml_backend_graph_compute(processor, graph)
        if status:
            raise RuntimeError(f"ggml returned status {status}")
        return y

    return scan


def _ggml_library(name: str) -> ctypes.CDLL:
    """Load a library of the installed package; the one that its other libraries link to has a hash in its name."""
    files = metadata.files("pywhispercpp")
    (found,) = (
        x for x in files if x.parent.name.endswith(".libs") and x.name.startswith(name + "-")
    )
    return ctypes.CDLL(str(found.locate()))


PEERS = {
    "definition": Scan(build_definition, "mmvssm", "pip install -e ."),
    "mamba-ssm": Scan(
        build_mamba_ssm,
        "mamba_ssm",
        "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
        tokens_last=True,
    ),
    "mambapy": Scan(build_mambapy, "mambapy", "pip install mambapy", differentiable=True),
    "ipex": Scan(
        build_ipex,
        "intel_extension_for_pytorch",
        "in an environment of its own, for --python: pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0",
        tokens_last=True,
    ),
    "onnxruntime": Scan(build_onnxruntime, "onnxruntime", "pip install onnx 'onnxruntime>=1.25'"),
    "ggml": Scan(build_ggml, "pywhispercpp", "pip install pywhispercpp"),
}
"""Other scans by name."""


def passes(scan: Scan, inputs: Inputs, grad_y: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """Prepare the passes that a scan has.

    Returns:
        Functions by name of :data:`PASSES`. They return ``y``, and then the gradients of the inputs in their order,
        all with tokens before channels.
    """

    def layout(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if scan.tokens_last and x.dim() == 3 else x

    inputs = {name: layout(x).requires_grad_(scan.differentiable) for name, x in inputs.items()}
    leaves, grad_y = list(inputs.values()), layout(grad_y)
    run = scan.build(inputs)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [layout(run())]

    def both() -> list[Tensor]:
        y = run()
        return [layout(x.detach()) for x in (y, *torch.autograd.grad(y, leaves, grad_y))]

    return dict(zip(PASSES, (forward, both) if scan.differentiable else (forward,)))


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs another and returns the seconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def main() -> None:
    """Run as a worker: ``peer_scans.py PEER FOLDER THREADS``.

    It reads ``FOLDER/inputs.pt``, writes what each pass returned to ``FOLDER/PEER.pt``, and a line. Then it runs the
    pass that each line names, and writes a line with the seconds.
    """
    peer, folder, threads = sys.argv[1:]
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    torch.set_num_threads(int(threads))
    given = torch.load(Path(folder, "inputs.pt"), weights_only=True)
    runs = passes(PEERS[peer], **given)
    torch.save({name: run() for name, run in runs.items()}, Path(folder, f"{peer}.pt"))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(timed(runs[line.strip()])(), file=replies, flush=True)


if __name__ == "__main__":
    main()
