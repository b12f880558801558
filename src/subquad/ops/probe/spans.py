"""Which keys each query sees: a run of neighbors ``lo <= j < hi``.

Causal order, a window, packed sequences and padding on the left ask for no more.

Legend: P planes (1, or the batch B where rows differ), T queries, S keys, N packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spans(
    T: int,
    S: int,
    *,
    causal: bool,
    window: int | None,
    offset: int,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi``, int32 ``[P,T]``, neither ever falling along T; ``lo == hi`` sees nothing.

    Args:
        causal: a query sees no key behind its own place.
        window: of the keys up to its own place, the last ``window`` (None: all).
        offset: the key place of query 0.
        starts: int ``[P]``, the first key that is there in each row.
        cu_seqlens: int ``[N+1]``: T = S tokens are packed sequences, which do not see each other.
    """
    place = (torch.arange(T, device=device) + offset)[None]
    lo, hi = torch.zeros_like(place), torch.full_like(place, S)
    if causal:
        hi = (place + 1).clamp(0, S)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device, torch.int64)
        which = torch.searchsorted(bounds[1:].contiguous(), place, right=True)
        which = which.clamp_max(len(bounds) - 2)
        lo, hi = bounds[which], torch.minimum(hi, bounds[which + 1])
    if window is not None:
        lo = torch.maximum(lo, place - window + 1)
    if starts is not None:
        lo = torch.maximum(lo, starts.to(device, torch.int64)[:, None])
    lo = lo.clamp(0, S)
    hi = torch.maximum(hi, lo)
    return lo.int().contiguous(), hi.int().contiguous()


def kept(lo: Tensor, hi: Tensor, first: int, last: int) -> Tensor:
    """bool ``[P,T,last - first]``: which of the keys ``first..last`` each query sees."""
    keys = torch.arange(first, last, device=lo.device)
    return (keys >= lo[..., None]) & (keys < hi[..., None])


def queries_of(lo: Tensor, hi: Tensor, S: int, block: int) -> tuple[Tensor, Tensor]:
    """For each block of keys the run of queries that may see one of them, int32 ``[P,S/block]``."""
    edges = torch.arange(0, S, block, device=lo.device, dtype=torch.int32)
    edges = edges.expand(len(lo), -1).contiguous()
    first = torch.searchsorted(hi, edges, right=True, out_int32=True)
    last = torch.searchsorted(lo, edges + block, out_int32=True)
    return first, last
