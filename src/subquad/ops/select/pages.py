"""Which pages of a cache a new token reads, by bounds on the scores of their keys.

Legend: B batch, H query heads, G key heads, K head dim, P pages, N lists (H, or G where the heads
of a group choose together), n pages in a list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.backend import uses_kernels

MOST = 1 << 18  # pages


def bounds(q: Tensor, low: Tensor, high: Tensor, *, share: bool = False) -> Tensor:
    """The largest score, without scale, that a key between ``low`` and ``high [B,P,G,K]`` could
    have with ``q [B,H,K]``: sum over features of max(q low, q high), ``[B,H,P]``.

    Args:
        share: add up those of the heads that share a key head, ``[B,G,P]``.
    """
    if by_kernels(q, low):
        from subquad.ops.select import triton_pages

        return triton_pages.bounds(q, low, high, share)
    grouped = q.unflatten(1, (low.shape[2], -1))
    up = torch.einsum("bgrk,bpgk->bgrp", grouped.clamp_min(0), high)
    found = up + torch.einsum("bgrk,bpgk->bgrp", grouped.clamp_max(0), low)
    return found.sum(2) if share else found.flatten(1, 2)


def by_kernels(q: Tensor, low: Tensor) -> bool:
    """Whether :func:`best` takes them: of each set of neighboring pages the best, of all sets of a
    list, lie in one multiprocessor's registers."""
    kernels = uses_kernels(q) and q.dtype != torch.float64
    return kernels and low.shape[1] <= MOST


def best(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    n: int,
    *,
    page: int,
    tokens: int,
    clock: Tensor | None = None,
    share: bool = False,
    current: bool = False,
    window: int | None = None,
) -> Tensor:
    """The ``n`` pages with the largest :func:`bounds`, by two kernels; of equals the earlier.

    They lie in the n sets of neighboring pages whose best ones are the best, so that few of the
    bounds are compared.

    Args:
        page: tokens in a page; tokens: how many there are, pages behind them are not read;
            clock: int64 ``[1]`` on the device, clock + tokens are there instead.
        current: the page of the last token is taken in any case, besides the n.
        window: only pages that hold one of so many last tokens.

    Returns:
        int32 ``[B,N,n]``, the first token of each page, rising, -1 at the end where there are
        fewer; n + 1 with ``current``, which comes last.
    """
    from subquad.ops.select import triton_pages

    return triton_pages.best(q, low, high, n, page, tokens, clock, share, current, window)
