"""A decoded token enters a cache, in place and in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.backend import uses_kernels


def append(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    clock: Tensor | None = None,
    *,
    ring: tuple[int, int] | None = None,
    bounds: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Write one token's key and value into the memory of a cache.

    Args:
        k: ``[B,1,G,K]``; v: ``[B,1,G,V]``; keys, values: ``[B,S,G,*]``, written in place.
        at: the token's index; where ``clock`` (int64 ``[1]``, on the device) is given, clock + at.
        ring: ``(s, w)``: token t lies in slot t if t < s, else in slot ``s + (t - s) mod w``.
        bounds: ``(low, high, page)``, each ``[B,P,G,K]``: the least and the largest value of each
            feature among the keys of every ``page`` tokens, of which this one is the last.
    """
    grad = torch.is_grad_enabled() and k.requires_grad
    if uses_kernels(k) and k.dtype != torch.float64 and not grad:
        from subquad.ops.cache.triton import append as run
    else:
        run = _append
    run(k, v, keys, values, at, clock, ring, bounds)


def _append(k, v, keys, values, at, clock, ring, bounds) -> None:
    t = torch.tensor([at], device=k.device) if clock is None else clock + at
    slot = t
    if ring is not None:
        sinks, window = ring
        slot = torch.where(t < sinks, t, sinks + (t - sinks) % window)
    keys.index_copy_(1, slot, k)
    values.index_copy_(1, slot, v)
    if bounds is not None:
        *pair, page = bounds
        for bound, better in zip(pair, (torch.minimum, torch.maximum), strict=True):
            held = better(bound.index_select(1, t // page), k)
            bound.index_copy_(1, t // page, torch.where(t % page == 0, k, held))
