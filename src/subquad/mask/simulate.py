"""How many tiles a kernel visits for a neighborhood, and so how much faster than dense it can be.

Source: the simulator described by Hassani et al., "Generalized Neighborhood Attention",
arXiv 2504.16922, counted here from the windows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from subquad.mask.grid import Axis, Neighborhood
from subquad.mask.table import positive

MODES = ("static", "dynamic", "flat")


@dataclass(frozen=True)
class Simulation:
    """Tiles of keys that tiles of queries visit.

    Attributes:
        mean: visits of a tile of queries; most: of the busiest one.
        dense: tiles of keys in all.
        flop_bound: dense attention's pairs over the neighborhood's, ends not counted.
        wasted: the share of the visited pairs that the mask drops.
    """

    mean: float
    most: int
    dense: int
    flop_bound: float
    wasted: float

    @property
    def bound(self) -> float:
        """The most that the total work can fall against dense attention."""
        return self.dense / self.mean

    @property
    def slowest_bound(self) -> float:
        """The same for the busiest tile of queries."""
        return self.dense / self.most

    @property
    def perfect(self) -> bool:
        """Whether every visited tile is full, so that no pair needs a mask."""
        return self.wasted == 0


def simulate(
    axes: Sequence[Axis],
    query_tile: Sequence[int],
    key_tile: Sequence[int] | None = None,
    mode: str = "static",
) -> Simulation:
    """Count the tiles that attention over a neighborhood visits.

    Args:
        axes: as :func:`subquad.mask.grid.axes` makes them.
        query_tile, key_tile: a tile's size on each axis; ``key_tile`` as ``query_tile`` where None.
        mode: "static" cuts the axes at multiples of the tile (after sorting by dilation group),
            "dynamic" cuts the keys of each tile of queries from their own start, "flat" cuts the
            row-major sequence into runs of as many tokens as a tile has.

    Raises:
        ValueError: for tiles that do not fit the axes, or an unknown mode.
    """
    key_tile = query_tile if key_tile is None else key_tile
    for name, tile in (("query_tile", query_tile), ("key_tile", key_tile)):
        if len(tile) != len(axes):
            raise ValueError(f"{name} must have {len(axes)} sizes, got {tuple(tile)}")
        for size in tile:
            positive(name, size)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if mode == "flat":
        visits = _flat(axes, prod(query_tile), prod(key_tile))
        dense = -(-prod(a.length for a in axes) // prod(key_tile))
    else:
        per_axis = [_visits(*of, mode) for of in zip(axes, query_tile, key_tile)]
        visits = per_axis[0]
        for more in per_axis[1:]:
            visits = (visits[:, None] * more).flatten()
        dense = prod(-(-a.length // size) for a, size in zip(axes, key_tile))
    total = int(visits.sum())
    return Simulation(
        mean=total / len(visits),
        most=int(visits.max()),
        dense=dense,
        flop_bound=prod(a.length / a.window for a in axes),
        wasted=1 - prod(_pairs(a) for a in axes) / (total * prod(query_tile) * prod(key_tile)),
    )


def _windows(axis: Axis):
    """For each dilation group, the start and the end of its members' windows."""
    for group in torch.arange(axis.dilation):
        n = axis.members(group)
        yield axis.keys(torch.arange(int(n)), n)


def _pairs(axis: Axis) -> int:
    return sum(int((end - start).sum()) for start, end in _windows(axis))


def _visits(axis: Axis, queries: int, keys: int, mode: str) -> torch.Tensor:
    """Tiles of keys on one axis for each tile of queries. Windows of neighbors overlap or touch
    (stride <= window), so a tile of queries sees one run of keys."""
    counts = []
    for start, end in _windows(axis):
        low = torch.stack([part.min() for part in start.split(queries)])
        high = torch.stack([part.max() for part in end.split(queries)])
        if mode == "static":
            counts.append((high - 1) // keys - low // keys + 1)
        else:
            counts.append((high - low + keys - 1) // keys)
    return torch.cat(counts)


def _flat(axes: Sequence[Axis], queries: int, keys: int) -> torch.Tensor:
    """Tiles of keys for each run of queries of the row-major sequence.

    Runs are cut where the last axis ends; two pieces meet where their places on the other axes see
    each other and any two of their coordinates on the last axis do.
    """
    run_q, lead_q, a, b = _pieces(axes, queries)
    run_k, lead_k, c, d = _pieces(axes, keys)
    sums = _dense(axes[-1]).int().cumsum(0).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0, 1, 0))
    count = -(-prod(axis.length for axis in axes) // keys)
    visits = torch.zeros(int(run_q[-1]) + 1, count, dtype=torch.bool)
    for i in torch.arange(len(run_q)).split(256):
        high, low = b[i, None] + 1, a[i, None]
        meet = sums[high, d + 1] - sums[low, d + 1] - sums[high, c] + sums[low, c] > 0
        for axis, p, j in zip(axes, lead_q, lead_k):
            meet &= _dense(axis)[p[i, None], j]
        row, column = meet.nonzero(as_tuple=True)
        visits[run_q[i][row], run_k[column]] = True
    return visits.sum(1)


def _dense(axis: Axis) -> torch.Tensor:
    return Neighborhood((axis,)).dense(axis.length, axis.length)


def _pieces(axes: Sequence[Axis], size: int):
    """Runs of ``size`` tokens cut at the ends of the last axis: each piece's run, its coordinates
    on the other axes, and its first and last one on the last."""
    tokens, last = prod(axis.length for axis in axes), axes[-1].length
    start = torch.cat([torch.arange(0, tokens, size), torch.arange(0, tokens, last)]).unique()
    end = torch.cat([start[1:], torch.tensor([tokens])])
    lead, row = [], start // last
    for axis in reversed(axes[:-1]):
        lead.append(row % axis.length)
        row = row // axis.length
    return start // size, lead[::-1], start % last, (end - 1) % last
