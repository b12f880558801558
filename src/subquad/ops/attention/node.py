"""One differentiable node for a forward and a backward written by hand.

An implementation is a module with

    forward(q, k, v, mask, scale, offset) -> (o, lse)
    backward(do, dlse, q, k, v, o, lse, mask, scale, offset) -> (dq, dk, dv)

Eager calls hold the mask itself. While something traces, the mask is a constant of the graph, its
spec as text, so that torch.compile, torch.export and transforms see the one operator
``subquad::attention``, also in a graph that another process exported.
"""

from __future__ import annotations

from ast import literal_eval
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.mask import Mask
from subquad.mask.kept import traced
from subquad.mask.spec import from_spec
from subquad.ops.backend import assumed_constant
from subquad.ops.operation import operation, refuse_tangents

_masks: dict[str, Mask] = {}  # of graphs


@assumed_constant
def _text(spec: Any) -> str:
    text = repr(spec)
    _mask(text)
    return text


def _mask(text: str) -> Mask:
    if text not in _masks:
        _masks[text] = from_spec(literal_eval(text))
    return _masks[text]


def run(
    home: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    """Attention by the implementation in the module ``home``, differentiable."""
    if traced() or torch._C._are_functorch_transforms_active():
        return _forward_op(q, k, v, _text(mask.spec()), scale, offset, home)
    refuse_tangents("attention", (q, k, v))
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
        home, mask, scale, offset = ctx.rest
        given = do, dlse, *ctx.saved_tensors
        if traced():  # a backward pass alone can be compiled
            got = _backward_op(*given, _text(mask.spec()), scale, offset, home)
        else:
            got = import_module(home).backward(*given, mask, scale, offset)
        return None, *got, None, None, None


@operation("attention")
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, mask: str, scale: float, offset: int, home: str
) -> tuple[Tensor, Tensor]:
    o, lse = import_module(home).forward(q, k, v, _mask(mask), scale, offset)
    return o.contiguous(), lse.contiguous()


@_forward_op.fake
def _(q, k, v, mask, scale, offset, home):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


@operation("attention_backward")
def _backward_op(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: str, scale: float, offset: int, home: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    got = import_module(home).backward(do, dlse, q, k, v, o, lse, _mask(mask), scale, offset)
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
