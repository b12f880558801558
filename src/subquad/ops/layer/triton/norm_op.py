"""The norms as a PyTorch operation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.ops import kernel
from subquad.ops.layer.triton.call import call, filled, rows, together, trains
from subquad.ops.layer.triton.norm import norm_backward, norm_forward
from subquad.ops.layer.triton.sums import total
from subquad.ops.operation import operation
from subquad.ops.sizes import cdiv, next_power_of_2, processors
from subquad.ops.tape import empty

TILE, EACH = 2048, 16  # elements of a program, and of a thread
FILL = 4  # programs a multiprocessor that share a weight's gradient


def _launch(run: kernel.Kernel, x, tensors, strides, options, programs: int | None = None) -> None:
    mean, eps, activation, first, groups = options
    n, D = x.shape
    W = D // groups
    BR, BW = _tile(W)
    run.launch(
        (programs or cdiv(n, BR), groups), tensors, n, 1 / W if mean else 1.0, eps, W, groups,
        *strides, ACT=activation, FIRST=first, BR=BR, BW=BW,
        num_warps=min(max(BR * BW // (32 * EACH), 4), 16),
    )  # fmt: skip


def _tile(W: int) -> tuple[int, int]:
    """Tokens and channels of a tile."""
    BW = next_power_of_2(W)
    return max(1, TILE // BW), BW


@operation("gated_norm")
def norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    mean: bool,
    eps: float,
    activation: str,
    gate_first: bool,
    groups: int,
) -> Tensor:
    """``x (inv sum x^2 + eps)^-1/2 weight act(gate)``, inv 1 over the width where ``mean``."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=together(x, gate))
    options = (mean, eps, activation, gate_first, groups)
    inputs = _rows(x, gate, weight)
    back = partial(_backward_of, inputs, options) if trains(x, gate, weight) else None
    return call(_forward, (options,), inputs, back)[0].view(x.shape)


def _rows(x, gate, weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    D = x.shape[-1]
    return rows(x, D), rows(gate, D), None if weight is None else rows(weight, D)[0]


def _forward(options, x, gate, weight) -> tuple[Tensor]:
    y = empty(x, *x.shape, dtype=together(x, gate))
    strides = x.stride(0), 0 if gate is None else gate.stride(0)
    _launch(norm_forward, x, (x, gate, weight, y), strides, options)
    return (y,)


@norm.fake
def _(x, gate, weight, mean, eps, activation, gate_first, groups):
    return x.new_empty(x.shape, dtype=together(x, gate))


@operation("gated_norm_backward")
def _norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    mean: bool,
    eps: float,
    activation: str,
    gate_first: bool,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    if not x.numel():
        given = (x, gate, weight)
        return filled(*(t if t is None else t.new_zeros(t.shape) for t in given))
    inputs = (rows(dy, dy.shape[-1]), *_rows(x, gate, weight))
    dx, dgate, dw = call(_backward, ((mean, eps, activation, gate_first, groups),), inputs)
    return filled(dx.view(x.shape), dgate if dgate is None else dgate.view(x.shape), dw)


def _backward_of(inputs, options, y) -> None:
    _backward(options, y[0], *inputs)


def _backward(options, dy, x, gate, weight) -> tuple[Tensor | None, ...]:
    n, D = x.shape
    groups = options[-1]
    dx = empty(x, n, D)
    dgate = None if gate is None else empty(gate, n, D)
    parts = programs = None
    if weight is not None:
        programs = min(cdiv(n, _tile(D // groups)[0]), cdiv(FILL * processors(x.device), groups))
        parts = empty(x, programs, D, dtype=torch.float32)
    strides = dy.stride(0), x.stride(0), 0 if gate is None else gate.stride(0)
    tensors = (dy, x, gate, weight, dx, dgate, parts)
    _launch(norm_backward, x, tensors, strides, options, programs)
    return dx, dgate, None if parts is None else total(parts, empty(weight, D))


@_norm_backward.fake
def _(dy, x, gate, weight, mean, eps, activation, gate_first, groups):
    return filled(*(t if t is None else t.new_empty(t.shape) for t in (x, gate, weight)))


def _save(ctx, inputs, output) -> None:
    x, gate, weight, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight)


def _derive(ctx, dy):
    tensors = ctx.saved_tensors
    grads = _norm_backward(dy, *tensors, *ctx.options)
    given = [None if t is None else g for t, g in zip(tensors, grads, strict=True)]
    return *given, *(None,) * len(ctx.options)


norm.differentiable(_derive, _save)
_norm_backward.without_derivative()
