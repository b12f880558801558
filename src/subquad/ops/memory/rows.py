"""Sequences laid on rows whose places are cut in periods at each sequence's own tokens, so that
padded, packed and continued sequences share one grid.

Legend: B rows and T tokens of the input, N sequences, W places of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """A sequence that has read n tokens starts at place n mod ``period`` of its row.

    Attributes:
        real: bool ``[N,W]``, where a token stands (a sequence's tokens stand side by side).

    Args:
        T: tokens of the input; tokens: int64 ``[N]`` read before it.
        padding: bool ``[B,T]``, True beside a row's tokens; cu_seqlens: int32 ``[N+1]``.
        period: None does not cut; begins: whether no sequence has read any.
    """

    def __init__(
        self,
        T: int,
        tokens: Tensor,
        *,
        padding: Tensor | None,
        cu_seqlens: Tensor | None,
        period: int | None,
        begins: bool,
    ) -> None:
        self.plain = padding is None and cu_seqlens is None and (begins or T == 1 or not period)
        N, device = tokens.shape[0], tokens.device
        if self.plain:
            self.first = tokens.new_zeros(N)
            self.last = self.first + T
            self.real = torch.ones(1, T, dtype=torch.bool, device=device).expand(N, -1)
            return
        self._packed = cu_seqlens is not None
        self._room = period - 1 if period and not begins else 0
        self.first = tokens % period if period and not begins else tokens.new_zeros(N)
        if cu_seqlens is not None:
            at, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
            width = int(lengths.max())
        else:
            at, lengths, width = tokens.new_zeros(N), tokens.new_full((N,), T), T
            if padding is not None:
                at, lengths = (~padding).int().argmax(1), (~padding).sum(1)
        self.last = self.first + lengths
        width += self._room
        places = torch.arange(width, device=device)
        self.real = (places >= self.first[:, None]) & (places < self.last[:, None])
        self._source = (places - self.first[:, None] + at[:, None]).clamp(0, max(T - 1, 0))
        steps = torch.arange(T, device=device)
        if cu_seqlens is not None:
            self._row = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
            self._place = steps - at[self._row] + self.first[self._row]
        else:
            self._row = torch.arange(N, device=device)[:, None]
            place = steps - at[:, None] + self.first[:, None]
            self._place = place.clamp(0, width - 1)

    def lay(self, x: Tensor) -> Tensor:
        """``x [B,T,...]`` as ``[N,W,...]``, zeros where no token stands."""
        if self.plain:
            return x
        rows = torch.arange(len(self._source), device=x.device)[:, None]
        laid = x[0][self._source] if self._packed else x[rows, self._source]
        return laid.masked_fill(~self.real.view(*self.real.shape, *[1] * (x.dim() - 2)), 0)

    def back(self, y: Tensor) -> Tensor:
        """What ``lay`` did, undone; anything at the padding."""
        if self.plain:
            return y
        taken = y[self._row, self._place]
        return taken[None] if self._packed else taken
