"""Mixed attention in blocks, linear in the tokens, on any device.

The exact part looks at blocks of near keys (see :mod:`~subquad.ops.kernel_attention.exact`). For a
sliding window of w the linear part is the plain recurrence of queries over keys that come w tokens
late; for terraces it is one state a block, of the blocks before the last two.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
L keys with features, F features, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.kernel_attention import reference
from subquad.ops.kernel_attention.exact import Band, near_sums
from subquad.ops.kernel_attention.grid import Grid
from subquad.ops.kernel_attention.near import How, Places, places
from subquad.ops.layout import repeat_heads

FEW = 8  # up to this many queries (decode) are one product with what they may see
BLOCK = 64  # queries that share their near keys, at least and up to 4 times as many
NEVER = 1 << 40  # the block from which a key that is not there is seen


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, how: How
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return mix(q, k, v, phi_q, phi_k, how, _near)


Part = Callable[..., tuple[Tensor, Tensor]]


def mix(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, how: How, part: Part,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Mixed attention whose exact part, numerator and denominator, ``part`` gives.

    The recurrence of the linear part runs in ``narrow``, or in float32 (float64) where None.
    """
    T, S, near = q.shape[1], k.shape[1], how.near
    few = how.cu_seqlens is None and T <= FEW and near.reach + FEW >= S
    if few or S == 0:
        return reference.mixed_attention(q, k, v, phi_q, phi_k, how)
    dtype, out = torch.promote_types(v.dtype, torch.float32), v.dtype
    phi_q, phi_k = (x.to(narrow or dtype) for x in (phi_q, phi_k))
    at = places(T, S, how, q.device)
    past = None
    if how.state is not None:
        past = torch.cat([how.state[0].to(dtype), how.state[1].to(dtype)[..., None]], -1)
    run = _terraced if near.terraced else _sliding
    (exact, share), far, last = run(q, k, v, phi_q, phi_k, how, past, at, part)
    far = far.to(dtype)
    if how.weight is not None:
        weight = how.weight.to(dtype)[:, None]
        exact, share = exact * weight, share * weight
    total = share + far[..., -1:] + how.eps
    far = far[..., :-1] if how.gate is None else far[..., :-1] * how.gate.to(dtype)
    o = (exact + far) / torch.where(total == 0, 1.0, total)
    return o.to(out), (last[..., :-1], last[..., -1])


