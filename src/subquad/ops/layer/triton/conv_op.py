"""The short convolution as a PyTorch operation."""

from __future__ import annotations

from torch import Tensor, float32

from subquad.ops import kernel
from subquad.ops.layer.triton.call import alike, compiled, trains
from subquad.ops.layer.triton.conv import conv_backward, conv_forward
from subquad.ops.operation import operation
from subquad.ops.recurrence.triton.configs import processors
from subquad.ops.sizes import cdiv, next_power_of_2

CHANNELS, EACH = 256, 4  # of a program, and of a thread
ROWS = 4  # that it asks for at once
FILL = 16  # programs a multiprocessor, where there are as many chunks
SHORTEST, LONGEST = 16, 128  # tokens of a chunk


def _conv_launch(run: kernel.Kernel, x, cu, tensors, strides, size: int, activation: str) -> None:
    B, T, D = x.shape
    BD = min(CHANNELS, next_power_of_2(D))
    L, blocks = _chunk(x), cdiv(D, BD)
    N = B if cu is None else cu.shape[0] - 1
    run.launch(
        (_programs(x, cu) * blocks,), tensors, T, L, N, cdiv(T, L), blocks, D, *strides,
        SIZE=size, ACT=activation, BD=BD, R=ROWS, num_warps=max(1, BD // (32 * EACH)),
    )  # fmt: skip


def _chunk(x: Tensor) -> int:
    """Tokens of a chunk."""
    each = x.shape[0] * x.shape[1] * cdiv(x.shape[2], CHANNELS) // (FILL * processors(x.device))
    return min(max(each // ROWS * ROWS, SHORTEST), LONGEST)


def _programs(x: Tensor, cu: Tensor | None) -> int:
    """Chunks, those included that packed sequences leave empty."""
    L = _chunk(x)
    if cu is None:
        return x.shape[0] * cdiv(x.shape[1], L)
    return x.shape[1] // L + cu.shape[0] - 1


def _channels_last(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 else t.contiguous()


@operation("short_conv")
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Tensor:
    inputs = (x, weight, bias, past, cu_seqlens, activation)
    learns = trains(x, weight, bias, past)
    given = [t is not None for t in (bias, past, cu_seqlens)]
    kind = ("short_conv", x.dtype, weight.shape[1], activation, *given, learns, x.device)

    def rehearsal() -> None:
        y = _conv_run(*inputs)
        if learns:
            _conv_back(y, *inputs)

    with kernel.on_device(x):
        compiled(kind, rehearsal)
        return _conv_run(*inputs)


def _conv_run(x, weight, bias, past, cu, activation) -> Tensor:
    x = _channels_last(x)
    y = x.new_empty(x.shape)
    if y.numel():
        tensors = (x, weight.contiguous(), bias, _contiguous(past), _contiguous(cu), y)
        strides = x.stride()[:2]
        _conv_launch(conv_forward, x, cu, tensors, strides, weight.shape[1], activation)
    return y


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@short_conv.fake
def _(x, weight, bias, past, cu_seqlens, activation):
    return x.new_empty(x.shape)


@operation("short_conv_backward")
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with kernel.on_device(x):
        return _conv_back(dy, x, weight, bias, past, cu_seqlens, activation)


def _conv_back(dy, x, weight, bias, past, cu, activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dy = _channels_last(x), _channels_last(dy)
    D, size = weight.shape
    height = size if bias is None else size + 1
    dx = x.new_empty(x.shape)
    none = x.new_empty(0)
    dpast = None if past is None else past.new_zeros(past.shape)
    parts = x.new_zeros(1, height, D, dtype=float32)
    if dx.numel():
        parts = x.new_empty(_programs(x, cu), height, D, dtype=float32)
        tensors = (
            dy, x, weight.contiguous(), bias, _contiguous(past), _contiguous(cu), dx, dpast, parts
        )  # fmt: skip
        strides = *x.stride()[:2], *dy.stride()[:2]
        _conv_launch(conv_backward, x, cu, tensors, strides, size, activation)
    total = parts.sum(0)
    dw = total[:size].t().contiguous().to(weight.dtype)
    db = none if bias is None else total[size].to(bias.dtype)
    return dx, dw, db, none if dpast is None else dpast


@_conv_backward.fake
def _(dy, x, weight, bias, past, cu_seqlens, activation):
    return alike(x, weight, bias, past)


def _save_conv(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _derive_conv(ctx, dy):
    x, weight, bias, past, cu = ctx.saved_tensors
    dx, dw, db, dpast = _conv_backward(dy, x, weight, bias, past, cu, ctx.activation)
    return dx, dw, None if bias is None else db, None if past is None else dpast, None, None


short_conv.differentiable(_derive_conv, _save_conv)
_conv_backward.without_derivative()
