"""Sequences laid on a grid of whole blocks, each sequence's block 0 at its own token 0.

Legend: B rows, S columns, R rows of the grid, N blocks of a row, w tokens in a block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


class Grid:
    """Columns that tokens are moved to, so that block borders fall on multiples of w.

    Rows keep their row; packed sequences follow one another, each filled up to whole blocks.

    Args:
        tokens: S; block: w.
        starts: int ``[B]`` or ``[1]``, the column of each row's token 0; None for 0.
        cu_seqlens: the boundaries of packed sequences, or None.

    Attributes:
        blocks: N.
        cuts: packed, the blocks of each sequence; None otherwise.
    """

    def __init__(
        self, tokens: int, block: int, starts: Tensor | None, cu_seqlens: Tensor | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.tokens, self.block, self.device = tokens, block, device
        self.cuts: list[int] | None = None
        self.source: Tensor | None = None  # int64 [R or 1, N w], -1 where there is no token
        self.target: Tensor | None = None  # int64 [R or 1, S]
        if cu_seqlens is not None:
            self._pack(cu_seqlens, device)
        elif starts is not None:
            self.shift = (-starts.long()) % block
            self.blocks = -(-(tokens + block - 1) // block)
            columns = torch.arange(self.blocks * block, device=device) - self.shift[:, None]
            self.source = torch.where((columns >= 0) & (columns < tokens), columns, -1)
            self.target = torch.arange(tokens, device=device) + self.shift[:, None]
        else:
            self.blocks = -(-tokens // block)

    def _pack(self, cu_seqlens: Tensor, device: torch.device) -> None:
        bounds, w = cu_seqlens.tolist(), self.block
        self.cuts = [-(-(b - a) // w) for a, b in pairwise(bounds)]
        self.blocks = sum(self.cuts)
        firsts = [sum(self.cuts[:n]) * w - a for n, a in enumerate(bounds[:-1])]
        lengths = torch.tensor([b - a for a, b in pairwise(bounds)])
        move = torch.tensor(firsts).repeat_interleave(lengths)
        target = (torch.arange(self.tokens) + move).to(device)
        source = torch.full((self.blocks * w,), -1, device=device)
        source[target] = torch.arange(self.tokens, device=device)
        self.source, self.target = source[None], target[None]

    def lay(self, x: Tensor, fill: int = 0) -> Tensor:
        """``[B,S,...]`` to ``[B,N w,...]``, ``fill`` where there is no token."""
        if self.source is None:
            short = self.blocks * self.block - self.tokens
            return F.pad(x, (*[0, 0] * (x.dim() - 2), 0, short), value=fill) if short else x
        got = self._take(x, self.source.clamp_min(0))
        hole = (self.source < 0).view(*self.source.shape, *[1] * (x.dim() - 2))
        return got.masked_fill(hole, fill)

    def lift(self, x: Tensor) -> Tensor:
        """:meth:`lay` undone."""
        return x[:, : self.tokens] if self.target is None else self._take(x, self.target)

    @staticmethod
    def _take(x: Tensor, index: Tensor) -> Tensor:
        if len(index) == 1:
            return x.index_select(1, index[0])
        rows = torch.arange(len(index), device=x.device)[:, None]
        return (x.expand(len(index), *x.shape[1:]) if len(x) == 1 else x)[rows, index]

    def last(self) -> Tensor:
        """int64 ``[R or 1]``, the block of each row's last token (not for packed sequences)."""
        if self.target is None:
            return torch.full((1,), (self.tokens - 1) // self.block, device=self.device)
        return self.target[:, -1] // self.block
