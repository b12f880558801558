"""Tokens on their ranks: a sequence dealt out and put together, and what lies beyond a border.

Legend: B batch, C tokens of a rank, D channels, W ranks, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.parallel.collectives import gather, tie
from subquad.parallel.cut import Cut
from subquad.parallel.mesh import Split, place


def split(x: Tensor, *, dim: int = 1, fill: float | None = None, mesh: Any = None) -> Tensor:
    """This rank's tokens of ``x``, which every rank has whole.

    Args:
        dim: the axis of the tokens.
        fill: what lengthens the axis at its end where W does not divide it; None forbids that.

    Raises:
        ValueError: where W does not divide the axis and ``fill`` is None.
    """
    here, T = place(mesh), x.shape[dim]
    short = -T % here.size
    if short:
        if fill is None:
            raise ValueError(f"tokens must be a multiple of the {here.size} ranks, got {T}")
        more = list(x.shape)
        more[dim] = short
        x = torch.cat([x, x.new_full(more, fill)], dim)
    C = x.shape[dim] // here.size
    return x.narrow(dim, here.rank * C, C)


def join(x: Tensor, *, dim: int = 1, mesh: Any = None) -> Tensor:
    """The whole sequence on every rank, differentiable, from each one's tokens.

    Raises:
        ValueError: for tensors that differ in shape between ranks.
    """
    here = place(mesh)
    here.agree("join", x=[*x.shape, x.dtype])
    return torch.cat(tuple(gather(x, here, "join")), dim)


def shift_left(x: Tensor, fill: int, *, mesh: Any = None) -> Tensor:
    """``x [B,C]`` moved one to the left over the whole sequence, which ends with ``fill``."""
    here = place(mesh)
    here.agree("shift_left", x=[*x.shape, x.dtype])
    firsts = gather(x[:, :1], here, "shift_left")
    last = here.rank + 1 == here.size
    beyond = torch.full_like(x[:, :1], fill) if last else firsts[here.rank + 1]
    return torch.cat([x[:, 1:], beyond], 1)


class Before:
    """The last inputs before this rank's tokens, for convolutions.

    Attributes:
        past: ``[n,P,D]``, in front of each sequence on this rank; None for zeros.
        cu_seqlens: int32 ``[n+1]``, the boundaries on this rank, or None.
    """

    def __init__(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, P: int, here: Split
    ) -> None:
        C = x.shape[1]
        if C < P:
            raise ValueError(f"a rank must hold at least {P} tokens for a convolution, got {C}")
        self._cut = cut = Cut(cu_seqlens, C, here)
        self._given = past
        here.agree("a short convolution", x=x, past=past, cu_seqlens=cu_seqlens)
        self.cu_seqlens = cut.cu
        self._tails = gather(x[:, C - P :], here, "a short convolution")
        head = self._tails[here.rank - 1]
        seen = cut.low - cut.bounds[cut.mine.first]  # tokens of the sequence before this rank
        if cut.mine.continues and seen < P:
            older = head.new_zeros(1, P, head.shape[2])
            if past is not None:
                older = past[cut.mine.first : cut.mine.first + 1].to(head.dtype)
            head = torch.cat([older[:, seen:], head[:, P - seen :]], 1)
        self.past = cut.initial(past, head, head)

    def finish(self, y: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the last inputs ``[N,P,D]`` of the whole sequences."""
        here = self._cut.here
        if not self._cut.mine.continues:
            y = tie(y, self._tails)
        if not here.states:
            return y, last[:0]
        if not self._cut.packed:
            return y, self._tails[-1]
        return y, self._cut.final(last, self._given)