def near_window(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """The exact part of a sliding window and its sum, ``[B,T,H,V+1]``, alone."""
    at = places(q.shape[1], k.shape[1], how, q.device)
    return torch.cat(_window(q, k, v, how, at, _near), -1)


def _near(q: Tensor, k: Tensor, v: Tensor, band: Band, **given: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(v.dtype, torch.float32)
    extra = given.pop("extra", None)
    if extra is not None:
        extra = extra[0].to(dtype), _with_one(extra[1], dtype), extra[2]
    sums = near_sums(q.to(dtype), k.to(dtype), _with_one(v, dtype), band, extra=extra, **given)
    return sums[..., :-1], sums[..., -1:]


def _with_one(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The denominator is a value that is always one."""
    return F.pad(v.to(dtype), (0, 1), value=1.0)


def _window(
    q: Tensor, k: Tensor, v: Tensor, how: How, at: Places, part: Part
) -> tuple[Tensor, Tensor]:
    T, S, w = q.shape[1], k.shape[1], how.near.window
    block = min(max(w, BLOCK), 4 * BLOCK, max(16, T))
    band = Band(block, -(-(w - 1) // block), w)
    ids = at.ids[:, S - T :]
    return part(q, k, v, band, scale=how.scale, q_ids=ids, k_ids=at.key_ids)


def _sliding(q, k, v, phi_q, phi_k, how: How, state, at: Places, part: Part):
    """Keys w tokens late: the state that query i reads is that of token i - w."""
    from subquad.ops.recurrence import recurrence

    T, S, k_ids = q.shape[1], k.shape[1], at.key_ids
    near = _window(q, k, v, how, at, part)
    v = _with_one(v, phi_q.dtype)
    first = S - T - how.near.window  # the key that query 0 is the first to see in the state
    old = max(first, 0)
    if old:
        before = _written(phi_k[:, :old], v[:, :old], k_ids[:, :old])
        state = before if state is None else state + before
    hold, until = min(max(-first, 0), T), max(first + T, 0)
    late_k, late_v = (F.pad(x[:, old:until], (0, 0, 0, 0, hold, 0)) for x in (phi_k, v))
    late_ids = F.pad(k_ids[:, old:until], (hold, 0), value=-1)
    late_k = late_k.masked_fill((late_ids != at.ids[:, S - T :])[..., None, None], 0)
    far, last = recurrence(phi_q, late_k, late_v, scale=1.0, state=state, cu_seqlens=how.cu_seqlens)
    return near, far, last


def _terraced(q, k, v, phi_q, phi_k, how: How, state, at: Places, part: Part):
    """On a grid of blocks: block n reads the state after block n - 2."""
    T, S, H, w = q.shape[1], k.shape[1], q.shape[2], how.near.window
    grid = Grid(S, w, how.starts, how.cu_seqlens, q.device)
    q, phi_q = (F.pad(x, (0, 0, 0, 0, S - T, 0)) for x in (q, phi_q))
    phi_k = F.pad(phi_k, (0, 0, 0, 0, 0, S - phi_k.shape[1]))
    ids, k_ids = grid.lay(at.ids, fill=-2), grid.lay(at.key_ids, fill=-1)
    linear = (k_ids >= 0)[..., None]
    band, extra = Band(w, 1, 2 * w), None
    if how.chosen is not None:
        chosen = grid.lay(how.chosen) & linear
        linear = linear & ~chosen
        k, v = repeat_heads(k, H), repeat_heads(v, H)
    q, k, v, phi_q, phi_k = (grid.lay(x) for x in (q, k, v, phi_q, phi_k))
    if how.chosen is not None:
        band, extra = _extra(k, v, chosen, how)
    near = part(q, k, v, band, scale=how.scale, q_ids=ids, k_ids=k_ids, extra=extra)
    phi_q = phi_q.to(torch.promote_types(phi_q.dtype, torch.float32))
    phi_k = phi_k.to(phi_q.dtype).masked_fill(~linear[..., None], 0)
    v = repeat_heads(_with_one(v, phi_q.dtype), H)
    blocks = (x.unflatten(1, (-1, w)).transpose(2, 3) for x in (phi_q, phi_k, v))
    phi_q, phi_k, v = blocks  # [B,N,H,w,.]
    states, last = _prefix(phi_k.mT @ v, state, grid)
    far = (phi_q @ states).transpose(2, 3).flatten(1, 2)
    exact, share, far = (grid.lift(x)[:, S - T :] for x in (*near, far))
    return (exact, share), far, last


def _extra(k: Tensor, v: Tensor, chosen: Tensor, how: How):
    """The chosen keys of each block, seen from two blocks later on, behind those kept before."""
    w, per = how.near.window, min(how.per, how.near.window)
    flags, index = chosen.unflatten(1, (-1, w)).to(torch.uint8).topk(per, dim=2)  # [B,N,per,H]
    block = torch.arange(flags.shape[1], device=k.device)[:, None, None]
    births = torch.where(flags > 0, block + 2, NEVER).flatten(1, 2)
    picked = []
    for x in (k, v):
        blocks = x.unflatten(1, (-1, w))
        every = index[..., None].expand(*index.shape, x.shape[3])
        picked.append(blocks.gather(2, every).flatten(1, 2))
    if how.kept is None:
        return Band(w, 1, 2 * w, per), (*picked, births)
    before, values, live = how.kept
    values = values.to(v.dtype)
    old = torch.where(live, 0, NEVER)[..., None].expand(*live.shape, k.shape[2])
    picked = [torch.cat([a.to(b.dtype), b], 1) for a, b in zip((before, values), picked)]
    births = torch.cat([old, births], 1)
    return Band(w, 1, 2 * w, per, live.shape[1]), (*picked, births)


def _prefix(written: Tensor, state: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """What each block reads ``[B,N,H,F,V]``, and the state after each sequence's last block."""
    if grid.cuts is None:
        begin = torch.zeros_like(written[:, :1]) if state is None else state[:, None]
        states = torch.cat([begin, begin, begin + written[:, :-2].cumsum(1)], 1)
        states = states[:, : written.shape[1]]
        last = grid.last().expand(len(written))
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
    wide = torch.promote_types(v.dtype, torch.float32)
    v = repeat_heads(v, phi_k.shape[2]).to(wide)
    return torch.einsum("bjhf,bjhv->bhfv", phi_k.to(wide), v)
