"""One differentiable node for a forward and a backward written by hand.

An implementation is a module with

    forward(q, k, v, mask, scale, offset) -> (o, lse)
    backward(do, dlse, q, k, v, o, lse, mask, scale, offset) -> (dq, dk, dv)

Eager calls hold the mask itself. While compiling, the mask is a constant of the graph, so that
torch.compile and torch.export see the one operator ``subquad::attention``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.mask import Mask
from subquad.mask.spec import from_spec
from subquad.ops.backend import assumed_constant
from subquad.ops.operation import operation

_CONSTANTS: dict[Mask, int] = {}


@assumed_constant
def _constant(spec: Any) -> int:
    return _CONSTANTS.setdefault(from_spec(spec), len(_CONSTANTS))


def run(
    home: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    """Attention by the implementation in the module ``home``, differentiable."""
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, _constant(mask.spec()), scale, offset, home)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Node.apply(home, q, k, v, mask, scale, offset)
    return import_module(home).forward(q, k, v, mask, scale, offset)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, home, q, k, v, mask, scale, offset):
        o, lse = import_module(home).forward(q, k, v, mask, scale, offset)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = home, mask, scale, offset
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        home, *rest = ctx.rest
        got = import_module(home).backward(do, dlse, *ctx.saved_tensors, *rest)
        return None, *got, None, None, None


@operation("attention")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, offset: int, home: str
) -> tuple[Tensor, Tensor]:
    o, lse = import_module(home).forward(q, k, v, list(_CONSTANTS)[mask], scale, offset)
    return o.contiguous(), lse.contiguous()


@_forward_op.fake
def _(q, k, v, mask, scale, offset, home):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


@operation("attention_backward")
def _backward_op(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: int, scale: float, offset: int, home: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    got = import_module(home).backward(
        do, dlse, q, k, v, o, lse, list(_CONSTANTS)[mask], scale, offset
    )
    return tuple(x.contiguous() for x in got)


@_backward_op.fake
def _(do, dlse, q, k, v, o, lse, mask, scale, offset, home):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, do, dlse):
    got = _backward_op(do, dlse, *ctx.saved_tensors, *ctx.rest)
    return *got, None, None, None, None


_forward_op.differentiable(_differentiate, _save)
_backward_op.without_derivative()
