"""Summaries of runs of tokens, one every so many, in rows that begin with the first."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.mixers.parts.past import take


def run(x: Tensor, first: int | Tensor, n: int, step: int = 1) -> Tensor:
    """``x [N,S,...]`` at the n places ``first, first + step, ...``: ``[N,n,...]``.

    Args:
        first: one for all rows (the result is then a view), or int ``[N]``; places outside give
            whatever there is.
    """
    if isinstance(first, int):
        return x[:, first : first + (n - 1) * step + 1 : step] if n else x[:, :0]
    places = first[:, None] + torch.arange(n, device=x.device) * step
    return take(x, places.clamp(0, x.shape[1] - 1))


def extend(past: Tensor | None, new: Tensor, index: Tensor | None, length: int) -> Tensor:
    """The summaries ``past [N,M,...]`` and ``new [N,R,...]`` as ``[N,length,...]``.

    Args:
        index: int ``[N,R]``, the place of each new one, -1 to drop it; None where they follow on.
    """
    if index is None:
        return new if past is None else torch.cat([past, new], 1)
    held = 0 if past is None else past.shape[1]
    room = new.new_zeros(new.shape[0], length + 1 - held, *new.shape[2:])  # the last: a dump
    whole = room if past is None else torch.cat([past, room], 1)
    rows = torch.arange(len(new), device=new.device)[:, None]
    return whole.index_put((rows, torch.where(index < 0, length, index)), new)[:, :length]
