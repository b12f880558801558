"""The gates as PyTorch operations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from subquad.ops.layer.triton.call import call, rows, straight, together, trains
from subquad.ops.layer.triton.gates import (
    decay_backward,
    decay_forward,
    gated_backward,
    gated_forward,
)
from subquad.ops.layer.triton.sums import total
from subquad.ops.operation import operation
from subquad.ops.sizes import cdiv, next_power_of_2, processors
from subquad.ops.tape import empty

LINE = 1024  # elements of a program of the gated product
TILE, WIDEST = 2048, 128  # elements of a program of the decay, and its channels at most
FILL = 8  # programs a multiprocessor that share the decay's sums


@operation("gated")
def gated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    """``x * act(gate)``, of one shape."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=together(x, gate))
    inputs = (straight(x.contiguous()), straight(gate.contiguous()))
    back = partial(_gated_backward_of, inputs, activation) if trains(x, gate) else None
    return call(_gated_forward, (activation,), inputs, back)[0]


def _gated_forward(activation, x, gate) -> tuple[Tensor]:
    y = empty(x, *x.shape, dtype=together(x, gate))
    n = x.numel()
    gated_forward.launch((cdiv(n, LINE),), (x, gate, y), n, ACT=activation, BN=LINE, num_warps=4)
    return (y,)


@gated.fake
def _(x, gate, activation):
    return x.new_empty(x.shape, dtype=together(x, gate))


@operation("gated_backward")
def _gated_backward(dy: Tensor, x: Tensor, gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(gate)
    inputs = [straight(t.contiguous()) for t in (dy, x, gate)]
    dx, dgate = call(_gated_back, (activation,), inputs)
    return dx, dgate


def _gated_backward_of(inputs, activation, y) -> None:
    _gated_back(activation, y[0], *inputs)


def _gated_back(activation, dy, x, gate) -> tuple[Tensor, Tensor]:
    dx, dgate, n = empty(x, *x.shape), empty(gate, *x.shape), x.numel()
    tensors = (dy, x, gate, dx, dgate)
    gated_backward.launch((cdiv(n, LINE),), tensors, n, ACT=activation, BN=LINE, num_warps=4)
    return dx, dgate


@_gated_backward.fake
def _(dy, x, gate, activation):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _save_gated(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _derive_gated(ctx, dy):
    return *_gated_backward(dy, *ctx.saved_tensors, ctx.activation), None


gated.differentiable(_derive_gated, _save_gated)
_gated_backward.without_derivative()


@operation("softplus_decay")
def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``-exp(A_log) softplus(x + dt_bias)``, float32."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=torch.float32)
    inputs = _decay_inputs(x, A_log, dt_bias)
    back = partial(_decay_backward_of, inputs) if trains(x, A_log, dt_bias) else None
    return call(_decay_forward, (), inputs, back)[0].view(x.shape)


def _decay_inputs(x, A_log, dt_bias) -> tuple[Tensor, Tensor, Tensor]:
    D = dt_bias.numel()
    return rows(x, D), rows(A_log, A_log.numel())[0], rows(dt_bias, D)[0]


def _tile(D: int) -> dict[str, int]:
    BD = min(next_power_of_2(D), WIDEST)
    return {"BR": TILE // BD, "BD": BD}


def _decay_forward(x, A_log, dt_bias) -> tuple[Tensor]:
    n, D = x.shape
    y, tile = empty(x, n, D, dtype=torch.float32), _tile(D)
    grid = cdiv(n, tile["BR"]), cdiv(D, tile["BD"])
    K = D // A_log.shape[0]
    tensors = (x, A_log, dt_bias, y)
    decay_forward.launch(grid, tensors, n, D, K, x.stride(0), **tile, num_warps=4)
    return (y,)


@softplus_decay.fake
def _(x, A_log, dt_bias):
    return x.new_empty(x.shape, dtype=torch.float32)


@operation("softplus_decay_backward")
def _decay_backward(
    dy: Tensor, x: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(A_log), torch.zeros_like(dt_bias)
    inputs = (rows(dy, dt_bias.numel()), *_decay_inputs(x, A_log, dt_bias))
    dx, da, db = call(_decay_back, (), inputs)
    if da.numel() > A_log.numel():
        da = da.view(A_log.numel(), -1).sum(1).to(A_log.dtype)
    return dx.view(x.shape), da.view(A_log.shape), db.view(dt_bias.shape)


def _decay_backward_of(inputs, y) -> None:
    _decay_back(y[0], *inputs)


def _decay_back(dy, x, A_log, dt_bias) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of A_log, of each channel where a head has several."""
    (n, D), tile = x.shape, _tile(x.shape[1])
    blocks = cdiv(D, tile["BD"])
    programs = min(cdiv(n, tile["BR"]), cdiv(FILL * processors(x.device), blocks))
    K = D // A_log.shape[0]
    dx = empty(x, n, D)
    da, db = (empty(x, programs, D, dtype=torch.float32) for _ in range(2))
    tensors, strides = (dy, x, A_log, dt_bias, dx, da, db), (dy.stride(0), x.stride(0))
    decay_backward.launch((programs, blocks), tensors, n, D, K, *strides, **tile, num_warps=4)
    one = empty(A_log, D, dtype=A_log.dtype if K == 1 else torch.float32)
    return dx, total(da, one), total(db, empty(dt_bias, D))


@_decay_backward.fake
def _(dy, x, A_log, dt_bias):
    return tuple(t.new_empty(t.shape) for t in (x, A_log, dt_bias))


def _save_decay(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _derive_decay(ctx, dy):
    return _decay_backward(dy, *ctx.saved_tensors)


softplus_decay.differentiable(_derive_decay, _save_decay)
_decay_backward.without_derivative()
