"""The definition of the memory: one token after the other, the inner gradient by autograd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.func import grad

from subquad.ops.memory.net import read, split
from subquad.ops.memory.state import MemoryState


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    real: Tensor,
    state: MemoryState,
    *,
    chunk: int | None,
    step: int,
    after: bool,
    gain_lr: float,
) -> tuple[Tensor, MemoryState]:
    """S = eta S - theta grad |M(k) - v|^2, W = (1 - alpha) W + S, y = M(q; W).

    q, k, v ``[N,H,T,d]``, gates ``[N,H,T]``, real bool ``[N,T]``.
    """
    W, S, tokens = state.weights, state.momentum, state.tokens
    base = state.base or W
    A = state.pending or tuple(torch.zeros_like(w) for w in W)
    ys = []
    for t in range(q.shape[2]):
        here = slice(t, t + 1)
        u = grad(partial(_loss, k=k[:, :, here], v=v[:, :, here]))(base)
        if split(base)[1] is not None:
            u = (*u[:-1], gain_lr * u[-1])
        on = real[:, t]
        tokens = tokens + on
        ends = on & (tokens % step == 0)
        theta, eta, keep = lr[:, :, t], momentum[:, :, t].exp(), decay[:, :, t].exp()
        before = W
        A = _where(on, [a + _times(theta, g) for a, g in zip(A, u)], A)
        S = _where(ends, [_times(eta, s) - a for s, a in zip(S, A)], S)
        W = _where(ends, [_times(keep, w) + s for w, s in zip(W, S)], W)
        A = _where(ends, [torch.zeros_like(a) for a in A], A)
        if chunk is not None:
            base = _where(on & (tokens % chunk == 0), W, base)
        ys.append(read(W if after else before, q[:, :, here]))
    y = torch.cat(ys, 2) if ys else q
    return y, MemoryState(W, S, base if state.base else (), A if state.pending else (), tokens)


def _loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
    """Summed over sequences and heads, whose weights are their own."""
    return (read(weights, k) - v).square().sum()


def _times(gate: Tensor, w: Tensor) -> Tensor:
    return gate.view(*gate.shape, *[1] * (w.dim() - 2)) * w


def _where(on: Tensor, new, old) -> tuple[Tensor, ...]:
    return tuple(torch.where(on.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(new, old))
