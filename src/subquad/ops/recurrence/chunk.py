"""The chunked form of the recurrence, forward and backward, linear in the tokens.

In a chunk with the incoming state S, b the sum of its log gates, c its last token:

    P = lower(Q K^T exp(b_i - b_j));   N = strict_lower(beta K K^T exp(b_i - b_j))
    U = (I + N)^-1 beta V;   W = -(I + N)^-1 beta (exp(b) K)
    D = U + W S                                       with the delta rule, else D = V
    O = scale ((exp(b) Q) S + P D)
    S <- exp(b_c) S + (exp(b_c - b) K)^T D

Sources: Yang et al., arXiv 2406.06484 (the delta rule), 2412.06464 (its gate), 2312.06635 (gates a
channel). The backward pass keeps the state before every chunk and nothing else of the forward pass;
it walks the chunks in reverse. The inverse needs no gradient of its own: with Y = beta (V -
(exp(b) K) S) and D = (I + N)^-1 Y, it is dY = (I + N)^-T dD and dN = -dY D^T.

Only the states are carried from chunk to chunk; all else is done for a slab of chunks at once.

The queries and the keys times -beta enter alike, as the rows of one matrix: [P; -N] are their pairs
with K, [dO; dY] are the gradients of what they read from S.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences, c chunk length, X chunks
times heads of a slab.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        U, W: ``[X,c,V]``, ``[X,c,K]``, as above; V and None without the delta rule. U is handed
            out once: D is made in its place.
    """

    def __init__(self, slab: Slab, q, k, v, decay, beta, scale: float, dtype: torch.dtype) -> None:
        c, room = slab.chunk, slab.room
        self.c, self.room, self.scale = c, room, scale
        X, K, V = sum(slab.steps), k.shape[3], v.shape[3]
        like = v.new_empty(0, dtype=dtype)
        k = slab.take(k, dtype, room("k", like, X, c, K))
        self.v = self.plain_v = slab.take(v, dtype, room("v", like, X, c, V))
        rows = room("rows", like, X, c if beta is None else 2 * c, K)
        slab.take(q, dtype, rows[:, :c], scale)
        if beta is not None:
            self.beta = slab.take(beta, dtype)
            self.v = torch.mul(self.v, self.beta, out=room("beta v", like, X, c, V))
            torch.mul(k, -self.beta, out=rows[:, c:])
        self.gate = gate_of(rows, k, None if decay is None else slab.take(decay, dtype), room)
        self.pairs = self.gate.pairs()
        self.U, self.W, self.inverse = self.v, None, None
        if beta is not None:
            self.inverse = unit_inverse(self.pairs[:, c:])
            self.U = room.bmm("U", self.inverse, self.v)
            self.W = room.bmm("W", self.inverse, self.gate.reads[:, c:])


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
        S = plan.sort(state, wide)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = S.new_empty(plan.capacity * H if keep else 0, K, V)
    states[plan.total * H :] = 0
    for slab in plan.slabs():
        part = Part(slab, q, k, v, decay, beta, scale, wide)
        before = states[slab.span] if keep else slab.room("S", S, sum(slab.steps), K, V)
        D = _scan(part, slab.steps, S, before)
        out = slab.room.bmm("o", part.pairs[:, : part.c], D)
        slab.put(o, out.baddbmm_(part.gate.reads[:, : part.c], before))
    return o, plan.unsort(S), states


