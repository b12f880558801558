"""The lists that the kernels walk: for every row of queries, the blocks of keys it sees.

One form serves masks known beforehand (their tiles) and choices made on the device (block indices,
spans with any start, single columns), so that neither ever compiles a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from subquad.mask import Mask, Tiles
from subquad.mask.algebra import Band
from subquad.mask.data import Blocks, Chosen
from subquad.mask.kept import kept
from subquad.mask.tiles import FULL
from subquad.ops import kernel
from subquad.ops.attention.triton.lists import Lists, by_blocks, of_table

# How entries that are not full are masked.
BOUND, CAUSAL, INTERVAL, BITS, BAND = range(5)
FAR = 1 << 30


def arguments(lists: Lists | None) -> tuple[Tensor | None, ...]:
    """A kernel's LO, MID, HI, ENTRY and PATTERN."""
    if lists is None:
        return (None,) * 5
    return lists.lo, lists.mid, lists.hi, lists.entry, lists.pattern


@dataclass(frozen=True, eq=False)
class Index:
    """What a launch reads beside q, k and v.

    Attributes:
        lists: by rows of queries; entry e begins at key ``entry[e] * unit``. None for a band.
        columns: single keys by rows of queries, or None.
        plane: int32, the distinct plane of each of the batch rows and heads of ``shape``.
        rows: rows in a plane, of ``per_row`` queries; query i stands in row
            ``(i + shift) // per_row``.
        size: keys in a block.
        kind: how entries that are not full are masked; ``table`` is int32 ``[P, size, 2]`` for
            INTERVAL (first key and end of each row of the tile), int32 ``[P, size, size / 32]`` for
            BITS (the keys of each row, the lowest bit first).
        band: bounds of query position less key beyond which nothing is kept: all that BAND needs.
    """

    lists: Lists | None
    plane: Tensor
    shape: tuple[int, int]
    rows: int
    per_row: int
    size: int
    unit: int
    kind: int
    shift: int = 0
    columns: Lists | None = None
    table: Tensor | None = None
    turned: Lists | None = None
    band: tuple[int | None, int | None] = (None, None)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest distance of a band, far away where it is open."""
        low, high = self.band
        return -FAR if low is None else low, FAR if high is None else high

    def width(self, S: int) -> int:
        """Keys that a row's list can hold."""
        if self.lists is None:
            low, high = self.bounds
            return min(high - low + self.per_row, S)
        return len(self.lists.entry) // max(len(self.lists.lo), 1) * self.size

    def by_keys(self, blocks: int) -> Lists | None:
        """The lists by blocks of keys, whose entries are the rows of queries that see them; None
        where blocks do not lie on a grid of their own size."""
        if self.lists is None or self.unit != self.size or self.columns is not None:
            return None
        if self.turned is not None:
            return self.turned
        found = by_blocks(self.lists, self.rows, blocks)
        if kernel.writing():
            object.__setattr__(self, "turned", found)
        return found


def of_choice(chosen: Chosen, causal: bool, S: int, offset: int, device: torch.device) -> Index:
    """The index of keys that were chosen on the device; nothing waits for it, and the backward
    pass of a mask finds that of its forward."""
    made = vars(chosen).setdefault("_indexes", {})
    key = causal, S, offset, device
    if key in made:
        return made[key]
    index = _of_choice(chosen, causal, S, offset, device)
    if kernel.writing():
        made[key] = index
    return index


def _of_choice(chosen: Chosen, causal: bool, S: int, offset: int, device: torch.device) -> Index:
    tables = [t.on(device) for t in chosen.tables]
    NB, NH = chosen.planes
    tables = [t.expand(NB, NH, *t.shape[-2:]).contiguous() for t in tables]
    rows, size = tables[0].shape[2], chosen.size
    unit = size if isinstance(chosen, Blocks) else 1
    main = of_table(tables[0], causal, unit, size, chosen.rows, S)
    columns = None
    if unit != size and tables[1].numel():
        columns = of_table(tables[1], causal, 1, 1, chosen.rows, S)
    return Index(
        main, _planes(NB * NH, device), (NB, NH), rows, chosen.rows, size, unit,
        CAUSAL if causal else BOUND, shift=offset, columns=columns,
        band=(0, None) if causal else (None, None),
    )  # fmt: skip


@kept(16)
def _planes(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32).to(device)


@kept(64)
def of_mask(mask: Mask, T: int, S: int, block: int, offset: int, device: torch.device) -> Index:
    """The index of a mask's tiles on the device; cached by value."""
    if isinstance(mask, Band):
        plane = torch.zeros(1, dtype=torch.int32, device=device)
        rows = triton.cdiv(T, block)
        return Index(None, plane, (1, 1), rows, block, block, block, BAND, band=(mask.lo, mask.hi))
    tiles = mask.tiles(T, S, block, offset)
    rows = torch.arange(len(tiles.ptr) - 1).repeat_interleave(tiles.ptr.diff().long())
    plane, row = rows // max(tiles.rows, 1), rows % max(tiles.rows, 1)
    kind, table = _table(tiles)
    return Index(
        _listed(rows, tiles.column, tiles.pattern, len(tiles.ptr) - 1, device),
        tiles.plane.flatten().to(device), tiles.planes, tiles.rows, block, block, block, kind,
        table=table.to(device),
        turned=_listed(
            plane * tiles.columns + tiles.column, row.int(), tiles.pattern,
            (int(tiles.plane.max()) + 1) * tiles.columns, device,
        ),
    )  # fmt: skip


def _listed(row: Tensor, entry: Tensor, pattern: Tensor, rows: int, device: torch.device) -> Lists:
    """Entries sorted by row, the full ones first."""
    partial = pattern != FULL
    order = (row * 2 + partial).argsort(stable=True)
    ends = torch.bincount(row, minlength=rows).cumsum(0)
    lo = ends - torch.bincount(row, minlength=rows)
    mid = lo + torch.bincount(row[~partial], minlength=rows)
    parts = lo.int(), mid.int(), ends.int(), entry[order].int(), pattern[order].int()
    return Lists(*(x.contiguous().to(device) for x in parts))


def _table(tiles: Tiles) -> tuple[int, Tensor]:
    """The patterns as one interval of keys a row, where all are; else bit by bit."""
    kept = tiles.patterns
    count = kept.sum(-1)
    first = kept.int().argmax(-1)
    last = tiles.block - kept.flip(-1).int().argmax(-1)
    if bool((count == torch.where(count > 0, last - first, 0)).all()):
        last = torch.where(count > 0, last, first)
        return INTERVAL, torch.stack([first, last], -1).int()
    bit = torch.arange(32, dtype=torch.int64)
    words = (kept.view(*kept.shape[:2], -1, 32).long() << bit).sum(-1)
    return BITS, words.to(torch.int32)  # the highest bit wraps to the sign
