"""A mask counted from where each row's tokens start: padded rows, and states that forgot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subquad.mask.algebra import Mask, Rect
from subquad.mask.table import Table


@dataclass(frozen=True)
class Placed(Mask):
    """``part`` at ``p - queries[b]`` and ``j - keys[b]``; nothing where either is negative."""

    part: Mask
    queries: Table
    keys: Table

    def spec(self):
        return "placed", self.part.spec(), self.queries.name, self.keys.name

    @property
    def planes(self):
        batch, heads = self.part.planes
        return max(batch, len(self.queries.tensor)), heads

    def plane(self, b, h):
        part = self.part.plane_in(self.planes, b, h)
        row = slice(b, b + 1) if len(self.queries.tensor) > 1 else slice(None)
        return Placed(part, self.queries[row], self.keys[row])

    def _check(self, T, S, offset):
        batch, rows = self.part.planes[0], len(self.queries.tensor)
        if batch not in (1, rows) and rows > 1:
            raise ValueError(f"queries must place {batch} rows as the mask has, got {rows}")

    def at(self, p, j):
        p, j = p - self.queries.on(p.device), j - self.keys.on(j.device)
        return (p >= 0) & (j >= 0) & self.part.at(p.clamp_min(0), j.clamp_min(0))

    def _inner(self, rect: Rect) -> Rect:
        a, c = self.queries.on(rect[0].device), self.keys.on(rect[2].device)
        return rect[0] - a, rect[1] - a, rect[2] - c, rect[3] - c

    def _bounds(self, rect):
        p0, p1, j0, j1 = self._inner(rect)
        seen = p0.clamp_min(0), p1.clamp_min(0), j0.clamp_min(0), j1.clamp_min(0)
        any_, all_ = self.part._bounds(seen)
        return any_ & (p1 >= 0) & (j1 >= 0), all_ & (p0 >= 0) & (j0 >= 0)

    def _signature(self, rect):
        """The part's columns where nothing is cut off, else the place itself."""
        inner = self._inner(rect)
        whole = (inner[0] >= 0) & (inner[2] >= 0)
        columns = [torch.where(whole, c, 0) for c in self.part._signature(inner)]
        return columns + [torch.where(whole, -1, x) for x in (rect[0], rect[2])]