def _cut(t: Tensor | None, steps: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(steps) if t is None else t.split(steps)


def _carry(S: Tensor, gate: Tensor | None, added: Tensor | None, out: Tensor) -> Tensor:
    """``gate * S + added``."""
    if added is None:
        return out.copy_(S) if gate is None else torch.mul(S, gate, out=out)
    if gate is None:
        return torch.add(S, added, out=out)
    return torch.addcmul(added, S, gate, out=out)


def _scan(part: Part, steps: list[int], S: Tensor, before: Tensor) -> Tensor:
    """Carry S through the slab; leaves the states before its chunks, returns what they write."""
    D, W, writes = part.U, part.W, part.gate.writes.mT
    gates, befores = _cut(part.gate.whole, steps), before.split(steps)
    added = _cut(part.room.bmm("added", writes, D) if W is None else None, steps)
    cut = list(zip(befores, gates, added, _cut(W, steps), writes.split(steps), D.split(steps)))
    befores[0].copy_(S[: steps[0]])
    for i, (old, gate, add, w, write, d) in enumerate(cut):
        last = i + 1 == len(steps)
        straight = not last and steps[i + 1] == steps[i]
        new = _carry(old, gate, add, befores[i + 1] if straight else S[: steps[i]])
        if w is not None:
            new.baddbmm_(write, d.baddbmm_(w, old))
        if not last and not straight:
            befores[i + 1].copy_(S[: steps[i + 1]])
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
        dS = plan.sort(dlast, states.dtype)
    grads = [
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (q, k, v, decay, beta)
    ]
    for slab in plan.slabs(reverse=True):
        part = Part(slab, q, k, v, decay, beta, scale, states.dtype)
        E = slab.room("E", states, *part.pairs.shape[:2], V)
        slab.take(do, states.dtype, E[:, : part.c])
        values = _gradients(part, slab.steps, states[slab.span], E, dS)
        for grad, value in zip(grads, values, strict=True):
            if grad is not None:
                slab.put(grad, *value)
    return *grads, plan.unsort(dS)


def _gradients(part: Part, steps: list[int], S: Tensor, E: Tensor, dS: Tensor):
    """Gradients of a slab's q, k, v, decay and beta, each with a factor that it still needs, or
    none, from that of its output, E ``[X,c,V]`` (for the delta rule with room for dY below), and
    of the state after it, dS, which is carried to before it."""
    c, gate, room = part.c, part.gate, part.room
    D = part.U if part.W is None else part.U.baddbmm_(part.W, S)
    dD, after = _reverse_scan(part, steps, E[:, :c], dS)
    dv = dD
    if part.inverse is not None:
        dv = room.bmm("dv", part.inverse.mT, dD)
        E[:, c:] = dv
    dA, dreads = room.bmm("dA", E, D.mT), room.bmm("dreads", E, S.mT)
    dwrites = room.bmm("dwrites", D, after.mT)
    drows, dk, ddecay = gate.gradients(part.pairs, dA, dreads, dwrites, S, after)
    dq = (drows[:, :c], part.scale)
    if part.inverse is None:
        return dq, (dk,), (dv,), (ddecay,), ()
    dbeta = torch.mul(part.plain_v, dv, out=part.v).sum(-1)
    dbeta.sub_(torch.mul(drows[:, c:], gate.k, out=room("k dk", gate.k, *gate.k.shape)).sum(-1))
    dk.addcmul_(drows[:, c:], part.beta, value=-1)
    return dq, (dk,), (dv, part.beta), (ddecay,), (dbeta,)


def _reverse_scan(part: Part, steps: list[int], E: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
    """Carry dS back through the slab. Returns the gradients of D and of the states after the
    chunks."""
    c, gate, W = part.c, part.gate, None if part.W is None else part.W.mT
    dD = part.room.bmm("dD", part.pairs[:, :c].mT, E)
    added = part.room.bmm("added", gate.reads[:, :c].mT, E)
    after = part.room("after", added, *added.shape)
    afters = after.split(steps)
    cut = zip(
        afters,
        _cut(gate.whole, steps),
        added.split(steps),
        _cut(W, steps),
        dD.split(steps),
        gate.writes.split(steps),
    )
    afters[-1].copy_(dS[: steps[-1]])
    for i, (old, whole, add, w, d, write) in reversed(list(enumerate(cut))):
        n = steps[i]
        to = afters[i - 1] if i else dS
        new = _carry(old, whole, add, to[:n])
        if w is not None:
            new.baddbmm_(w, d.baddbmm_(write, old))
        if i and steps[i - 1] > n:
            to[n:] = dS[n : steps[i - 1]]
    return dD if W is not None else dD.baddbmm_(gate.writes, after), after
