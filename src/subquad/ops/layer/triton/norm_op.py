"""The norms as a PyTorch operation."""

from __future__ import annotations

from torch import Tensor, float32

from subquad.ops import kernel
from subquad.ops.layer.triton.call import alike, compiled, rows, together, trains
from subquad.ops.layer.triton.norm import norm_backward, norm_forward
from subquad.ops.operation import operation
from subquad.ops.recurrence.triton.configs import processors
from subquad.ops.sizes import cdiv, next_power_of_2

TILE = 2048  # elements of a program
EACH = 16  # of a thread
FILL = 8  # programs a multiprocessor that share a weight's gradient


def _norm_launch(run, x, tensors, strides, mean, eps, activation, first, groups, most) -> None:
    n, D = x.shape
    W = D // groups
    BW = next_power_of_2(W)
    BR = max(1, TILE // BW)
    run.launch(
        (min(cdiv(n, BR), most), groups), tensors, n, 1 / W if mean else 1.0, eps, W, groups,
        *strides, ACT=activation, FIRST=first, BR=BR, BW=BW,
        num_warps=min(max(BR * BW // (32 * EACH), 4), 16),
    )  # fmt: skip


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
    inputs = (x, gate, weight, mean, eps, activation, gate_first, groups)
    learns = trains(x, gate, weight)
    dtypes = [None if t is None else t.dtype for t in (x, gate, weight)]
    width = next_power_of_2(max(x.shape[-1] // groups, 1))

    def rehearsal() -> None:
        y = _norm_run(*inputs)
        if learns:
            _norm_back(y, *inputs)

    with kernel.on_device(x):
        kind = ("gated_norm", *dtypes, width, activation, gate_first, learns, x.device)
        compiled(kind, rehearsal)
        return _norm_run(*inputs)


def _norm_run(x, gate, weight, mean, eps, activation, first, groups) -> Tensor:
    D = x.shape[-1]
    y = x.new_empty(x.shape, dtype=together(x, gate))
    if y.numel():
        x, gate = rows(x, D), gate if gate is None else rows(gate, D)
        strides = x.stride(0), 0 if gate is None else gate.stride(0)
        most = x.shape[0]
        _norm_launch(
            norm_forward, x, (x, gate, weight, y), strides, mean, eps, activation, first,
            groups, most,
        )  # fmt: skip
    return y


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
    with kernel.on_device(x):
        return _norm_back(dy, x, gate, weight, mean, eps, activation, gate_first, groups)


def _norm_back(
    dy, x, gate, weight, mean, eps, activation, first, groups
) -> tuple[Tensor, Tensor, Tensor]:
    D, none = x.shape[-1], x.new_empty(0)
    dx = x.new_empty(x.shape)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    parts = None if weight is None else x.new_zeros(1, D, dtype=float32)
    if dx.numel():
        x, dy = rows(x, D), rows(dy, D)
        gate = gate if gate is None else rows(gate, D)
        strides = dy.stride(0), x.stride(0), 0 if gate is None else gate.stride(0)
        most = x.shape[0]
        if parts is not None:
            BR = max(1, TILE // next_power_of_2(D // groups))
            most = min(cdiv(x.shape[0], BR), cdiv(FILL * processors(x.device), groups))
            parts = x.new_empty(most, D, dtype=float32)
        _norm_launch(
            norm_backward, x, (dy, x, gate, weight, dx, dgate, parts), strides, mean, eps,
            activation, first, groups, most,
        )  # fmt: skip
    dw = none if weight is None or parts is None else parts.sum(0).to(weight.dtype)
    return dx, none if dgate is None else dgate, dw


@_norm_backward.fake
def _(dy, x, gate, weight, mean, eps, activation, gate_first, groups):
    return alike(x, gate, weight)


def _save_norm(ctx, inputs, output) -> None:
    x, gate, weight, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight)


def _derive_norm(ctx, dy):
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dw = _norm_backward(dy, x, gate, weight, *ctx.options)
    none = (None,) * len(ctx.options)
    return dx, None if gate is None else dgate, None if weight is None else dw, *none


norm.differentiable(_derive_norm, _save_norm)
_norm_backward.without_derivative()
