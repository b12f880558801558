"""The probe as PyTorch operators: one node for autograd, compile and export.

An implementation is a module with the functions ``forward`` and ``backward`` of
:mod:`subquad.ops.probe.chunk`; ``home`` is its name.

Legend: B batch, T queries, H query heads, V value dim.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from subquad.ops.operation import operation


@operation("probe")
def run(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor, scale: float,
    saves: bool, peak: bool, home: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the softmax's mean of v (empty unless it ``saves``), lse, the mean of t, and the key of
    the largest score (empty unless ``peak``). Differentiable through o and lse."""
    return import_module(home).forward(q, k, v, r, lo, hi, scale, saves, peak)


@run.fake
def _(q, k, v, r, lo, hi, scale, saves, peak, home):
    dtype = torch.promote_types(q.dtype, torch.float32)
    o = v.new_empty(*q.shape[:3], v.shape[3])
    mean = torch.empty_like(o) if saves else v.new_empty(0)
    lse, drift = (q.new_empty(q.shape[:3], dtype=dtype) for _ in "12")
    return o, mean, lse, drift, lo.new_empty(q.shape[:3] if peak else 0)


@operation("probe_backward")
def _backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, r: Tensor, lo: Tensor, hi: Tensor,
    o: Tensor, mean: Tensor, lse: Tensor, drift: Tensor, scale: float, home: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rest = q, k, v, r, lo, hi, o, mean, lse, drift, scale
    got = import_module(home).backward(do, dlse, *rest)
    return tuple(x.contiguous() for x in got)


@_backward.fake
def _(do, dlse, q, k, v, r, lo, hi, o, mean, lse, drift, scale, home):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, r))


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.saves, _, ctx.home = inputs
    ctx.save_for_backward(*tensors, *output[:4])
    ctx.mark_non_differentiable(output[1], output[3], output[4])


def _differentiate(ctx, do, _mean, dlse, _drift, _top):
    if not ctx.saves:
        raise RuntimeError("subquad::probe was run without saves, so it has no backward pass")
    got = _backward(do, dlse, *ctx.saved_tensors, ctx.scale, ctx.home)
    return *got, None, None, None, None, None, None


run.differentiable(_differentiate, _save)
_backward.without_derivative()
