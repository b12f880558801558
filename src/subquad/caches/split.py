"""A layer whose heads are cached in two ways: some keep everything, some the first and last tokens.

Legend: B batch, T new tokens, S cached entries, G key/value heads, K head dim, s sinks, w window.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from subquad.caches.kv import KVLayer
from subquad.caches.ring import RingLayer


class SplitLayer(KVLayer):
    """Whole heads and streaming heads.

    Attributes:
        parts: for each kind that there is, its heads and their layer. (The layers of a :meth:`row`
            hold that row's keys in the order of the text.)
    """

    def __init__(self, streaming: Tensor, sinks: int, window: int, own: int | None = None) -> None:
        """Args:
        streaming: bool ``[G]``; sinks, window: what these heads keep, besides the newest token.
        own: the model's own window here, beyond which no head need keep anything.
        """
        self._made = streaming, sinks, window, own
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        streaming, sinks, window, own = self._made
        kinds: list[tuple[bool, KVLayer]] = [
            (False, KVLayer(own)),
            (True, RingLayer(sinks, min(window + 1, own or window + 1))),
        ]
        streams = streaming.tolist()
        parts = [(tuple(g for g, s in enumerate(streams) if s is kind), p) for kind, p in kinds]
        self.parts = [(heads, part) for heads, part in parts if heads]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in self.parts)

    def store(self, k: Tensor, v: Tensor) -> None:
        for heads, part in self.parts:
            part.starts, part.clock = self.starts, self.clock
            part.update(*(taken(x, heads).transpose(1, 2) for x in (k, v)))

    def reserve(self, n: int) -> None:
        for _, part in self.parts:
            part.reserve(n)

    def advance(self) -> None:
        self.seen += 1
        for _, part in self.parts:
            part.advance()

    def settle(self) -> None:
        """The new tokens have been attended to: streaming heads drop what they need not keep."""
        for _, part in self.parts:
            if isinstance(part, RingLayer):
                part.settle()

    def row(self, b: int) -> KVLayer:
        alone = SplitLayer(*self._made)
        alone.seen = self.seen - (self.starts[b] if self.starts else 0)
        alone.parts = [(heads, part.row(b)) for heads, part in self.parts]
        return alone

    def select(self, rows: Tensor) -> None:
        for _, part in self.parts:
            part.select(rows)
        if self.starts is not None:
            self.starts = [self.starts[b] for b in rows.tolist()]

    @property
    def _batch(self) -> int:
        return self.parts[0][1]._batch


def taken(x: Tensor, heads: tuple[int, ...], share: int = 1) -> Tensor:
    """Of ``x [B,T,H,K]`` the heads that ``share`` each of the key heads ``heads`` (rising); a view
    where these stand side by side."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return x[:, :, heads[0] * share : (heads[-1] + 1) * share]
    return x.index_select(2, _index(heads, share, x.device))


@lru_cache
def _index(heads: tuple[int, ...], share: int, device: torch.device) -> Tensor:
    """Made once: a copy to the device waits for all that was started there."""
    with torch.inference_mode(False):
        own = [head * share + i for head in heads for i in range(share)]
        return torch.tensor(own, device=device)
