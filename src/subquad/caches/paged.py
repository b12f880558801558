"""All keys and values, and for every page of them the bounds of its keys.

Legend: B batch, T new tokens, S cached entries, P pages, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.caches.kv import KVLayer, Rows


class PagedLayer(KVLayer):
    """Pages of ``page`` tokens, counted from each row's first real token.

    Attributes:
        low, high: ``[B,P,G,K]``, the least and the largest value of each feature among the keys of
            a page, of those that are there.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self._low, self._high = Rows(), Rows()

    @property
    def low(self) -> Tensor:
        return self._low.data

    @property
    def high(self) -> Tensor:
        return self._high.data

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._low.nbytes + self._high.nbytes

    def limits(self) -> tuple[Tensor, Tensor]:
        """``low`` and ``high``; with a clock the whole memory, with the room that is left."""
        if self.clock is None:
            return self.low, self.high
        return self._low.memory, self._high.memory

    def counted(self, device: torch.device) -> Tensor:
        """:meth:`lengths` as int64 ``[B]``."""
        if self.clock is not None:
            return (self.clock + 1).expand(self._batch)
        return torch.tensor(self.lengths(), device=device)

    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [max(self.seen - start, 0) for start in self.starts or [0] * self._batch]

    def store(self, k: Tensor, v: Tensor) -> None:
        super().store(k, v)
        if k.shape[1] == 1 and self.starts is None and self._low.length:
            return  # _append has widened them
        new = -(-max(self.lengths()) // self.page) - self._low.length
        if new > 0:
            empty = k.new_full((k.shape[0], new, *k.shape[2:]), torch.inf)
            self._low.append(empty)
            self._high.append(-empty)
        columns = torch.arange(self.seen - k.shape[1], self.seen, device=k.device)
        t = columns - torch.tensor(self.starts or [0], device=k.device)[:, None]
        page = (t.clamp_min(0) // self.page).expand(k.shape[:2])[..., None, None].expand(k.shape)
        padding = (t < 0)[..., None, None]
        for bound, none, reduce in ((self.low, torch.inf, "amin"), (self.high, -torch.inf, "amax")):
            bound.scatter_reduce_(1, page, k.masked_fill(padding, none), reduce)

    def _append(self, k: Tensor, v: Tensor, **more: Any) -> None:
        if self.starts is None:
            new = -(-self.seen // self.page) - self._low.length
            more["bounds"] = self._low.extend(new), self._high.extend(new), self.page
        super()._append(k, v, **more)

    def reserve(self, n: int) -> None:
        super().reserve(n)
        for bound in (self._low, self._high):
            bound.reserve(n // self.page + 1)

    def advance(self) -> None:
        super().advance()
        new = -(-self.seen // self.page) - self._low.length
        self._low.extend(new)
        self._high.extend(new)

    def select(self, rows: Tensor) -> None:
        self._low.select(rows)
        self._high.select(rows)
        super().select(rows)
