"""Exact attention over keys chosen for each block of queries, in time that follows the choice.

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim; R rows, each a block of
queries at positions ``row * rows .. (row + 1) * rows - 1``; N heads that choose (H, or G where a
group shares its choice); n spans of ``size`` keys and c single keys a row; f = H / N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.policies.base import Call

COPIED = 1 << 22  # elements of keys copied at once


def attend(
    call: Call, starts: Tensor, size: int, rows: int, columns: Tensor | None = None
) -> Tensor:
    """Attend to the chosen keys that a token may see (none after it, none outside the model's own
    window), and count the pairs.

    Args:
        call: without padding; its layer holds every key.
        starts: int ``[B,N,R,n]``, the first key of each span; -1 for none. The first row is the
            one of the first query's position.
        size: keys in a span; rows: queries in a row.
        columns: int ``[B,N,R,c]``, single keys, none of them in a span of its row; -1 for none.

    Returns:
        ``o [B,T,H,V]``.
    """
    B, T, H, _ = call.q.shape
    S, N = call.layer.keys.shape[1], starts.shape[1]
    first = (S - T) // rows
    lead, R = S - T - first * rows, starts.shape[2]
    q = F.pad(call.q, (0, 0, 0, 0, lead, R * rows - lead - T))
    q = q.view(B, R, rows, N, H // N, -1).permute(0, 3, 1, 4, 2, 5)  # [B,N,R,f,rows,K]
    position = (first * rows + torch.arange(R * rows, device=q.device)).view(R, rows)
    o = q.new_zeros(*q.shape[:-1], call.v.shape[3])
    step = max(1, COPIED // (N * max(starts.shape[3] * size, q.shape[-1]) * q.shape[-1]))
    for b in range(B):
        keys, values = call.layer.keys[b], call.layer.values[b]
        for r in range(0, R, step):
            here = slice(r, r + step)
            single = None if columns is None else columns[b, :, here]
            tokens = _tokens(starts[b, :, here], size, single)
            p = position[here, :, None]
            keep = (tokens[:, :, None] >= 0) & (tokens[:, :, None] <= p)  # [N,r,rows,L]
            if call.site.window is not None:
                keep &= tokens[:, :, None] > p - call.site.window
            if call.tally is not None:
                real = (p >= S - T) & (p < S)
                call.count((keep & real).sum() * (H // N))
            o[b, :, here] = _softmax(
                q[b, :, here], _pick(keys, tokens), _pick(values, tokens), keep, call.scale
            )
    o = o.permute(0, 2, 4, 1, 3, 5).reshape(B, R * rows, H, -1)
    return o[:, lead : lead + T]


def _tokens(starts: Tensor, size: int, columns: Tensor | None) -> Tensor:
    """The chosen keys ``[N,r,L]``, -1 for none; spans that no row here has are left out."""
    spans = _trimmed(starts)[..., None]
    spans = torch.where(spans < 0, -1, spans + torch.arange(size, device=starts.device))
    parts = [spans.flatten(-2)]
    if columns is not None:
        parts.append(_trimmed(columns))
    return torch.cat(parts, -1)


def _trimmed(chosen: Tensor) -> Tensor:
    used = (chosen >= 0).flatten(0, -2).any(0).nonzero()
    return chosen[..., : int(used[-1]) + 1 if len(used) else 1]


def _pick(x: Tensor, tokens: Tensor) -> Tensor:
    """``x [S,G,K]`` at ``tokens [N,r,L]``: ``[N,r,L,K]``."""
    (S, G, _), N = x.shape, tokens.shape[0]
    head = (torch.arange(N, device=x.device) * G // N)[:, None, None]
    return x[tokens.clamp(0, S - 1), head]


def _softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """q ``[N,r,f,rows,K]``, k ``[N,r,L,K]``, keep ``[N,r,rows,L]``: ``[N,r,f,rows,V]``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scale * torch.einsum("nrfmk,nrlk->nrfml", q.to(wide), k.to(wide))
    scores = scores.masked_fill(~keep[:, :, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # rows that only fill up the block see nothing
    return torch.einsum("nrfml,nrlv->nrfmv", weights, v.to(wide)).to(v.dtype)
