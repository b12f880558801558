"""Neighborhoods on a grid of one to three axes: window, stride, dilation and causality per axis.

Sources: Hassani et al., "Faster Neighborhood Attention", arXiv 2403.04690 (window, dilation);
Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922 (stride).

Legend, per axis: L length, w window, s stride, d dilation; a coordinate c belongs to the dilation
group ``c mod d`` as its member ``i = c // d`` of ``n = ceil((L - group) / d)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from subquad.mask.algebra import Mask
from subquad.mask.kept import kept


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood; see the module's legend."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def members(self, group: Tensor) -> Tensor:
        """How many coordinates a dilation group has."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def leader(self, i: Tensor) -> Tensor:
        """The member whose window the ``stride`` members around i share, as if the axis did not
        end: the centre one (right of centre for even strides), the last one where causal."""
        return i // self.stride * self.stride + (
            self.stride - 1 if self.causal else self.stride // 2
        )

    def keys(self, i: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """The members ``start <= j < end`` that member i of n sees, in its own group."""
        leader = torch.minimum(self.leader(i), n - 1)
        if self.causal:
            return (leader - self.window + 1).clamp_min(0), i + 1
        start = torch.minimum((leader - self.window // 2).clamp_min(0), n - self.window)
        return start, start + self.window

    def inside(self, first: Tensor, last: Tensor) -> Tensor:
        """Whether no window of the members first..last is pushed inward at an end."""
        reach = self.window - 1 if self.causal else self.window // 2
        shortest = self.length // self.dilation
        leader = self.leader(last)
        fits = leader < shortest
        if not self.causal:
            fits &= leader - reach <= shortest - self.window
        return fits & (self.leader(first) >= reach)


@dataclass(frozen=True)
class Neighborhood(Mask):
    """A key is visible where it is on all axes.

    Tokens lie in row-major order; with ``tile``, dilation group by group, in each tile by tile, and
    row-major inside a tile, every axis padded to whole tiles (padding sees and is seen by nothing),
    so that a tile of a kernel holds neighbors.
    """

    axes: tuple[Axis, ...]
    tile: tuple[int, ...] | None = None

    @cached_property
    def tokens(self) -> int:
        return prod(self._shape)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """The axes whose row-major order the tokens are in."""
        if self.tile is None:
            return tuple(axis.length for axis in self.axes)
        dilations = tuple(axis.dilation for axis in self.axes)
        longest = (-(-axis.length // axis.dilation) for axis in self.axes)
        tiles = tuple(-(-n // size) for n, size in zip(longest, self.tile))
        return (*dilations, *tiles, *self.tile)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        """How far apart in the order neighbors on each axis of ``_shape`` are."""
        return tuple(prod(self._shape[a + 1 :]) for a in range(len(self._shape)))

    def spec(self):
        return "neighborhood", tuple(astuple(axis) for axis in self.axes), self.tile

    def _check(self, T, S, offset):
        open_end = self.axes[0].causal and self.tile is None
        if not (S == T + offset == self.tokens or (open_end and max(S, T + offset) <= self.tokens)):
            grid = tuple(axis.length for axis in self.axes)
            raise ValueError(
                f"grid {grid} has {self.tokens} tokens, got {S} keys and queries up to {T + offset}"
            )

    def members(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The dilation group and the member in it of the tokens x, on each axis."""
        at = [x // far % size for far, size in zip(self._strides, self._shape)]
        if self.tile is None:
            return [(c % a.dilation, c // a.dilation) for c, a in zip(at, self.axes)]
        n = len(self.axes)
        return [(at[a], at[n + a] * self.tile[a] + at[2 * n + a]) for a in range(n)]

    def order(self) -> Tensor:
        """The row-major index of each token in this order, int64 ``[tokens]``; -1 at padding."""
        index = torch.zeros(self.tokens, dtype=torch.int64)
        real = torch.ones_like(index, dtype=torch.bool)
        for axis, (group, i) in zip(self.axes, self.members(torch.arange(self.tokens))):
            c = i * axis.dilation + group
            real &= c < axis.length
            index = index * axis.length + c
        return torch.where(real, index, -1)

    def at(self, p, j):
        keep = (p < self.tokens) & (j < self.tokens)
        for axis, (pg, pi), (jg, ji) in zip(self.axes, self.members(p), self.members(j)):
            n = axis.members(pg)
            start, end = axis.keys(pi, n)
            keep &= (ji >= start) & (ji < end)
            if axis.dilation > 1:
                keep &= pg == jg
            if self.tile is not None:
                keep &= (pi < n) & (ji < axis.members(jg))
        return keep

    def _ranges(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Least and largest coordinate of the tokens a..b on each axis of ``_shape``, and whether
        they run from the one to the other without a wrap."""
        out = []
        for far, size in zip(self._strides, self._shape):
            u, v = a // far, b // far
            run = u // size == v // size
            out.append((torch.where(run, u % size, 0), torch.where(run, v % size, size - 1), run))
        return out

    def _boxes(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The least box of the tokens a..b: first and last group and member on each axis."""
        ranges = [(low, high) for low, high, _ in self._ranges(a, b)]
        if self.tile is not None:
            n, out = len(self.axes), []
            for (g0, g1), (t0, t1), (u0, u1), size in zip(
                ranges[:n], ranges[n : 2 * n], ranges[2 * n :], self.tile
            ):
                out.append((g0, g1, t0 * size + u0, t1 * size + u1))
            return out
        boxes = []
        for axis, (low, high) in zip(self.axes, ranges):
            one = low == high
            groups = (
                torch.where(one, low % axis.dilation, 0),
                torch.where(one, low % axis.dilation, axis.dilation - 1),
            )
            boxes.append((*groups, low // axis.dilation, high // axis.dilation))
        return boxes

    def _bounds(self, rect):
        p0, p1, j0, j1 = rect
        any_ = (p0 < self.tokens) & (j0 < self.tokens)
        all_ = (p1 < self.tokens) & (j1 < self.tokens)
        for axis, p, j in zip(self.axes, self._boxes(p0, p1), self._boxes(j0, j1)):
            # A group further on has as many members or one less: windows end and begin earlier.
            most, least = axis.members(p[0]), axis.members(p[1])
            start, end = axis.keys(p[2], least)
            latest_start, latest_end = axis.keys(p[3], most)
            any_ &= (j[3] >= start) & (j[2] < latest_end) & (p[0] <= j[1]) & (j[0] <= p[1])
            all_ &= (j[2] >= latest_start) & (j[3] < end)
            all_ &= (p[0] == p[1]) & (j[0] == j[1]) & (p[0] == j[0])
            all_ &= (p[3] < least) & (j[3] < axis.members(j[1]))
        return any_, all_

    def _signature(self, rect):
        return (
            self._signature_in_rows(rect) if self.tile is None else self._signature_in_tiles(rect)
        )

    def _signature_in_rows(self, rect):
        """On an axis where nothing is clamped or wraps, only the distance matters, and the query's
        phase in stride and dilation; elsewhere the two places themselves."""
        p0, p1, j0, j1 = rect
        columns = []
        runs = [a & b for (*_, a), (*_, b) in zip(self._ranges(p0, p1), self._ranges(j0, j1))]
        boxes = zip(self.axes, runs, self._boxes(p0, p1), self._boxes(j0, j1))
        firsts = zip(self.members(p0), self.members(j0))
        for (axis, run, p, j), ((pg, pi), (jg, ji)) in zip(boxes, firsts):
            c, k = pi * axis.dilation + pg, ji * axis.dilation + jg
            free = run & axis.inside(p[2], p[3]) & (j[3] < axis.length // axis.dilation)
            free &= (p0 < self.tokens) & (j0 < self.tokens)
            phase = c % (axis.dilation * axis.stride)
            columns += [free, torch.where(free, c - k, c), torch.where(free, phase, k)]
        return columns

    def _signature_in_tiles(self, rect):
        """Inside one tile each: the places in the tiles, and each axis's pattern of the two."""
        p0, p1, j0, j1 = rect
        assert self.tile is not None
        size = prod(self.tile)
        inside = (p0 // size == p1 // size) & (j0 // size == j1 // size)
        columns = [torch.where(inside, x % size, -1 - x) for x in (p0, j0)]
        firsts = zip(self.axes, self.tile, self.members(p0), self.members(j0))
        for axis, side, (pg, pi), (jg, ji) in firsts:
            known = _patterns(axis, side)
            u, v = (i // side % known.shape[1] for i in (pi, ji))
            same = known[pg % axis.dilation, u, v]
            columns.append(torch.where(inside & (pg == jg), same, -1))
        return columns


@kept(64)
def _patterns(axis: Axis, side: int) -> Tensor:
    """Equal numbers for equal patterns of a tile of queries and one of keys on an axis, of one
    dilation group: int64 ``[groups, tiles, tiles]``."""
    longest = -(-axis.length // axis.dilation)
    tiles = -(-longest // side)
    i, lead = torch.arange(tiles * side), side * torch.arange(tiles)
    kinds: dict[tuple[int, ...], int] = {}
    numbers = []
    for group in torch.arange(axis.dilation):
        n = axis.members(group)
        start, end = (torch.where(i < n, x, 0).view(tiles, side) for x in axis.keys(i, n))
        end = end.minimum(n)
        # What a tile of keys shows of each window: its bounds, counted from the tile's start.
        bounds = [(x[:, None] - lead[:, None]).clamp(0, side) for x in (start, end)]
        empty = bounds[0] >= bounds[1]
        shown = torch.cat([x.masked_fill(empty, 0) for x in bounds], -1)
        rows = map(tuple, shown.flatten(0, 1).tolist())
        numbers.append([kinds.setdefault(row, len(kinds)) for row in rows])
    return torch.tensor(numbers).view(axis.dilation, tiles, tiles)


def axes(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """The axes of a neighborhood, each argument one value or one per axis.

    Raises:
        ValueError: unless ``2 <= window``, ``1 <= stride <= window``, ``1 <= dilation`` and
            ``window * dilation <= length`` on every axis, of which there are one to three.
    """
    grid = tuple(grid)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid must have 1 to 3 axes, got {grid}")

    def spread(name: str, value: Any) -> tuple[Any, ...]:
        row = (value,) * len(grid) if isinstance(value, (int, bool)) else tuple(value)
        if len(row) != len(grid):
            raise ValueError(f"{name} must be one value or {len(grid)}, as grid has, got {row}")
        return row

    rows = (spread("window", window), spread("stride", stride), spread("dilation", dilation))
    made = tuple(Axis(*row) for row in zip(grid, *rows, spread("causal", causal)))
    for axis in made:
        if not 2 <= axis.window <= axis.length:
            raise ValueError(f"window must lie in 2..{axis.length}, got {axis.window} in {made}")
        if not 1 <= axis.stride <= axis.window:
            raise ValueError(f"stride must lie in 1..{axis.window}, got {axis.stride}")
        if axis.dilation < 1 or axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"dilation must lie in 1..{axis.length // axis.window} for a window of "
                f"{axis.window} on an axis of {axis.length}, got {axis.dilation}"
            )
    return made
