"""The recurrence in plain torch, on any device: chunked where it trains or reads many tokens, one
fused step for one token.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.backend import without_autocast
from subquad.ops.layout import expand_heads
from subquad.ops.operation import operation
from subquad.ops.recurrence import chunk, reference
from subquad.ops.recurrence.plan import chunk_count


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
    """See :func:`subquad.ops.recurrence.recurrence`; the arguments are checked there."""
    one = q.shape[1] == 1 and cu_seqlens is None
    if form == "parallel" or (form == "recurrent" and not one):
        return reference.recurrence(
            q,
            k,
            v,
            decay=decay,
            beta=beta,
            scale=scale,
            state=state,
            cu_seqlens=cu_seqlens,
            form=form,
        )
    q, k, v, decay, beta = expand_heads(q, k, v, decay, beta)
    if one and form != "chunk":
        return step(q, k, v, decay, beta, scale, state)
    tensors = (q, k, v, decay, beta, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    o, last, _ = chunked(q, k, v, decay, beta, scale, state, cu_seqlens, keep)
    return o, last


def step(q, k, v, decay, beta, scale, state) -> tuple[Tensor, Tensor]:
    """One token, ``[B,1,H,*]``: one pass over the state to read, one to write.

    What the query reads of the new state is what it reads of the forgotten one, plus what the
    token wrote: S^T q = S'^T q + (k . q) w.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, w = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    q = q * scale
    read = (q * k).sum(-1, keepdim=True)
    if state is None:
        S = q.new_zeros(*q.shape[:2], q.shape[3], w.shape[3])
    else:
        S = state.to(wide)
    if decay is not None:
        gate = decay[:, 0].to(wide).exp()
        S = S * (gate[..., None] if gate.dim() == 3 else gate[..., None, None])
    old = torch.cat([q, k], 2) @ S
    if beta is not None:
        w = (w - old[:, :, 1:]) * beta[:, 0, :, None, None].to(wide)
    o = torch.addcmul(old[:, :, :1], read, w)
    last = torch.addcmul(S, k.mT, w)
    return o.transpose(1, 2).to(v.dtype), last


@operation("recurrence_chunked")
def chunked(
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
    """The chunked form as one node for compilers; ``keep`` also returns the states for backward."""
    return chunk.forward(q, k, v, decay, beta, scale, state, cu_seqlens, keep)


@chunked.fake
def _(q, k, v, decay, beta, scale, state, cu_seqlens, keep):
    B, T, H, K = q.shape
    V, N = v.shape[3], None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.promote_types(v.dtype, torch.float32)
    last = v.new_empty(B if N is None else N, H, K, V, dtype=wide)
    count = chunk_count(B, T, N, max(K, V)) if keep else 0
    return v.new_empty(v.shape), last, v.new_empty(count * H, K, V, dtype=wide)


@operation("recurrence_chunked_backward")
def chunked_backward(
    do: Tensor | None,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay, beta, state; empty for an absent decay or beta."""
    do = torch.zeros_like(v) if do is None else do
    with without_autocast(v.device.type):
        grads = chunk.backward(do, dlast, q, k, v, decay, beta, scale, cu_seqlens, states)
    dq, dk, dv, ddecay, dbeta, dstate = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dk, dv, ddecay, dbeta, dstate


@chunked_backward.fake
def _(do, dlast, q, k, v, decay, beta, scale, cu_seqlens, states):
    grads = [q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, decay, beta)]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return *grads, states.new_empty(N, q.shape[2], *states.shape[1:])


def _save(ctx, inputs, output):
    q, k, v, decay, beta, ctx.scale, state, cu_seqlens, _ = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, decay, beta, cu_seqlens, output[2])


def _backward(ctx, do, dlast, _):
    q, k, v, decay, beta, cu_seqlens, states = ctx.saved_tensors
    dq, dk, dv, ddecay, dbeta, dstate = chunked_backward(
        do, dlast, q, k, v, decay, beta, ctx.scale, cu_seqlens, states
    )
    return (
        dq,
        dk,
        dv,
        None if decay is None else ddecay,
        None if beta is None else dbeta,
        None,
        None if ctx.state_dtype is None else dstate.to(ctx.state_dtype),
        None,
        None,
    )


chunked.differentiable(_backward, _save)
chunked_backward.without_derivative()
