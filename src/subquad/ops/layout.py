"""Shapes that every operation shares: grouped heads and packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``[B,T,G,...]`` to ``[B,T,heads,...]``; consecutive heads share one of the G."""
    if x.shape[2] == heads:
        return x
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def expand_heads(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None):
    """The recurrence's inputs, all with the largest head count; decay as ``[B,T,H(,K)]``."""
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(q.shape[0], q.shape[1], -1)
    inputs = (q, k, v, decay, beta)
    heads = max(t.shape[2] for t in inputs if t is not None)
    return tuple(None if t is None else repeat_heads(t, heads) for t in inputs)


def segments(cu_seqlens: Tensor) -> Iterator[slice]:
    """The slices of the packed sequences that ``cu_seqlens [N+1]`` bounds."""
    bounds = cu_seqlens.tolist()
    return (slice(a, b) for a, b in pairwise(bounds))
