"""The short convolution as a PyTorch operation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.ops import kernel
from subquad.ops.layer.triton.call import call, filled, straight, trains
from subquad.ops.layer.triton.conv import conv_backward, conv_forward
from subquad.ops.layer.triton.sums import total
from subquad.ops.operation import operation
from subquad.ops.sizes import cdiv, next_power_of_2, processors
from subquad.ops.tape import empty

CHANNELS, EACH = 256, 4  # of a program, and of a thread
ROWS = 4  # that it asks for at once
FILL = 16  # programs a multiprocessor, where there are as many chunks
SHORTEST, LONGEST = 16, 128  # tokens of a chunk


def _launch(run: kernel.Kernel, x, cu, tensors, strides, size: int, activation: str) -> None:
    B, T, D = x.shape
    BD = min(CHANNELS, next_power_of_2(D))
    L, blocks = _chunk(x), cdiv(D, BD)
    N = B if cu is None else cu.shape[0] - 1
    run.launch(
        (_chunks(x, cu) * blocks,), tensors, T, L, N, cdiv(T, L), blocks, D, *strides,
        SIZE=size, ACT=activation, BD=BD, R=ROWS, num_warps=max(1, BD // (32 * EACH)),
    )  # fmt: skip


def _chunk(x: Tensor) -> int:
    """Tokens of a chunk."""
    each = x.shape[0] * x.shape[1] * cdiv(x.shape[2], CHANNELS) // (FILL * processors(x.device))
    return min(max(each // ROWS * ROWS, SHORTEST), LONGEST)


def _chunks(x: Tensor, cu: Tensor | None) -> int:
    """Chunks, those included that packed sequences leave empty."""
    L = _chunk(x)
    if cu is None:
        return x.shape[0] * cdiv(x.shape[1], L)
    return x.shape[1] // L + cu.shape[0] - 1


@operation("short_conv")
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Tensor:
    if not x.numel():
        return x.new_empty(x.shape)
    inputs = _straight(x, weight, bias, past, cu_seqlens)
    learns = trains(x, weight, bias, past)
    back = partial(_backward_of, inputs, activation) if learns else None
    return call(_forward, (activation,), inputs, back)[0]


def _straight(x, weight, bias, past, cu) -> list[Tensor | None]:
    others = [t if t is None else t.contiguous() for t in (weight, bias, past, cu)]
    return [straight(x), *map(straight, others)]


def _forward(activation, x, weight, bias, past, cu) -> tuple[Tensor]:
    y = empty(x, *x.shape)
    tensors = (x, weight, bias, past, cu, y)
    _launch(conv_forward, x, cu, tensors, x.stride()[:2], weight.shape[1], activation)
    return (y,)


@short_conv.fake
def _(x, weight, bias, past, cu_seqlens, activation):
    return x.new_empty(x.shape)


@operation("short_conv_backward")
def _short_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and past."""
    if not x.numel():
        given = (x, weight, bias, past)
        return filled(*(t if t is None else t.new_zeros(t.shape) for t in given))
    inputs = (straight(dy), *_straight(x, weight, bias, past, cu_seqlens))
    return filled(*call(_backward, (activation,), inputs))


def _backward_of(inputs, activation, y) -> None:
    _backward(activation, y[0], *inputs)


def _backward(activation, dy, x, weight, bias, past, cu) -> tuple[Tensor | None, ...]:
    D, size = weight.shape
    dx = empty(x, *x.shape)
    dpast = None if past is None else empty(past, *past.shape)
    chunks = _chunks(x, cu)
    dw = empty(x, chunks, D, size, dtype=torch.float32)
    db = None if bias is None else empty(x, chunks, D, dtype=torch.float32)
    tensors = (dy, x, weight, bias, past, cu, dx, dpast, dw, db)
    strides = *x.stride()[:2], *dy.stride()[:2]
    _launch(conv_backward, x, cu, tensors, strides, size, activation)
    dweight = total(dw, empty(weight, D, size))
    dbias = None if db is None else total(db, empty(bias, D))
    return dx, dweight, dbias, dpast


@_short_conv_backward.fake
def _(dy, x, weight, bias, past, cu_seqlens, activation):
    return filled(*(t if t is None else t.new_empty(t.shape) for t in (x, weight, bias, past)))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _derive(ctx, dy):
    tensors = ctx.saved_tensors
    grads = _short_conv_backward(dy, *tensors, ctx.activation)
    return *[None if t is None else g for t, g in zip(tensors, grads, strict=False)], None, None


short_conv.differentiable(_derive, _save)
_short_conv_backward.without_derivative()
