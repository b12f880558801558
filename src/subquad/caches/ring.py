"""Sinks and a ring: the first tokens and the last ones, in memory that never grows.

Legend: B batch, T new tokens, G key/value heads, K head dim, s sinks, w window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.caches.kv import Held, KVLayer, Rows
from subquad.ops.cache import append


class RingLayer(KVLayer):
    """The first ``sinks`` and the last ``window`` tokens of each row, padding not counted.

    Token t (as its row counts) lies in slot t if it is a sink, else in slot ``s + (t - s) mod w``.
    A prompt, or a piece of one, stands behind what is held until :meth:`settle` sorts it in: its
    first tokens still see those that its last ones push out.

    Attributes:
        ring: keys and values, each ``[B, s + w + 1, G, K]``; the last slot takes what nobody keeps.
        settled: columns that the ring has taken.
    """

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window = sinks, window
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.ring: tuple[Tensor, Tensor] | None = None
        self.settled = 0
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    @property
    def nbytes(self) -> int:
        held = (self.ring or ()) + (self._new or ())
        return sum(x.untyped_storage().nbytes() for x in held)

    @property
    def keys(self) -> Tensor:
        """``[B,S,G,K]``, oldest first; only where no row is padded (see :meth:`row`)."""
        return self._inorder(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        pass

    @property
    def values(self) -> Tensor:
        return self._inorder(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        pass

    def lengths(self) -> list[int]:
        """Real tokens of each row that the ring has taken, those pushed out included."""
        assert self.ring is not None
        starts = self.starts or [0] * self.ring[0].shape[0]
        return [max(self.settled - start, 0) for start in starts]

    def counted(self, device: torch.device) -> Tensor:
        """:meth:`lengths` as int64 ``[B,1]``; the host waits for the device only where rows are
        padded."""
        if self.clock is not None:
            return (self.clock + 1).expand(self._batch, 1)
        if self.starts is None:
            return torch.full((self._batch, 1), self.settled, device=device)
        return torch.tensor(self.lengths(), device=device)[:, None]

    def token_at(self, slot: Tensor) -> Tensor:
        """Which token lies in each ``slot [n]``, as its row counts: ``[B,n]``; only for slots that
        are filled."""
        last = self.counted(slot.device) - 1
        return torch.where(slot < self.sinks, slot, last - (last - slot) % self.window)

    def _slot(self, t: Tensor) -> Tensor:
        return torch.where(t < self.sinks, t, self.sinks + (t - self.sinks) % self.window)

    def store(self, k: Tensor, v: Tensor) -> None:
        if self.ring is None:
            shape = k.shape[0], self.slots + 1
            self.ring = k.new_zeros(*shape, *k.shape[2:]), v.new_zeros(*shape, *v.shape[2:])
        self._new = k, v
        if k.shape[1] == 1:
            self.settle()

    def settle(self) -> None:
        """The new tokens have been attended to: keep the sinks and the last ones."""
        if self._new is None:
            return
        assert self.ring is not None
        k, v = self._new
        (B, T), device = k.shape[:2], k.device
        if T == 1 and self.starts is None:  # nothing to be asked of the device
            at = self.seen - 1 if self.clock is None else 0
            append(k, v, *self.ring, at, self.clock, ring=(self.sinks, self.window))
            self.settled, self._new = self.seen, None
            return
        start = torch.tensor(self.starts or [0], device=device)[:, None]
        t = torch.arange(self.seen - T, self.seen, device=device) - start
        kept = (t >= 0) & ((t < self.sinks) | (t >= self.seen - start - self.window))
        slot = torch.where(kept, self._slot(t), self.slots).expand(B, T)
        row = torch.arange(B, device=device)[:, None]
        self.ring[0][row, slot], self.ring[1][row, slot] = k, v
        self.settled, self._new = self.seen, None

    def held(self) -> Held:
        """What is filled, in no order."""
        assert self.ring is not None
        k, v = self.ring
        if self.clock is not None:
            return Held(k[:, : self.slots], v[:, : self.slots], self.clock)
        filled = min(max(self.lengths()), self.slots)
        return Held(k[:, :filled], v[:, :filled])

    def reserve(self, n: int) -> None:
        pass

    def advance(self) -> None:
        self.seen += 1
        self.settled = self.seen

    def row(self, b: int) -> KVLayer:
        alone, start = KVLayer(), (self.starts or [0] * (b + 1))[b]
        alone.seen = self.seen - start
        alone._keys, alone._values = (Rows(self._inorder(which, b)) for which in (0, 1))
        return alone

    def _inorder(self, which: int, b: int | None = None) -> Tensor:
        """What is held, oldest first, and the new tokens behind; of one row or of all."""
        assert self.ring is not None
        rows = slice(None) if b is None else slice(b, b + 1)
        tokens, start = self.lengths()[b or 0], (self.starts or [0] * len(self.lengths()))[b or 0]
        first = min(tokens, self.sinks)
        recent = torch.arange(first, tokens)[-self.window :]
        order = self._slot(torch.cat([torch.arange(first), recent]))
        held = self.ring[which][rows][:, order.to(self.ring[which].device)]
        if self._new is None:
            return held
        new = self._new[which][rows, max(start - self.settled, 0) :]
        return torch.cat([held, new], 1) if tokens else new

    def select(self, rows: Tensor) -> None:
        if self.ring is not None:
            k, v = (x.index_select(0, rows.to(x.device)) for x in self.ring)
            self.ring = k, v
        super().select(rows)

    @property
    def _batch(self) -> int:
        assert self.ring is not None
        return self.ring[0].shape[0]
