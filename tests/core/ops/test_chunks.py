import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import chunks, in_chunks


def function(a, b, scale, weight, bias):
    return F.layer_norm(a * scale * b, (a.shape[-1],), weight, bias).flatten(2)


def make_inputs(shape=(3, 10, 2, 4), dtype=torch.float64):
    batch, *_, channels = shape
    sizes = (shape, shape, (batch, 1, 1, channels), (channels,), (channels,))
    torch.manual_seed(0)
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def run(inputs):
    a, b, scale, weight, bias = inputs
    y = in_chunks(function, (a, b), (scale,), (weight, bias))
    return (y.detach(), *torch.autograd.grad(y.sin().sum(), inputs))


@pytest.mark.parametrize("chunk_bytes", [1, 200, 700, 1500])
def test_in_chunks_is_the_same(chunk_bytes, monkeypatch):
    """A token at a time, part of an image (640 bytes), an image, two images; and every gradient."""
    inputs = make_inputs()
    expected = run(inputs)
    calls = []
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunks, "WHOLE_CHUNKS", 0)
    monkeypatch.setitem(globals(), "function", noting(calls, function))
    torch.testing.assert_close(run(inputs), expected, atol=1e-12, rtol=1e-12)
    assert len(calls) == 2 * {1: 30, 200: 12, 700: 3, 1500: 2}[chunk_bytes]


def noting(calls, called):
    def wrapper(*args):
        calls.append(args[0].shape)
        return called(*args)

    return wrapper


def test_only_what_is_needed_is_differentiated(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    a, b, scale, weight, bias = inputs
    y = in_chunks(function, (a, b.detach()), (scale.detach(),), (weight.detach(), bias))
    grads = torch.autograd.grad(y.sin().sum(), (a, bias))
    y = function(a, b, scale, weight, bias)
    expected = torch.autograd.grad(y.sin().sum(), (a, bias))
    torch.testing.assert_close(grads, expected, atol=1e-12, rtol=1e-12)


def test_under_autocast(monkeypatch):
    """The backward pass calls the function under the forward pass's autocast."""
    inputs = make_inputs((3, 40, 2, 8), torch.float32)

    def autocast_run():
        with torch.autocast("cpu", torch.bfloat16):
            a, b, scale, weight, bias = inputs
            y = in_chunks(
                lambda a, b, scale, weight, bias: (
                    function(a, b, scale, weight, bias) @ weight_matrix
                ),
                (a, b),
                (scale,),
                (weight, bias),
            )
        assert y.dtype == torch.bfloat16
        return (y.detach().float(), *torch.autograd.grad(y.float().sin().sum(), inputs))

    weight_matrix = torch.randn(16, 16)
    expected = autocast_run()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 800)
    for ours, theirs in zip(autocast_run(), expected):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_only_inputs_are_stored(monkeypatch):
    inputs = make_inputs()
    own = {x.data_ptr() for x in inputs}
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    stored = []

    def note(x):
        stored.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        a, b, scale, weight, bias = inputs
        in_chunks(function, (a, b), (scale,), (weight, bias))
    assert stored and set(stored) <= own
