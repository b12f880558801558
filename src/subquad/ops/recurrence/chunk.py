"""The chunked form of the recurrence, forward and backward, linear in the tokens.

In a chunk with the incoming state S, b the sum of its log gates, c its last token:

    P = lower(Q K^T exp(b_i - b_j));   N = strict_lower(beta K K^T exp(b_i - b_j))
    D = (I + N)^-1 beta (V - (exp(b) K) S)           with the delta rule, else D = V
    O = scale ((exp(b) Q) S + P D)
    S <- exp(b_c) S + (exp(b_c - b) K)^T D

Sources: Yang et al., arXiv 2406.06484 (the delta rule), 2412.06464 (its gate), 2312.06635 (gates a
channel). The backward pass keeps the state before every chunk and nothing else of the forward pass;
it walks the chunks in reverse. The inverse needs no gradient of its own: with Y = beta (V -
(exp(b) K) S) and D = (I + N)^-1 Y, it is dY = (I + N)^-T dD and dN = -dY D^T.

The queries and the keys times -beta enter alike, as the rows of one matrix: [P; -N] are their pairs
with K, [dO; dY] are the gradients of what they read from S.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences, c chunk length, X chunks
times heads of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.recurrence.gates import gate_of, unit_inverse
from subquad.ops.recurrence.plan import Plan, Slab


class Part:
    """What both passes make of a slab's inputs.

    Attributes:
        v: ``[X,c,V]``, times beta for the delta rule.
        gate: the rows ``[X,r c,K]`` (the scaled queries and, for the delta rule, the keys times
            -beta) and the keys under their decay.
        pairs: ``[X,r c,c]``, the gated products of the rows with k.
        inverse: ``(I + N)^-1 [X,c,c]``; None without the delta rule.
        whole: for each step the gates of its chunks ``[.,D,1]``, or None.
    """

    def __init__(self, slab: Slab, q, k, v, decay, beta, scale: float, dtype: torch.dtype) -> None:
        c = self.c = slab.chunk
        self.scale = scale
        q, k, self.v = (slab.take(t, dtype) for t in (q, k, v))
        if beta is None:
            rows = q * scale
        else:
            self.beta, self.plain_v = slab.take(beta, dtype), self.v
            self.v = self.v * self.beta
            rows = q.new_empty(len(q), 2 * c, q.shape[2])
            torch.mul(q, scale, out=rows[:, :c])
            torch.mul(k, -self.beta, out=rows[:, c:])
        self.gate = gate_of(rows, k, None if decay is None else slab.take(decay, dtype))
        self.pairs = self.gate.pairs()
        self.inverse = None if beta is None else unit_inverse(self.pairs[:, c:])
        whole = self.gate.whole
        self.whole = [None] * len(slab.steps) if whole is None else whole.split(slab.steps)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``o [B,T,H,V]``, the last state ``[N,H,K,V]``, and the states before every chunk (or none,
    where not ``keep``), in the order of the plan."""
    B, T, H, K = q.shape
    V, wide = v.shape[3], torch.promote_types(v.dtype, torch.float32)
    plan = Plan(B, T, H, max(K, V), cu_seqlens, q.device)
    if state is None:
        S = v.new_zeros(plan.N * H, K, V, dtype=wide)
    else:
        S = plan.sort(state).to(wide, copy=True).view(plan.N * H, K, V)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = S.new_empty(plan.capacity * H if keep else 0, K, V)
    states[plan.total * H :] = 0
    for slab in plan.slabs():
        part = Part(slab, q, k, v, decay, beta, scale, wide)
        before = states[slab.span] if keep else S.new_empty(sum(slab.steps), K, V)
        D = _scan(part, slab.steps, S, before)
        out = torch.bmm(part.pairs[:, : part.c], D)
        slab.put(o, out.baddbmm_(part.gate.reads[:, : part.c], before))
    return o, plan.unsort(S.view(plan.N, H, K, V)), states


def _forget(S: Tensor, gate: Tensor | None) -> Tensor:
    return S if gate is None else S.mul_(gate)


