"""The kernels as PyTorch operations: one node each for autograd, compile and export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.kernel import dense, on_device
from subquad.ops.operation import operation
from subquad.ops.recurrence.triton import launch, layout


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence; see :func:`subquad.ops.recurrence.recurrence`."""
    if decay is not None:
        if decay.dim() == 1:
            decay = decay.expand(q.shape[0], q.shape[1], -1)
        decay = decay.float()
    beta = None if beta is None else beta.float()
    state = None if state is None else state.float()
    args = (q, k, v, decay, beta, state, cu_seqlens, scale)
    trains = torch.is_grad_enabled() and any(
        t.requires_grad for t in args[:6] if isinstance(t, Tensor)
    )
    if form == "recurrent" or (form == "auto" and q.shape[1] == 1 and not trains):
        return _steps(*args)
    o, final, *_ = _forward(*args, trains)
    return o, final


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else dense(t) for t in tensors]


@operation("recurrence_steps")
def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with on_device(q):
        return launch.steps(*_dense(q, k, v, decay, beta, state, cu_seqlens), scale=scale)


@operation("recurrence")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    trains: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    with on_device(q):
        return launch.forward(
            *_dense(q, k, v, decay, beta, state, cu_seqlens), scale=scale, trains=trains
        )


@operation("recurrence_backward")
def _backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _dense(q, k, v, decay, beta, state)
    more = _dense(cu_seqlens, kept)
    with on_device(q):
        out: tuple[Any, ...] = launch.backward(*_dense(do, dfinal), *inputs, *more, scale=scale)
    dq, dk, dv, ddecay, dbeta, dstate = [
        q.new_empty(0) if x is None else _fold(grad, x) for grad, x in zip(out, inputs, strict=True)
    ]
    return dq, dk, dv, ddecay, dbeta, dstate


def _fold(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of grouped heads, summed from all H heads."""
    if grad.shape != x.shape:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32)
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


def _heads(q, k, v, decay, beta) -> int:
    return max(t.shape[2] for t in (q, k, v, decay, beta) if t is not None)


def _ends(q, k, v, decay, beta, cu_seqlens) -> tuple[Tensor, Tensor]:
    H = _heads(q, k, v, decay, beta)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = v.new_empty(v.shape[0], v.shape[1], H, v.shape[3])
    return o, v.new_empty(N, H, q.shape[3], v.shape[3], dtype=torch.float32)


@_steps.fake
def _(q, k, v, decay, beta, state, cu_seqlens, scale):
    return _ends(q, k, v, decay, beta, cu_seqlens)


@_forward.fake
def _(q, k, v, decay, beta, state, cu_seqlens, scale, trains=False):
    # Sizes may be symbols, which cannot be looked up.
    p = layout.lay_out.__wrapped__(*layout.shapes(q, k, v, decay, beta, cu_seqlens), False)
    kept = v.new_empty(p.bytes(trains), dtype=torch.uint8)
    return *_ends(q, k, v, decay, beta, cu_seqlens), kept


@_backward.fake
def _(do, dfinal, q, k, v, decay, beta, state, cu_seqlens, kept, scale):
    inputs = (q, k, v, decay, beta, state)
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.given = [t is not None for t in tensors[:6]]
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _derive(ctx, do, dfinal, *_):
    *tensors, kept = ctx.saved_tensors
    v = tensors[2]
    if do is None:
        do = v.new_zeros(v.shape[0], v.shape[1], _heads(*tensors[:5]), v.shape[3])
    out = _backward(do, dfinal, *tensors, kept, ctx.scale)
    grads = [g if given else None for g, given in zip(out, ctx.given, strict=True)]
    return *grads, None, None, None


_forward.differentiable(_derive, _setup)
_steps.without_derivative()
_backward.without_derivative()
