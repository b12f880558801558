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

The queries and the keys times beta enter alike, as the rows of one matrix: [P; N] are their pairs
with K, [dO; -dY] are the gradients of their reads from S.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences, c chunk length, X chunks
times heads of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.recurrence.gates import gate_of, unit_inverse
from subquad.ops.recurrence.plan import Plan, Slab, chunk_count


class Part:
    """What both passes make of a slab's inputs.

    Attributes:
        rows: ``[X,r c,K]``, the scaled queries and, for the delta rule, the keys times beta.
        reads: the rows gated from the chunk's start: what they read from S.
        writes: ``[X,c,K]``, the keys gated to the chunk's end: where they write.
        v: ``[X,c,V]``, times beta for the delta rule.
        pairs: ``[X,r c,c]``.
        inverse: ``(I + N)^-1 [X,c,c]``; None without the delta rule.
    """

    def __init__(self, slab: Slab, q, k, v, decay, beta, scale: float, dtype: torch.dtype) -> None:
        self.c, self.scale = slab.chunk, scale
        q, self.k, self.v = (slab.take(t, dtype) for t in (q, k, v))
        self.beta = None if beta is None else slab.take(beta, dtype)
        self.rows = q.mul_(scale)
        if self.beta is not None:
            self.rows = torch.cat([self.rows, self.beta * self.k], 1)
            self.plain_v, self.v = self.v, self.beta * self.v
        self.gate = gate_of(self.rows, self.k, None if decay is None else slab.take(decay, dtype))
        self.pairs = self.gate.pairs()
        self.inverse = None if beta is None else unit_inverse(self.pairs[:, self.c :])
        self.reads, self.writes = self.rows, self.k
        if self.gate.start is not None and self.gate.end is not None:
            kinds = self.rows.view(len(self.k), -1, *self.k.shape[1:])
            self.reads = (kinds * self.gate.start[:, None]).view_as(self.rows)
            self.writes = self.k * self.gate.end

    def forget(self, S: Tensor, step: slice) -> Tensor:
        """The gate of a whole chunk, on ``S`` in place."""
        return S if self.gate.whole is None else S.mul_(self.gate.whole[step])


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
    V, N = v.shape[3], B if cu_seqlens is None else cu_seqlens.numel() - 1
    wide = torch.promote_types(v.dtype, torch.float32)
    plan = Plan(B, T, H, max(K, V), cu_seqlens, q.device)
    if state is None:
        S = v.new_zeros(N * H, K, V, dtype=wide)
    else:
        S = plan.sort(state).to(wide, copy=True).view(N * H, K, V)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    count = chunk_count(B, T, None if cu_seqlens is None else N) if keep else 0
    states = S.new_zeros(count * H, K, V)
    for slab in plan.slabs():
        part = Part(slab, q, k, v, decay, beta, scale, wide)
        before = states[slab.span] if keep else S.new_empty(len(part.k), K, V)
        D = _scan(part, slab, S, before)
        slab.put(o, torch.bmm(part.pairs[:, : part.c], D).baddbmm_(part.reads[:, : part.c], before))
    return o, plan.unsort(S.view(N, H, K, V)), states


