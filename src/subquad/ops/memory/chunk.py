"""The memory in chunks, exact: the gradients of a chunk at its start weights all at once, and the
weights between them as masked linear attention, layer by layer, never held token by token.

Legend: N sequences, H heads, T tokens, w tokens of a slab (a chunk or a part of it), d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.memory.gates import Gates, gates
from subquad.ops.memory.net import EPS, Sources, sources, split
from subquad.ops.memory.state import MemoryState, Weights

WIDEST = 64  # tokens of a slab: the gates of one are matrices of its width


def slab_width(chunk: int | None, widest: int = WIDEST) -> int:
    """Tokens worked at a time: a chunk, or the largest part of it that divides it."""
    if chunk is None or chunk <= widest:
        return chunk or widest
    parts = [w for w in range(widest // 4, widest + 1) if chunk % w == 0]
    return parts[-1] if parts else chunk


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
    fresh: bool = False,
) -> tuple[Tensor, MemoryState]:
    """As the reference; the tokens of a slab, ``w`` places, must lie in one chunk.

    fresh: every place is a token, the first one of its sequence.
    """
    T = q.shape[2]
    w = min(slab_width(chunk), T)
    pad = -T % w
    real = F.pad(real, (0, pad)).unflatten(1, (-1, w))
    read = real.flatten(1).cumsum(1).view_as(real) + state.tokens[:, None, None]
    slabs = (F.pad(t, (0, pad)).unflatten(2, (-1, w)) for t in (lr, momentum, decay))
    theta, eta, keep = slabs
    all_gates = gates(theta, eta, keep, real, read, step=step)
    tokens, ys = state.tokens, []
    W, S, A = state.weights, state.momentum, state.pending
    base = state.base or W
    for n in range(real.shape[1]):
        rows = slice(n * w, (n + 1) * w)
        qs, ks, vs = (_to(t[:, :, rows], w) for t in (q, k, v))
        made, g = sources(base, ks, vs), all_gates.slab(n)
        if made.gain is not None:
            made = made._replace(gain=gain_lr * made.gain)
        ys.append(_read(qs, made, g if after else _before(g), W, S, A))
        W, S, A = _update(made, g, W, S, A)
        if chunk == 1 or (fresh and chunk and (n + 1) * w <= T and (n + 1) * w % chunk == 0):
            base = W
        elif chunk is not None and not fresh:
            ended = (read[:, n, -1] > tokens) & (read[:, n, -1] % chunk == 0)
            base = tuple(
                torch.where(ended.view(-1, *[1] * (b.dim() - 1)), a, b)
                for a, b in zip(W, base, strict=True)
            )
        tokens = read[:, n, -1]
    y = torch.cat(ys, 2)[:, :, :T]
    return y, MemoryState(W, S, base if state.base else (), A, tokens)


def _to(t: Tensor, w: int) -> Tensor:
    return t if t.shape[2] == w else F.pad(t, (0, 0, 0, w - t.shape[2]))


def _read(z: Tensor, made: Sources, g: Gates, W: Weights, S: Weights, A: Weights) -> Tensor:
    """``M(z_t; W_t)``: each layer on the start weights, the momentum and the gradients."""
    weights, gain = split(W)
    h = z
    for i, (a, delta) in enumerate(zip(made.inputs, made.deltas, strict=True)):
        h = F.gelu(h) if i else h
        scores = (h @ a.mT) * g.G * g.theta[..., None, :]
        out = g.beta[..., None] * (h @ weights[i]) + g.f[..., None] * (h @ S[i])
        if g.h is not None:
            out = out - g.h[..., None] * (h @ A[i])
        h = out - scores @ delta
    if gain is None:
        return h
    assert made.gain is not None
    gains = g.beta[..., None] * gain[:, :, None] + g.f[..., None] * S[-1][:, :, None]
    if g.h is not None:
        gains = gains - g.h[..., None] * A[-1][:, :, None]
    gains = gains - (g.G * g.theta[..., None, :]) @ made.gain
    return z + F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + gains)


def _update(
    made: Sources, g: Gates, W: Weights, S: Weights, A: Weights
) -> tuple[Weights, Weights, Weights]:
    """The weights, the momentum and the pending gradients after the slab."""
    to_W, to_S = g.G[..., -1, :] * g.theta, g.P[..., -1, :] * g.theta

    def summed(c: Tensor) -> list[Tensor]:
        """``sum_j c_j u_j``, a tensor a layer."""
        pairs = zip(made.inputs, made.deltas, strict=True)
        found = [(a * c[..., None]).mT @ delta for a, delta in pairs]
        return found if made.gain is None else [*found, (c[..., None, :] @ made.gain)[..., 0, :]]

    def scaled(c: Tensor, t: Tensor) -> Tensor:
        return c[..., -1].view(*c.shape[:2], *[1] * (t.dim() - 2)) * t

    news = list(zip(W, S, summed(to_W), summed(to_S), strict=True))
    new_W = [scaled(g.beta, w) + scaled(g.f, s) - u for w, s, u, _ in news]
    new_S = [scaled(g.m, s) - u for _, s, _, u in news]
    if g.h is None or g.p is None or g.open is None:
        return tuple(new_W), tuple(new_S), ()
    new_W = [t - scaled(g.h, a) for t, a in zip(new_W, A, strict=True)]
    new_S = [t - scaled(g.p, a) for t, a in zip(new_S, A, strict=True)]
    rest = summed(g.theta * g.open)
    unended = g.open[..., :1].to(W[0].dtype)
    new_A = [scaled(unended, a) + u for a, u in zip(A, rest, strict=True)]
    return tuple(new_W), tuple(new_S), tuple(new_A)


def _before(g: Gates) -> Gates:
    """The coefficients one token earlier, for a read before the write."""

    def shift(t: Tensor, first: float) -> Tensor:
        return F.pad(t[..., :-1], (1, 0), value=first)

    h = None if g.h is None else shift(g.h, 0.0)
    G = F.pad(g.G[..., :-1, :], (0, 0, 1, 0))
    return g._replace(beta=shift(g.beta, 1.0), f=shift(g.f, 0.0), h=h, G=G)
