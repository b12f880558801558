"""Mixed attention in blocks, linear in the tokens, on any device.

The exact part looks at blocks of near keys (see :mod:`~subquad.ops.kernel_attention.exact`). For a
sliding window of w the linear part is the plain recurrence of queries over keys that come w tokens
late; for terraces it is one state a block, of the blocks before the last two.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
L keys with features, F features, N blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.kernel_attention import reference
from subquad.ops.kernel_attention.exact import Band, near_sums
from subquad.ops.kernel_attention.grid import Grid
from subquad.ops.kernel_attention.near import Near, places
from subquad.ops.layout import repeat_heads

FEW = 8  # up to this many queries (decode) are one product with what they may see
BLOCK = 64  # queries that share their near keys, at least and up to 4 times as many


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, *, near: Near, scale: float,
    weight: Tensor | None, gate: Tensor | None, chosen: Tensor | None,
    state: tuple[Tensor, Tensor] | None, starts: Tensor | None, cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    T, S = q.shape[1], k.shape[1]
    few = cu_seqlens is None and T <= FEW and near.reach + FEW >= S
    if few or S == 0 or chosen is not None:
        return reference.mixed_attention(
            q, k, v, phi_q, phi_k, near=near, scale=scale, weight=weight, gate=gate,
            chosen=chosen, state=state, starts=starts, cu_seqlens=cu_seqlens, eps=eps,
        )  # fmt: skip
    dtype, out = torch.promote_types(v.dtype, torch.float32), v.dtype
    q, k, phi_q, phi_k = (x.to(dtype) for x in (q, k, phi_q, phi_k))
    ones = F.pad(v.to(dtype), (0, 1), value=1.0)  # the denominator is a value that is always one
    place, ids = places(S, starts, cu_seqlens, q.device)
    live = place >= 0
    if state is not None and cu_seqlens is None:
        covered = near.flushed((place[:, :1] + S - T).clamp_min(0))
        live = live & (place >= covered)
    k_ids = torch.where(live, ids, -1)
    joined = None
    if state is not None:
        joined = torch.cat([state[0].to(dtype), state[1].to(dtype)[..., None]], -1)
    run = _terraced if near.terraced else _sliding
    exact, far, last = run(
        q, k, ones, phi_q, phi_k, near, scale, joined, starts, cu_seqlens, place, ids, k_ids
    )
    if weight is not None:
        exact = exact * weight.to(dtype)[:, None]
    total = exact[..., -1:] + far[..., -1:] + eps
    far = far[..., :-1] if gate is None else far[..., :-1] * gate.to(dtype)
    o = (exact[..., :-1] + far) / torch.where(total == 0, 1.0, total)
    return o.to(out), (last[..., :-1], last[..., -1])


def _sliding(q, k, v, phi_q, phi_k, near, scale, state, starts, cu, place, ids, k_ids):
    """Keys w tokens late: the state that query i reads is that of token i - w."""
    from subquad.ops.recurrence import recurrence

    T, S, w = q.shape[1], k.shape[1], near.window
    block = min(max(w, BLOCK), 4 * BLOCK, max(16, T))
    band = Band(block, -(-(w - 1) // block), w)
    exact = near_sums(q, k, v, band, scale=scale, q_ids=ids[:, S - T :], k_ids=k_ids)
    first = S - T - w  # the key that query 0 is the first to see in the state
    old = max(first, 0)
    if old:
        before = _written(phi_k[:, :old], v[:, :old], k_ids[:, :old])
        state = before if state is None else state + before
    hold, until = min(max(-first, 0), T), max(first + T, 0)
    late_k, late_v = (F.pad(x[:, old:until], (0, 0, 0, 0, hold, 0)) for x in (phi_k, v))
    late_ids = F.pad(k_ids[:, old:until], (hold, 0), value=-1)
    late_k = late_k.masked_fill((late_ids != ids[:, S - T :])[..., None, None], 0)
    far, last = recurrence(phi_q, late_k, late_v, scale=1.0, state=state, cu_seqlens=cu)
    return exact, far, last


def _terraced(q, k, v, phi_q, phi_k, near, scale, state, starts, cu, place, ids, k_ids):
    """On a grid of blocks: block n reads the state after block n - 2."""
    T, S, w = q.shape[1], k.shape[1], near.window
    grid = Grid(S, w, starts, cu, q.device)
    q, phi_q = (F.pad(x, (0, 0, 0, 0, S - T, 0)) for x in (q, phi_q))
    phi_k = F.pad(phi_k, (0, 0, 0, 0, 0, S - phi_k.shape[1]))
    q, k, v, phi_q, phi_k = (grid.lay(x) for x in (q, k, v, phi_q, phi_k))
    ids, k_ids = grid.lay(ids, fill=-2), grid.lay(k_ids, fill=-1)
    exact = near_sums(q, k, v, Band(w, 1, 2 * w), scale=scale, q_ids=ids, k_ids=k_ids)
    phi_k = phi_k.masked_fill((k_ids < 0)[..., None, None], 0)
    v = repeat_heads(v, phi_k.shape[2])
    blocks = (x.unflatten(1, (-1, w)).transpose(2, 3) for x in (phi_q, phi_k, v))  # [B,N,H,w,.]
    phi_q, phi_k, v = blocks
    states, last = _prefix(phi_k.mT @ v, state, grid)
    far = (phi_q @ states).transpose(2, 3).flatten(1, 2)
    exact, far = (grid.lift(x)[:, S - T :] for x in (exact, far))
    return exact, far, last


def _prefix(written: Tensor, state: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """What each block reads ``[B,N,H,F,V]``, and the state after each sequence's last block."""
    if grid.cuts is None:
        begin = torch.zeros_like(written[:, :1]) if state is None else state[:, None]
        states = torch.cat([begin, begin, begin + written[:, :-2].cumsum(1)], 1)
        states = states[:, : written.shape[1]]
        last = grid.last().to(written.device).expand(len(written))
        return states, states[torch.arange(len(written), device=written.device), last]
    every, lasts = [], []
    for n, part in enumerate(written[0].split(grid.cuts)):
        begin = torch.zeros_like(written[0, :1]) if state is None else state[n : n + 1]
        states = torch.cat([begin, begin, begin + part[:-2].cumsum(0)])
        every.append(states[: len(part)])
        lasts.append(states[max(len(part), 1) - 1])
    return torch.cat(every)[None], torch.stack(lasts)


def _written(phi_k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """``sum_j phi_k_j v_j^T``, ``[B,H,F,V]``, of the keys that are there."""
    phi_k = phi_k.masked_fill((ids < 0)[..., None, None], 0)
    return torch.einsum("bjhf,bjhv->bhfv", phi_k, repeat_heads(v, phi_k.shape[2]))
