"""Exact attention over keys chosen for each block of queries, in time that follows the choice.

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim; R rows, each a block of
queries at positions ``row * rows .. (row + 1) * rows - 1``; N heads that choose (H, or G where a
group shares its choice); n spans of ``size`` keys and c single keys a row; f = H / N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import mask as masks
from subquad.mask.data import Blocks, Spans
from subquad.mask.table import Table
from subquad.ops.attention import attention
from subquad.ops.attention.token import token
from subquad.ops.backend import uses_kernels
from subquad.policies.base import Call
from subquad.policies.parts import lines

COPIED = 1 << 22  # elements of keys copied at once


def attend(
    call: Call,
    starts: Tensor,
    size: int,
    rows: int,
    columns: Tensor | None = None,
    *,
    unit: int = 1,
) -> Tensor:
    """Attend to the chosen keys that a token may see (none after it, none outside the model's own
    window), and count the pairs.

    Args:
        call: without padding; its layer holds every key.
        starts: int ``[B,N,R,n]``, the first key of each span; -1 for none. The first row is the
            one of the first query's position.
        size: keys in a span; rows: queries in a row.
        columns: int ``[B,N,R,c]``, single keys, none of them in a span of its row; -1 for none.
        unit: keys in a step of ``starts``: ``size`` where these number blocks.

    Returns:
        ``o [B,T,H,V]``.
    """
    T, asked, window = call.q.shape[1], call.tally is not None, call.site.window
    kernels = uses_kernels(call.q) and call.q.dtype != torch.float64
    if kernels and T > 1 and window is None and not asked:
        return _kernels(call, starts, size, rows, columns, unit)
    first = starts if unit == 1 else torch.where(starts < 0, -1, starts * unit)
    if asked:
        share = call.site.heads // starts.shape[1]
        for _, _, _, keep in _pieces(call, first, size, rows, columns):
            call.count(keep.sum() * share)
    if T == 1:
        return _alone(call, first[:, :, 0], size, None if columns is None else columns[:, :, 0])
    if kernels and window is None:
        return _kernels(call, starts, size, rows, columns, unit)
    return _gathered(call, first, size, rows, columns)


def _alone(call: Call, starts: Tensor, size: int, columns: Tensor | None) -> Tensor:
    """One token, of lists ``[B,N,n]`` and ``[B,N,c]``."""
    if columns is not None:
        keys = starts[..., None] + torch.arange(size, device=starts.device)
        spans = torch.where(starts[..., None] < 0, -1, keys).flatten(2)
        starts, size = torch.cat([spans, columns], -1), 1
    k, v, clock, shift = call.layer.held()
    return token(
        call.q, k, v, clock, shift, starts=starts, size=size, scale=call.scale,
        window=call.site.window,
    )  # fmt: skip


def _kernels(
    call: Call, starts: Tensor, size: int, rows: int, columns: Tensor | None, unit: int
) -> Tensor:
    """By the block-sparse kernels, which read the lists where they are."""
    T, S = call.q.shape[1], call.layer.keys.shape[1]
    before = (S - T) // rows
    if before:
        starts = F.pad(starts, (0, 0, before, 0), value=-1)
        columns = columns if columns is None else F.pad(columns, (0, 0, before, 0), value=-1)
    lists = Table(starts, copy=False)
    if unit == size and columns is None:
        m = masks.causal() & Blocks(lists, size, rows)
    else:
        single = starts[..., :0] if columns is None else columns
        m = masks.causal() & Spans(lists, Table(single, copy=False), size, rows)
    q, k, v = call.q, call.layer.keys, call.layer.values
    wide = max(q.shape[3], v.shape[3]) * q.element_size() > 512
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wide or grad:
        return attention(q, k, v, m, scale=call.scale)
    from subquad.ops.attention.triton.op import forward

    return forward(q, k, v, m, call.scale, S - T)[0]  # what attention() would look up is known


def _pieces(
    call: Call, starts: Tensor, size: int, rows: int, columns: Tensor | None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Runs of rows: the batch row, the rows, their keys ``[N,r,L]`` and who sees these, bool
    ``[N,r,rows,L]`` (no query that only fills up its row)."""
    T, S, K = call.q.shape[1], call.layer.keys.shape[1], call.q.shape[3]
    B, N, R, n = starts.shape
    first = (S - T) // rows
    position = (first * rows + torch.arange(R * rows, device=starts.device)).view(R, rows, 1)
    width = n * size + (0 if columns is None else columns.shape[3])
    step = max(1, COPIED // (N * width * max(K, rows)))
    for b in range(B):
        for r in range(0, R, step):
            here = slice(r, r + step)
            single = None if columns is None else columns[b, :, here]
            tokens = _tokens(starts[b, :, here], size, single)
            p, j = position[here], tokens[:, :, None]
            keep = (j >= 0) & (j <= p) & (p >= S - T) & (p < S)
            if call.site.window is not None:
                keep &= j > p - call.site.window
            yield b, here, tokens, keep


def _gathered(call: Call, starts: Tensor, size: int, rows: int, columns: Tensor | None) -> Tensor:
    """By copies of the chosen keys, some rows at a time."""
    B, T, H, _ = call.q.shape
    N, R = starts.shape[1:3]
    lead = (call.layer.keys.shape[1] - T) % rows
    q = F.pad(call.q, (0, 0, 0, 0, lead, R * rows - lead - T))
    q = q.view(B, R, rows, N, H // N, -1).permute(0, 3, 1, 4, 2, 5)  # [B,N,R,f,rows,K]
    o = q.new_zeros(*q.shape[:-1], call.v.shape[3])
    for b, here, tokens, keep in _pieces(call, starts, size, rows, columns):
        k, v = (_pick(x[b], tokens) for x in (call.layer.keys, call.layer.values))
        o[b, :, here] = _softmax(q[b, :, here], k, v, keep, call.scale)[0]
    o = o.permute(0, 2, 4, 1, 3, 5).reshape(B, R * rows, H, -1)
    return o[:, lead : lead + T]


def _tokens(starts: Tensor, size: int, columns: Tensor | None) -> Tensor:
    """The chosen keys ``[N,r,L]``, -1 for none; spans that no row here has are left out."""
    spans = lines.trimmed(starts)[..., None]
    spans = torch.where(spans < 0, -1, spans + torch.arange(size, device=starts.device))
    parts = [spans.flatten(-2)]
    if columns is not None:
        parts.append(lines.trimmed(columns))
    return torch.cat(parts, -1)


def _pick(x: Tensor, tokens: Tensor) -> Tensor:
    """``x [S,G,K]`` at ``tokens [N,r,L]``: ``[N,r,L,K]``."""
    (S, G, _), N = x.shape, tokens.shape[0]
    head = (torch.arange(N, device=x.device) * G // N)[:, None, None]
    return x[tokens.clamp(0, S - 1), head]


def _softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q ``[N,r,f,rows,K]``, k ``[N,r,L,K]``, keep ``[N,r,rows,L]``: o ``[N,r,f,rows,V]`` and lse
    ``[N,r,f,rows]``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scale * torch.einsum("nrfmk,nrlk->nrfml", q.to(wide), k.to(wide))
    scores = scores.masked_fill(~keep[:, :, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # rows that only fill up the block see nothing
    o = torch.einsum("nrfml,nrlv->nrfmv", weights, v.to(wide)).to(v.dtype)
    return o, scores.logsumexp(-1)
