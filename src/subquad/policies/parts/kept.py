"""Attention over what an evicting cache kept, for one token or for a further piece of text.

Legend: B batch, T new tokens, S held entries, H query heads, N heads of the cache, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad import mask
from subquad.caches.evicting import EvictingLayer
from subquad.caches.headwise import HeadwiseLayer
from subquad.ops.attention import attention, merge
from subquad.ops.attention.token import token
from subquad.policies.base import Call
from subquad.policies.parts.ragged import ragged

CHUNK = 128  # queries at once, where the model has a window


def attend(call: Call) -> Tensor:
    """``o [B,T,H,V]`` over what the layer holds; a model's own window still holds."""
    layer = call.layer
    if not layer.compressed:
        return call.dense()
    return call.unpadded(_ragged if isinstance(layer, HeadwiseLayer) else _even)


def _bites(call: Call) -> bool:
    """Whether some held token may lie outside the model's own window."""
    return call.site.window is not None and call.layer.seen > call.site.window


def _even(call: Call) -> Tensor:
    layer = call.layer
    assert isinstance(layer, EvictingLayer)
    (B, T, H, _), S = call.q.shape, layer.keys.shape[1]
    if layer.clock is not None:
        return token(call.q, *layer.held(), scale=call.scale)
    if not _bites(call):
        call.count(B * H * (T * S - T * (T - 1) // 2))
        return attention(call.q, layer.keys, layer.values, mask.causal(), scale=call.scale)
    held = zip(layer.keys, layer.values, layer.places)
    rows = [_placed(call, q, k, v, places.T) for q, (k, v, places) in zip(call.q, held)]
    return torch.stack(rows)


def _ragged(call: Call) -> Tensor:
    layer = call.layer
    assert isinstance(layer, HeadwiseLayer)
    (B, T, H, _), N = call.q.shape, layer.heads
    if not _bites(call):
        t, lists = layer.keys.shape[1], layer.lists
        call.count(B * H * (T * t - T * (T - 1) // 2) + len(lists.places) * (H // N) * T)
        parts = [
            ragged(call.q, lists.k, lists.v, lists.ptr, scale=call.scale),
            attention(
                call.q, layer.keys, layer.values, mask.causal(), scale=call.scale, return_lse=True
            ),
        ]
        return merge(parts)[0]
    o = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    for b in range(B):
        for n in range(N):
            k, v, places = layer.head(b, n)
            heads = slice(n * H // N, (n + 1) * H // N)
            own = call.q[b, :, heads]
            o[b, :, heads] = _placed(call, own, k[:, None], v[:, None], places[None])
    return o


def _placed(call: Call, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """One row where the model's window may hide what is held: q ``[T,H,K]``, k ``[S,N,K]``,
    places ``[N,S]``, o ``[T,H,V]``."""
    assert call.site.window is not None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, N = q.shape[0], k.shape[1]
    grouped = q.to(wide).unflatten(1, (N, -1))
    outs = []
    for i in range(0, T, CHUNK):
        p = torch.arange(call.layer.seen - T, call.layer.seen, device=q.device)[i : i + CHUNK, None]
        seen = (places[:, None] <= p) & (places[:, None] > p - call.site.window)  # [N,T,S]
        scores = call.scale * torch.einsum("tnrk,snk->nrts", grouped[i : i + CHUNK], k.to(wide))
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        call.count(seen.sum() * grouped.shape[2])
        outs.append(torch.einsum("nrts,snv->tnrv", weights, v.to(wide)).flatten(1, 2))
    return torch.cat(outs).to(v.dtype)
