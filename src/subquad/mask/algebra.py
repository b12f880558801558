"""The masks: each a statement about a query's key position ``p`` and a key ``j``.

A mask answers three questions, all vectorised over int64 tensors, and everything else follows:
``at`` (is this pair kept?), ``_bounds`` (does this rectangle keep any pair, does it keep all? where
it cannot tell it says "any, not all") and ``_signature`` (integers such that tiles with equal ones
hold equal patterns). Rectangles are ``(p0, p1, j0, j1)``, ends included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from subquad.mask import show
from subquad.mask.table import positive
from subquad.mask.tiles import Tiles, tiles

Rect = tuple[Tensor, Tensor, Tensor, Tensor]


class Mask:
    """Who may see whom. Immutable, hashable, equal by value; joined by ``&``, ``|`` and ``~``."""

    def at(self, p: Tensor, j: Tensor) -> Tensor:
        """Whether the query at key position ``p`` sees key ``j`` (int, broadcast): bool.

        Only for masks of one plane; see :meth:`plane`.
        """
        raise NotImplementedError

    def _bounds(self, rect: Rect) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _signature(self, rect: Rect) -> list[Tensor]:
        return [rect[0], rect[2]]

    def _check(self, T: int, S: int, offset: int) -> None:
        """Raise where the mask does not fit T queries at ``offset`` over S keys."""

    @property
    def planes(self) -> tuple[int, int]:
        """How many masks this is: over the batch and over the heads (1 where shared)."""
        return 1, 1

    def plane(self, b: int, h: int) -> Mask:
        """The mask of one batch row and one head, of ``planes``; a shared mask is itself."""
        return self

    def plane_in(self, planes: tuple[int, int], b: int, h: int) -> Mask:
        """The plane at ``(b, h)`` of ``planes``, which this mask's own divide."""
        batch, heads = self.planes
        if (batch, heads) == (1, 1):
            return self
        return self.plane(b if batch > 1 else 0, h * heads // planes[1])

    def clipped(self, P: int, S: int) -> Mask:
        """The mask inside positions below ``P`` and keys below ``S``."""
        return self & First(P, S)

    def key_range(self, first: int, last: int, S: int) -> tuple[int, int]:
        """Keys ``[a, b)`` outside which no query at positions first..last sees anything."""
        return 0, S

    def spec(self) -> Any:
        """The mask as nested tuples of constants, which a compiler can follow (see
        :mod:`.spec`)."""
        raise NotImplementedError

    def dense(
        self, T: int, S: int, offset: int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The whole mask: bool ``[T,S]``, or ``[B,H,T,S]`` where it differs between planes.

        Raises:
            ValueError: if the mask was made for other lengths.
        """
        offset = self.check(T, S, offset)
        p = torch.arange(T, device=device)[:, None] + offset
        j = torch.arange(S, device=device)
        B, H = self.planes
        if (B, H) == (1, 1):
            return self.at(p, j).expand(T, S)
        rows = [[self.plane(b, h).at(p, j).expand(T, S) for h in range(H)] for b in range(B)]
        return torch.stack([torch.stack(row) for row in rows])

    def tiles(self, T: int, S: int, block: int = 128, offset: int | None = None) -> Tiles:
        """The empty, full and partial tiles of ``block`` x ``block`` pairs; cached by value.

        Raises:
            ValueError: if the mask was made for other lengths, or ``block`` is not positive.
        """
        positive("block", block)
        return tiles(self, T, S, block, self.check(T, S, offset))

    def area(self, T: int, S: int, offset: int | None = None) -> int:
        """Pairs kept, summed over the planes: a head's FLOPs are ``2 (K + V)`` times this."""
        return self.tiles(T, S, 64, offset).area

    def show(self, T: int, S: int | None = None, offset: int | None = None, ax: Any = None) -> Any:
        """Draw the mask: on the matplotlib axes ``ax``, which are returned, or else as text, which
        is printed and returned. Masks that differ over batch or heads are averaged."""
        S = T if S is None else S
        self.check(T, S, offset)
        if ax is not None:
            return show.draw(self, T, S, offset, ax)
        picture = show.text(self, T, S, offset)
        print(picture)
        return picture

    def check(self, T: int, S: int, offset: int | None = None) -> int:
        """The offset, once the mask is known to fit.

        Raises:
            ValueError: if it does not.
        """
        positive("T", T, zero=True)
        positive("S", S, zero=True)
        offset = S - T if offset is None else offset
        self._check(T, S, offset)
        return offset

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if isinstance(self, Band) and isinstance(other, Band):
            return self.intersect(other)
        return And((self, other))

    def __or__(self, other: Mask) -> Mask:
        return Or((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self.part if isinstance(self, Not) else Not(self)


@dataclass(frozen=True)
class Band(Mask):
    """``lo <= p - j <= hi``; None leaves a side open."""

    lo: int | None
    hi: int | None

    def spec(self):
        return "band", self.lo, self.hi

    def intersect(self, other: Band) -> Band:
        lows = [x for x in (self.lo, other.lo) if x is not None]
        highs = [x for x in (self.hi, other.hi) if x is not None]
        return Band(max(lows, default=None), min(highs, default=None))

    def at(self, p, j):
        d = p - j
        keep = torch.ones_like(d, dtype=torch.bool)
        if self.lo is not None:
            keep &= d >= self.lo
        if self.hi is not None:
            keep &= d <= self.hi
        return keep

    def _bounds(self, rect):
        p0, p1, j0, j1 = rect
        least, most = p0 - j1, p1 - j0
        any_, all_ = torch.ones_like(least, dtype=torch.bool), least <= most
        if self.lo is not None:
            any_, all_ = any_ & (most >= self.lo), all_ & (least >= self.lo)
        if self.hi is not None:
            any_, all_ = any_ & (least <= self.hi), all_ & (most <= self.hi)
        return any_, all_

    def _signature(self, rect):
        return [rect[0] - rect[2]]

    def key_range(self, first, last, S):
        low = 0 if self.hi is None else min(max(first - self.hi, 0), S)
        high = S if self.lo is None else min(max(last - self.lo + 1, 0), S)
        return low, max(low, high)


@dataclass(frozen=True)
class First(Mask):
    """``p < queries`` and ``j < keys``; None leaves that side open."""

    queries: int | None
    keys: int | None

    def spec(self):
        return "first", self.queries, self.keys

    def at(self, p, j):
        keep = torch.ones_like(p + j, dtype=torch.bool)
        if self.queries is not None:
            keep &= p < self.queries
        if self.keys is not None:
            keep &= j < self.keys
        return keep

    def _bounds(self, rect):
        p0, p1, j0, j1 = rect
        return self.at(p0, j0), self.at(p1, j1)

    def _signature(self, rect):
        sides = ((self.queries, rect[0]), (self.keys, rect[2]))
        return [start for limit, start in sides if limit is not None]

    def key_range(self, first, last, S):
        if self.queries is not None and first >= self.queries:
            return 0, 0
        return 0, S if self.keys is None else min(self.keys, S)


@dataclass(frozen=True)
class Strided(Mask):
    """``(p - j) mod stride < width``."""

    stride: int
    width: int

    def spec(self):
        return "strided", self.stride, self.width

    def at(self, p, j):
        return (p - j) % self.stride < self.width

    def _bounds(self, rect):
        p0, p1, j0, j1 = rect
        low = (p0 - j1) % self.stride
        high = low + (p1 - p0) + (j1 - j0)  # before it wraps
        return (low < self.width) | (high >= self.stride), high < self.width

    def _signature(self, rect):
        return [(rect[0] - rect[2]) % self.stride]


@dataclass(frozen=True)
class Stairs(Mask):
    """``lo <= (p + a) // rows - (j + b) // keys <= hi``; None leaves a side open."""

    lo: int | None
    hi: int | None
    rows: int
    keys: int
    a: int
    b: int

    def spec(self):
        return "stairs", self.lo, self.hi, self.rows, self.keys, self.a, self.b

    def _steps(self, p, j):
        return (p + self.a) // self.rows, (j + self.b) // self.keys

    def at(self, p, j):
        return Band(self.lo, self.hi).at(*self._steps(p, j))

    def _bounds(self, rect):
        (p0, j0), (p1, j1) = self._steps(rect[0], rect[2]), self._steps(rect[1], rect[3])
        return Band(self.lo, self.hi)._bounds((p0, p1, j0, j1))

    def _signature(self, rect):
        p, j = self._steps(rect[0], rect[2])
        return [p - j, (rect[0] + self.a) % self.rows, (rect[2] + self.b) % self.keys]

    def key_range(self, first, last, S):
        first, last = (first + self.a) // self.rows, (last + self.a) // self.rows
        low = 0 if self.hi is None else (first - self.hi) * self.keys - self.b
        high = S if self.lo is None else (last - self.lo + 1) * self.keys - self.b
        low, high = min(max(low, 0), S), min(max(high, 0), S)
        return low, max(low, high)


@dataclass(frozen=True)
class Join(Mask):
    """What ``&`` and ``|`` share: the parts, and the planes they spread over."""

    parts: tuple[Mask, ...]

    @property
    def planes(self):
        batch, heads = zip(*(part.planes for part in self.parts))
        return max(batch), max(heads)

    def plane(self, b, h):
        if self.planes == (1, 1):
            return self
        return type(self)(tuple(part.plane_in(self.planes, b, h) for part in self.parts))

    def _check(self, T, S, offset):
        batch, heads = self.planes
        for part in self.parts:
            part._check(T, S, offset)
            if part.planes[0] not in (1, batch) or heads % part.planes[1]:
                planes = [m.planes for m in self.parts]
                raise ValueError(f"joined masks must agree on batch and heads, got {planes}")

    def _signature(self, rect):
        """Each part's columns, blotted out where the part alone already decides."""
        columns = []
        for part in self.parts:
            any_, all_ = part._bounds(rect)
            status = any_.long() + all_.long()
            columns.append(status)
            columns += [torch.where(status == 1, c, 0) for c in part._signature(rect)]
        return columns


@dataclass(frozen=True)
class And(Join):
    def spec(self):
        return "and", *[part.spec() for part in self.parts]

    def at(self, p, j):
        return reduce(torch.logical_and, (part.at(p, j) for part in self.parts))

    def _bounds(self, rect):
        any_, all_ = zip(*(part._bounds(rect) for part in self.parts))
        return reduce(torch.logical_and, any_), reduce(torch.logical_and, all_)

    def key_range(self, first, last, S):
        low, high = zip(*(part.key_range(first, last, S) for part in self.parts))
        return max(low), max(max(low), min(high))


@dataclass(frozen=True)
class Or(Join):
    def spec(self):
        return "or", *[part.spec() for part in self.parts]

    def at(self, p, j):
        return reduce(torch.logical_or, (part.at(p, j) for part in self.parts))

    def _bounds(self, rect):
        any_, all_ = zip(*(part._bounds(rect) for part in self.parts))
        return reduce(torch.logical_or, any_), reduce(torch.logical_or, all_)

    def key_range(self, first, last, S):
        ranges = [part.key_range(first, last, S) for part in self.parts]
        ranges = [r for r in ranges if r[0] < r[1]] or [(0, 0)]
        return min(r[0] for r in ranges), max(r[1] for r in ranges)


@dataclass(frozen=True)
class Not(Mask):
    part: Mask

    def spec(self):
        return "not", self.part.spec()

    @property
    def planes(self):
        return self.part.planes

    def plane(self, b, h):
        return Not(self.part.plane(b, h))

    def _check(self, T, S, offset):
        self.part._check(T, S, offset)

    def at(self, p, j):
        return ~self.part.at(p, j)

    def _bounds(self, rect):
        any_, all_ = self.part._bounds(rect)
        return ~all_, ~any_

    def _signature(self, rect):
        return self.part._signature(rect)