def _scan(part: Part, steps: list[int], S: Tensor, before: Tensor) -> Tensor:
    """Carry S through the slab; leaves the states before its chunks, returns what they write."""
    writes, befores = part.gate.writes, before.split(steps)
    if part.inverse is None:
        added = torch.bmm(writes.mT, part.v).split(steps)
        for n, gate, kept, new in zip(steps, part.whole, befores, added, strict=True):
            kept.copy_(S[:n])
            _forget(S[:n], gate).add_(new)
        return part.v
    D = torch.empty_like(part.v)
    tensors = (part.v, part.gate.reads[:, part.c :], part.inverse, writes.mT, D)
    cut = (t.split(steps) for t in tensors)
    for n, gate, kept, v, r, inverse, w, d in zip(steps, part.whole, befores, *cut, strict=True):
        kept.copy_(S[:n])
        torch.bmm(inverse, torch.baddbmm(v, r, S[:n]), out=d)
        _forget(S[:n], gate).baddbmm_(w, d)
    return D


def backward(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    states: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and the first state."""
    B, T, H, K = q.shape
    V = v.shape[3]
    plan = Plan(B, T, H, max(K, V), cu_seqlens, q.device)
    if dlast is None:
        dS = states.new_zeros(plan.N * H, K, V)
    else:
        dS = plan.sort(dlast).to(states.dtype, copy=True).view(plan.N * H, K, V)
    grads = [
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (q, k, v, decay, beta)
    ]
    for slab in plan.slabs(reverse=True):
        part = Part(slab, q, k, v, decay, beta, scale, states.dtype)
        E = slab.take(do, states.dtype)
        values = _gradients(part, slab.steps, states[slab.span], E, dS)
        for grad, value in zip(grads, values, strict=True):
            if grad is not None:
                slab.put(grad, value)
    return *grads, plan.unsort(dS.view(plan.N, H, K, V))


def _gradients(part: Part, steps: list[int], S: Tensor, E: Tensor, dS: Tensor):
    """Gradients of a slab's q, k, v, decay and beta from that of its output, E ``[X,c,V]``, and
    of the state after it, dS, which is carried to before it."""
    c, gate, D = part.c, part.gate, part.v
    if part.inverse is not None:
        D = torch.bmm(part.inverse, torch.baddbmm(part.v, gate.reads[:, c:], S))
    dv, E, after = _reverse_scan(part, steps, E, dS)
    dA, dreads, dwrites = torch.bmm(E, D.mT), torch.bmm(E, S.mT), torch.bmm(D, after.mT)
    drows, dk, ddecay = gate.gradients(part.pairs, dA, dreads, dwrites, S, after)
    dq = drows[:, :c].mul_(part.scale)
    if part.inverse is None:
        return dq, dk, dv, ddecay, None
    dbeta = (dv * part.plain_v).sum(-1) - (drows[:, c:] * gate.k).sum(-1)
    dk.addcmul_(drows[:, c:], part.beta, value=-1)
    return dq, dk, dv * part.beta, ddecay, dbeta


def _reverse_scan(
    part: Part, steps: list[int], E: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry dS back through the slab. Returns the gradients of v, of what the rows read from S
    (E, and below it those of v, for the delta rule), and of the states after the chunks."""
    (X, c, K), V = part.gate.k.shape, E.shape[2]
    after = dS.new_empty(X, K, V)
    dD = torch.bmm(part.pairs[:, :c].mT, E)
    backwards = [t[::-1] for t in (steps, part.whole, after.split(steps))]
    if part.inverse is None:
        added = torch.bmm(part.gate.reads.mT, E).split(steps)[::-1]
        for n, gate, kept, new in zip(*backwards, added, strict=True):
            kept.copy_(dS[:n])
            _forget(dS[:n], gate).add_(new)
        return dD.baddbmm_(part.gate.writes, after), E, after
    both = E.new_empty(X, 2 * c, V)
    both[:, :c] = E
    tensors = (dD, part.gate.writes, part.inverse.mT, part.gate.reads.mT, both)
    cut = (t.split(steps)[::-1] for t in tensors)
    for n, gate, kept, d, w, inverse, r, e in zip(*backwards, *cut, strict=True):
        kept.copy_(dS[:n])
        e[:, c:] = torch.bmm(inverse, d.baddbmm_(w, dS[:n]))
        _forget(dS[:n], gate).baddbmm_(r, e)
    return both[:, c:], both, after
