"""The gates as PyTorch operations."""

from __future__ import annotations

from torch import Tensor, float32

from subquad.ops import kernel
from subquad.ops.layer.triton.call import alike, compiled, rows, together, trains
from subquad.ops.layer.triton.gates import (
    decay_backward,
    decay_forward,
    gated_backward,
    gated_forward,
)
from subquad.ops.operation import operation
from subquad.ops.recurrence.triton.configs import processors
from subquad.ops.sizes import cdiv, next_power_of_2

LINE = 1024  # elements of a program of the gated product
TILE = 2048  # and of the decay
FILL = 8  # programs a multiprocessor that share the decay's sums


@operation("gated")
def gated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    """``x * act(gate)``, of one shape."""
    learns = trains(x, gate)

    def rehearsal() -> None:
        y = _gated(x, gate, activation)
        if learns:
            _gated_back(y, x, gate, activation)

    with kernel.on_device(x):
        compiled(("gated", x.dtype, gate.dtype, activation, learns, x.device), rehearsal)
        return _gated(x, gate, activation)


def _gated(x, gate, activation) -> Tensor:
    y = x.new_empty(x.shape, dtype=together(x, gate))
    if n := y.numel():
        tensors = x.contiguous(), gate.contiguous(), y
        gated_forward.launch((cdiv(n, LINE),), tensors, n, ACT=activation, BN=LINE, num_warps=4)
    return y


@gated.fake
def _(x, gate, activation):
    return x.new_empty(x.shape, dtype=together(x, gate))


@operation("gated_backward")
def _gated_backward(dy: Tensor, x: Tensor, gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    with kernel.on_device(x):
        return _gated_back(dy, x, gate, activation)


def _gated_back(dy, x, gate, activation) -> tuple[Tensor, Tensor]:
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if n := dx.numel():
        tensors = (*(t.contiguous() for t in (dy, x, gate)), dx, dgate)
        gated_backward.launch((cdiv(n, LINE),), tensors, n, ACT=activation, BN=LINE, num_warps=4)
    return dx, dgate


@_gated_backward.fake
def _(dy, x, gate, activation):
    return alike(x, gate)


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
    learns = trains(x, A_log, dt_bias)

    def rehearsal() -> None:
        y = _decay(x, A_log, dt_bias)
        if learns:
            _decay_back(y, x, A_log, dt_bias)

    width = next_power_of_2(dt_bias.numel())
    with kernel.on_device(x):
        dtypes = [t.dtype for t in (x, A_log, dt_bias)]
        compiled(("softplus_decay", *dtypes, width, learns, x.device), rehearsal)
        return _decay(x, A_log, dt_bias)


def _decay(x, A_log, dt_bias) -> Tensor:
    y = x.new_empty(x.shape, dtype=float32)
    if y.numel():
        D = dt_bias.numel()
        x = rows(x, D)
        grid, more = _decay_grid(len(x), D, None)
        K = D // A_log.numel()
        tensors = x, A_log.contiguous(), dt_bias.contiguous(), y
        decay_forward.launch(grid, tensors, len(x), D, K, x.stride(0), **more)
    return y


def _decay_grid(n: int, D: int, most: int | None) -> tuple[tuple[int, int], dict[str, int]]:
    BD = min(next_power_of_2(D), 128)
    BR, blocks = TILE // BD, cdiv(D, BD)
    programs = cdiv(n, BR)
    if most is not None:
        programs = min(programs, cdiv(most, blocks))
    return (programs, blocks), {"BR": BR, "BD": BD, "num_warps": 4}


@softplus_decay.fake
def _(x, A_log, dt_bias):
    return x.new_empty(x.shape, dtype=float32)


@operation("softplus_decay_backward")
def _decay_backward(
    dy: Tensor, x: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with kernel.on_device(x):
        return _decay_back(dy, x, A_log, dt_bias)


def _decay_back(dy, x, A_log, dt_bias) -> tuple[Tensor, Tensor, Tensor]:
    D, dx = dt_bias.numel(), x.new_empty(x.shape)
    parts = x.new_zeros(1, 2, D, dtype=float32)
    if dx.numel():
        x, dy = rows(x, D), rows(dy, D)
        grid, more = _decay_grid(len(x), D, FILL * processors(x.device))
        parts = x.new_empty(grid[0], 2, D, dtype=float32)
        tensors = dy, x, A_log.contiguous(), dt_bias.contiguous(), dx, parts
        K = D // A_log.numel()
        strides = dy.stride(0), x.stride(0)
        decay_backward.launch(grid, tensors, len(x), D, K, *strides, **more)
    da, db = parts.sum(0)
    da = da.view(A_log.numel(), -1).sum(1).view(A_log.shape)
    return dx, da.to(A_log.dtype), db.view(dt_bias.shape).to(dt_bias.dtype)


@_decay_backward.fake
def _(dy, x, A_log, dt_bias):
    return alike(x, A_log, dt_bias)


def _save_decay(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _derive_decay(ctx, dy):
    return _decay_backward(dy, *ctx.saved_tensors)


softplus_decay.differentiable(_derive_decay, _save_decay)
_decay_backward.without_derivative()
