"""Apply per-token functions chunk by chunk, so that intermediate results stay in the CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .backend import gradients_of

CHUNK_BYTES = 1 << 20
"""Bytes per chunk of the first map: small enough for intermediate results to stay in a CPU's cache."""

WHOLE_CHUNKS = 2
"""Maps of at most this many chunks are processed in one piece."""


def in_chunks(
    function: Callable[..., Tensor],
    maps: Sequence[Tensor],
    of_images: Sequence[Tensor] = (),
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Compute ``function(*maps, *of_images, *parameters)``, on CPUs in chunks of tokens.

    In chunks, intermediate results stay in the cache. The backward pass keeps only the inputs and calls ``function``
    again, so it should be a chain of cheap, element-wise operations. Second derivatives go through the whole at once.

    Args:
        function: Returns ``(B, L, ...)``; each token's result depends only on that token's inputs.
        maps: Tensors ``(B, L, ...)``.
        of_images: Tensors ``(B, 1, ...)`` shared by all tokens of an image.
        parameters: Tensors shared by all images.

    Returns:
        ``(B, L, ...)``.
    """
    tensors = (*maps, *of_images, *parameters)
    first = maps[0]
    # First check for a compiler: comparing sizes under one would specialise them.
    if (
        torch.compiler.is_compiling()
        or first.device.type != "cpu"
        or first.numel() * first.element_size() <= WHOLE_CHUNKS * CHUNK_BYTES
    ):
        return function(*tensors)
    return _InChunks.apply(function, len(maps), len(of_images), *tensors)


class _InChunks(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, function, num_maps, num_of_images, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.num_maps, ctx.num_of_images = function, num_maps, num_of_images
        y = None
        for place, inputs in _chunks(tensors, num_maps, num_of_images):
            part = function(*inputs)
            if y is None:
                y = part.new_empty(*tensors[0].shape[:2], *part.shape[2:])
            y[place] = part
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_y):
        tensors, num_maps = ctx.saved_tensors, ctx.num_maps
        if torch.is_grad_enabled():
            return (*(None, None, None), *gradients_of(ctx.function, tensors, grad_y))
        needed = ctx.needs_input_grad[3:]
        # Gradients of maps are written once; the others are sums over chunks, in float32 or wider.
        grads = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if i < num_maps
            else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for i, x in enumerate(tensors)
        ]
        last = num_maps + ctx.num_of_images
        for place, inputs in _chunks(tensors, num_maps, ctx.num_of_images):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed)]
                part = ctx.function(*inputs)
            found = iter(
                torch.autograd.grad(part, [x for x in inputs if x.requires_grad], grad_y[place])
            )
            for i, need in enumerate(needed):
                if need and i < num_maps:
                    grads[i][place] = next(found)
                elif need and i < last:
                    grads[i][place[0]] += next(found)
                elif need:
                    grads[i] += next(found)
        return (
            *(None, None, None),
            *(grad.to(x.dtype) if need else None for grad, x, need in zip(grads, tensors, needed)),
        )


def _chunks(
    tensors: Sequence[Tensor], num_maps: int, num_of_images: int
) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Yield each chunk's slices (several images, or some tokens of one) and the function's arguments there."""
    batch, length = tensors[0].shape[:2]
    token_bytes = tensors[0][0, 0].numel() * tensors[0].element_size()
    images = max(CHUNK_BYTES // (token_bytes * length), 1)
    tokens = math.ceil(length / math.ceil(token_bytes * length / CHUNK_BYTES))
    last = num_maps + num_of_images
    for image in range(0, batch, images):
        for start in range(0, length, tokens):
            place = slice(image, image + images), slice(start, start + tokens)
            maps = [x[place] for x in tensors[:num_maps]]
            yield place, [*maps, *(x[place[0]] for x in tensors[num_maps:last]), *tensors[last:]]
