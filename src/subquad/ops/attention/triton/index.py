"""The lists that the kernels walk: for every row of queries, the blocks of keys it sees.

One form serves masks known beforehand (their tiles) and choices made on the device (block indices,
spans with any start, single columns), so that neither ever compiles a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from subquad.mask import Mask, Tiles
from subquad.mask.algebra import Band
from subquad.mask.data import Blocks, Chosen
from subquad.mask.tiles import FULL

# How entries that are not full are masked.
BOUND, CAUSAL, INTERVAL, BITS, BAND = range(5)
FAR = 1 << 30


@dataclass(frozen=True, eq=False)
class Lists:
    """For every row (of every plane) the entries ``lo..hi``, those before ``mid`` fully visible.

    ``lo, mid, hi`` are int32 ``[planes * rows]``; ``entry`` int32 ``[n]`` says what the row meets,
    ``pattern`` int32 ``[n]`` how it is masked (an entry of the table), where there is one.
    """

    lo: Tensor
    mid: Tensor
    hi: Tensor
    entry: Tensor
    pattern: Tensor | None = None


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
        band: for BAND, the bounds of query position less key, which are all that it needs.
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
        if self.turned is None:
            object.__setattr__(self, "turned", self._turned(self.lists, blocks))
        return self.turned

    def _turned(self, lists: Lists, blocks: int) -> Lists:
        """Sorted by block, within it the full entries first, and of those later rows first."""
        device, planes = lists.lo.device, len(lists.lo) // self.rows
        width = len(lists.entry) // len(lists.lo)
        place, base, row, bins = _turning(planes, self.rows, width, blocks, device)
        key = (base + lists.entry.view(-1, width)) * 2 + (place >= (lists.mid - lists.lo)[:, None])
        key = torch.where(place < (lists.hi - lists.lo)[:, None], key, 2 * planes * blocks)
        key, order = key.flatten().flip(0).sort(stable=True)
        ends = torch.searchsorted(key, bins, out_int32=True)
        lo, mid = ends[:-1].view(-1, 2).T.contiguous()
        return Lists(lo, mid, ends[2::2].contiguous(), row[order])


@lru_cache(maxsize=16)
def _turning(
    planes: int, rows: int, width: int, blocks: int, device: torch.device
) -> tuple[Tensor, ...]:
    """For ``[planes * rows, width]`` entries: their places, the first block of their plane, their
    rows backwards, and the ends of the blocks' halves."""
    row = torch.arange(planes * rows, dtype=torch.int32)[:, None]
    each = (row % rows).expand(-1, width).flatten().flip(0)
    ends = torch.arange(2 * planes * blocks + 1)
    found = torch.arange(width), row // rows * blocks, each, ends
    return tuple(x.to(device, torch.int32) for x in found)  # waits: any stream may read them


def of_choice(chosen: Chosen, causal: bool, S: int, offset: int, device: torch.device) -> Index:
    """The index of keys that were chosen on the device; nothing waits for it, and the backward
    pass of a mask finds that of its forward."""
    made = vars(chosen).setdefault("_indexes", {})
    key = causal, S, offset, device
    if key not in made:
        made[key] = _of_choice(chosen, causal, S, offset, device)
    return made[key]


def _of_choice(chosen: Chosen, causal: bool, S: int, offset: int, device: torch.device) -> Index:
    tables = [t.on(device) for t in chosen.tables]
    NB, NH = chosen.planes
    tables = [t.expand(NB, NH, *t.shape[-2:]).contiguous() for t in tables]
    rows, size = tables[0].shape[2], chosen.size
    unit = size if isinstance(chosen, Blocks) else 1
    main = _padded(tables[0], causal, unit, size, chosen.rows, S)
    columns = None if unit == size else _padded(tables[1], causal, 1, 1, chosen.rows, S)
    if columns is not None and columns.entry.numel() == 0:
        columns = None
    plane = torch.arange(NB * NH, dtype=torch.int32, device=device)
    return Index(
        main, plane, (NB, NH), rows, chosen.rows, size, unit, CAUSAL if causal else BOUND,
        shift=offset, columns=columns,
    )  # fmt: skip


def _padded(table: Tensor, causal: bool, unit: int, size: int, per_row: int, S: int) -> Lists:
    """Lists of one length each, ``[NB,NH,R,n]`` rising with -1 at the end."""
    R, n = table.shape[-2:]
    flat = table.view(-1, n)
    lo, last = _padding(len(flat), R, n, unit, size, per_row, table.device)
    there = flat >= 0
    # Full are the blocks that end before S and, under causality, by the first query of the row.
    full = there & (flat <= (S - size) // unit)
    full = full & (flat <= last) if causal else full
    count, fulls = (x.sum(1, dtype=torch.int32) for x in (there, full))
    return Lists(lo, lo + fulls, lo + count, flat.flatten())


@lru_cache(maxsize=16)
def _padding(
    rows: int, R: int, n: int, unit: int, size: int, per_row: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the lists begin, and the last entry whose block ends by the first query of the row."""
    row = torch.arange(rows, dtype=torch.int32)
    last = (row % R * per_row + 1 - size).div(unit, rounding_mode="floor")[:, None]
    return (row * n).to(device), last.to(device)  # waits: any stream may read them


@lru_cache(maxsize=64)
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