def _scan(part: Part, slab: Slab, S: Tensor, before: Tensor) -> Tensor:
    """Carry S through the slab; leaves the states before its chunks, returns what they write."""
    if part.inverse is None:
        added = torch.bmm(part.writes.mT, part.v)
        for step in slab.steps:
            alive = S[: step.stop - step.start]
            before[step] = alive
            part.forget(alive, step).add_(added[step])
        return part.v
    D = torch.empty_like(part.v)
    for step in slab.steps:
        alive = S[: step.stop - step.start]
        before[step] = alive
        Y = torch.baddbmm(part.v[step], part.reads[step, part.c :], alive, alpha=-1)
        torch.bmm(part.inverse[step], Y, out=D[step])
        part.forget(alive, step).baddbmm_(part.writes[step].mT, D[step])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, decay, beta and the first state."""
    B, T, H, K = q.shape
    V, N = v.shape[3], B if cu_seqlens is None else cu_seqlens.numel() - 1
    plan = Plan(B, T, H, max(K, V), cu_seqlens, q.device)
    if dlast is None:
        dS = states.new_zeros(N * H, K, V)
    else:
        dS = plan.sort(dlast).to(states.dtype, copy=True).view(N * H, K, V)
    inputs = (q, k, v, decay, beta)
    grads = [
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs
    ]
    for slab in plan.slabs(reverse=True):
        part = Part(slab, q, k, v, decay, beta, scale, states.dtype)
        E = slab.take(do, states.dtype)
        for grad, value in zip(grads, _gradients(part, slab, states[slab.span], E, dS)):
            if grad is not None and value is not None:
                slab.put(grad, value)
    dq, dk, dv, ddecay, dbeta = grads
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv, ddecay, dbeta, plan.unsort(dS.view(N, H, K, V))


def _gradients(part: Part, slab: Slab, S: Tensor, E: Tensor, dS: Tensor):
    """Gradients of a slab's q, k, v, decay and beta from that of its output, E ``[X,c,V]``, and
    of the state after it, dS, which is carried to before it."""
    c, gate = part.c, part.gate
    D = part.v
    if part.inverse is not None:
        D = torch.baddbmm(part.v, part.reads[:, c:], S, alpha=-1)
        D = torch.bmm(part.inverse, D)
    dD, E, after = _reverse_scan(part, slab, E, dS)
    drows, dk, db = gate.gradients(part.pairs, torch.bmm(E, D.mT))
    dreads, dwrites = torch.bmm(E, S.mT), torch.bmm(D, after.mT)
    ddecay = None
    if gate.start is None or gate.end is None or gate.whole is None or db is None:
        drows, dk = drows.add_(dreads), dk.add_(dwrites)
    else:
        ends = (dwrites * part.writes).sum_to_size(db.shape)
        db.sub_(ends)
        db.add_(
            (dreads * part.reads).view(len(S), -1, *part.k.shape[1:]).sum(1).sum_to_size(db.shape)
        )
        whole = (S * after).sum(2, keepdim=True).sum_to_size(gate.whole.shape).mul_(gate.whole)
        db[:, -1:].add_(ends.sum(1, keepdim=True)).add_(whole.mT)
        ddecay = db.flip(1).cumsum(1).flip(1)
        kinds = drows.view(len(S), -1, *part.k.shape[1:])
        kinds.addcmul_(dreads.view_as(kinds), gate.start[:, None])
        dk.addcmul_(dwrites, gate.end)
    dq = drows[:, :c].mul_(part.scale)
    if part.beta is None:
        return dq, dk, dD, ddecay, None
    dbeta = (drows[:, c:] * part.k).sum(-1) + (dD * part.plain_v).sum(-1)
    dk.addcmul_(drows[:, c:], part.beta)
    return dq, dk, dD * part.beta, ddecay, dbeta


def _reverse_scan(part: Part, slab: Slab, E: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry dS back through the slab. Returns the gradients of v, of the rows' reads from S, and
    of the states after the slab's chunks."""
    c, (X, K), V = part.c, part.k.shape[::2], E.shape[2]
    after = dS.new_empty(X, K, V)
    dD = torch.bmm(part.pairs[:, :c].mT, E)
    if part.inverse is None:
        added = torch.bmm(part.reads.mT, E)
        for step in reversed(slab.steps):
            alive = dS[: step.stop - step.start]
            after[step] = alive
            part.forget(alive, step).add_(added[step])
        return dD.baddbmm_(part.writes, after), E, after
    E = torch.cat([E, torch.empty_like(E)], 1)
    for step in reversed(slab.steps):
        alive = dS[: step.stop - step.start]
        after[step] = alive
        dD[step] = torch.bmm(part.inverse[step].mT, dD[step].baddbmm_(part.writes[step], alive))
        torch.neg(dD[step], out=E[step, c:])
        part.forget(alive, step).baddbmm_(part.reads[step].mT, E[step])
    return dD, E, after
