"""How the torch form walks a mask: units of work, batched where they are alike.

A unit is one row of tiles of one batch row (R queries) with the tiles of keys it sees. Units whose
tiles bear the same patterns in the same order share one bias and run as one batch. Tiles of all
batch rows are numbered through: the unit of row r in batch row b is ``b * rows + r``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from subquad.mask import Mask
from subquad.mask.tiles import FULL, Tiles

TILE = 128
LEAST_TILE = 32
WELL_FILLED = 0.5  # smaller tiles are tried while less than this share of the pairs is kept


@dataclass(frozen=True, eq=False)
class Batch:
    """Alike units.

    Attributes:
        units: their numbers.
        columns: ``[n][c]``, the numbers of the tiles of keys.
        pattern: ``[c]``, what every unit's tiles keep: -1 everything, else an entry of the table.
    """

    units: list[int]
    columns: list[list[int]]
    pattern: tuple[int, ...]

    @cached_property
    def rows(self) -> slice | Tensor:
        """An index of the units' tiles of queries; a slice (so a view) where they follow on."""
        found = _progression(self.units)
        if found is None or found[1] < 1:
            return torch.tensor(self.units, device="cpu")
        return slice(found[0], self.units[-1] + 1, found[1])

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """The first tile of keys and the step from unit to unit, if each unit's tiles are
        contiguous and the steps are equal: the keys are then a view."""
        if any(c[-1] - c[0] != len(c) - 1 for c in self.columns):
            return None
        found = _progression([c[0] for c in self.columns])
        return None if found is None or found[1] < 0 else found

    def pieces(self, most: int) -> Iterator[Batch]:
        """The batch in pieces of at most ``most`` units."""
        for i in range(0, len(self.units), most):
            yield Batch(self.units[i : i + most], self.columns[i : i + most], self.pattern)


@dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every group of heads that share their masks over the whole batch."""

    tiles: Tiles
    heads: tuple[tuple[tuple[int, ...], list[Batch]], ...]

    def head_groups(
        self, H: int, G: int
    ) -> Iterator[tuple[slice | Tensor, slice | Tensor, list[Batch]]]:
        """For each group of heads: its query heads, their key heads, its batches.

        Key heads stay shared where the group holds all of their query heads.
        """
        if len(self.heads) == 1:
            yield slice(None), slice(None), self.heads[0][1]
            return
        wide, share = H // self.tiles.planes[1], H // G
        for planes, batches in self.heads:
            heads = [h * wide + i for h in planes for i in range(wide)]
            keys = [h // share for h in heads]
            if len(heads) == len(set(keys)) * share:
                keys = sorted(set(keys))
            yield torch.tensor(heads, device="cpu"), torch.tensor(keys, device="cpu"), batches

    def bias(
        self, pattern: tuple[int, ...], dtype: torch.dtype, repeat: int, device: torch.device
    ) -> Tensor | None:
        """0 where kept and -inf elsewhere, ``[repeat * R, C]``; None where all is kept."""
        if all(p == FULL for p in pattern):
            return None
        block = self.tiles.block
        keep = torch.ones(block, len(pattern), block, dtype=torch.bool, device="cpu")
        for c, p in enumerate(pattern):
            if p != FULL:
                keep[:, c] = self.tiles.patterns[p]
        bias = torch.zeros_like(keep, dtype=dtype).masked_fill_(~keep, -torch.inf)
        return bias.flatten(1).repeat(repeat, 1).to(device)


@lru_cache(maxsize=64)
def plan(mask: Mask, B: int, T: int, S: int, offset: int) -> Plan:
    """The walk over ``mask`` for B batch rows."""
    tiles = _choose_tiles(mask, T, S, offset)
    plane = tiles.plane.expand(B, -1).T.tolist()  # [heads][B]
    groups: dict[tuple[int, ...], list[int]] = {}
    for h, own in enumerate(plane):
        groups.setdefault(tuple(own), []).append(h)
    heads = ((tuple(of), _batches(tiles, planes)) for planes, of in groups.items())
    return Plan(tiles, tuple(heads))


def _choose_tiles(mask: Mask, T: int, S: int, offset: int) -> Tiles:
    """Large tiles make large products; small ones waste less of a thin mask."""
    block = TILE
    while block > LEAST_TILE and block // 2 >= max(T, S):
        block //= 2
    while True:
        tiles = mask.tiles(T, S, block, offset)
        computed = int((tiles.ptr[:: max(tiles.rows, 1)].diff()[tiles.plane.long()]).sum())
        filled = tiles.area / max(computed * block**2, 1)
        if block == LEAST_TILE or filled >= WELL_FILLED or block >= max(T, S):
            return tiles
        block //= 2


def _batches(tiles: Tiles, planes: tuple[int, ...]) -> list[Batch]:
    """The units of the distinct planes ``planes``, one of each batch row, by their patterns."""
    ptr, column, pattern = tiles.ptr.tolist(), tiles.column.tolist(), tiles.pattern.tolist()
    alike: dict[tuple[int, ...], Batch] = {}
    for b, plane in enumerate(planes):
        for r in range(tiles.rows):
            start, end = ptr[plane * tiles.rows + r], ptr[plane * tiles.rows + r + 1]
            if start == end:
                continue
            key = tuple(pattern[start:end])
            batch = alike.setdefault(key, Batch([], [], key))
            batch.units.append(b * tiles.rows + r)
            batch.columns.append([b * tiles.columns + c for c in column[start:end]])
    return [run for batch in alike.values() for run in _runs(batch)]


def _runs(batch: Batch) -> Iterator[Batch]:
    """The batch cut where the steps between its units or their first tiles change, so that each
    piece is a view; left whole where its units' tiles are not contiguous."""
    if any(c[-1] - c[0] != len(c) - 1 for c in batch.columns):
        yield batch
        return
    places = list(zip(batch.units, (c[0] for c in batch.columns)))
    start, step = 0, None
    for i in range(1, len(places) + 1):
        if i < len(places):
            now = (places[i][0] - places[i - 1][0], places[i][1] - places[i - 1][1])
            if step in (None, now):
                step = now
                continue
        yield Batch(batch.units[start:i], batch.columns[start:i], batch.pattern)
        start, step = i, None


def _progression(numbers: list[int]) -> tuple[int, int] | None:
    """``(first, step)`` where the numbers follow each other by one step, else None."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if any(b - a != step for a, b in pairwise(numbers)):
        return None
    return numbers[0], step
