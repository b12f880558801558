"""The cross-entropy as a PyTorch operation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.ops.layer.triton.call import call, straight, trains
from subquad.ops.layer.triton.loss import losses_backward, losses_forward
from subquad.ops.operation import operation
from subquad.ops.sizes import cdiv, next_power_of_2
from subquad.ops.tape import empty

CLASSES, WARPS = 4096, 8  # at once, and of a program


@operation("token_losses")
def _losses(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the logarithm of the sum of its exponentials."""
    if not logits.numel():
        none = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        return none, none.clone()
    inputs = (straight(logits), straight(labels.contiguous()))
    back = partial(_backward_of, inputs, ignored) if trains(logits) else None
    y, lse = call(_forward, (ignored,), inputs, back)
    return y, lse


def _tile(V: int) -> dict[str, int]:
    return {"BV": min(CLASSES, max(next_power_of_2(V), 32)), "num_warps": WARPS}


def _forward(ignored, logits, labels) -> tuple[Tensor, Tensor]:
    n, V = logits.shape
    y, lse = (empty(logits, n, dtype=torch.float32) for _ in range(2))
    tensors = (logits, labels, y, lse)
    losses_forward.launch((n,), tensors, ignored, V, logits.stride(0), **_tile(V))
    return y, lse


@_losses.fake
def _(logits, labels, ignored):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


@operation("token_losses_backward")
def _losses_backward(
    dy: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignored: int
) -> Tensor:
    if not logits.numel():
        return torch.empty_like(logits)
    inputs = (straight(dy.contiguous()), straight(logits), straight(labels.contiguous()), lse)
    return call(_backward, (ignored,), inputs)[0]


def _backward_of(inputs, ignored, outputs) -> None:
    logits, labels = inputs
    y, lse = outputs
    _backward(ignored, y, logits, labels, lse)


def _backward(ignored, dy, logits, labels, lse) -> tuple[Tensor]:
    n, V = logits.shape
    dx, tile = empty(logits, n, V), _tile(V)
    grid, tensors = (n, cdiv(V, tile["BV"])), (dy, logits, labels, lse, dx)
    losses_backward.launch(grid, tensors, ignored, V, logits.stride(0), **tile)
    return (dx,)


@_losses_backward.fake
def _(dy, logits, labels, lse, ignored):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    logits, labels, ctx.ignored = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _derive(ctx, dy, _lse):
    return _losses_backward(dy, *ctx.saved_tensors, ctx.ignored), None, None


_losses.differentiable(_derive, _save)
_losses_backward.without_derivative()


def token_losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return _losses(logits, labels, ignored)[0]
