"""The lists that the kernels walk: for every row of queries, the blocks of keys it sees.

One form serves masks known beforehand (their tiles) and choices made on the device (block indices,
spans with any start, single columns), so that neither ever compiles a kernel of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.mask import Mask, Tiles
from subquad.mask.algebra import Band
from subquad.mask.data import Blocks, Chosen
from subquad.mask.tiles import FULL

# How entries that are not full are masked.
BOUND, CAUSAL, INTERVAL, BYTES = range(4)


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


@dataclass(frozen=True, eq=False)
class Index:
    """What a launch reads beside q, k and v.

    Attributes:
        lists: by rows of queries; entry e begins at key ``entry[e] * unit``.
        columns: single keys by rows of queries, or None.
        plane: int32, the distinct plane of each of the batch rows and heads of ``shape``.
        rows: rows in a plane, of ``per_row`` queries; query i stands in row
            ``(i + shift) // per_row``.
        size: keys in a block.
        kind: how entries that are not full are masked; ``table`` is int32 ``[P, size, 2]`` for
            INTERVAL (first key and end of each row of the tile), uint8 ``[P, size, size]`` for
            BYTES.
    """

    lists: Lists
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

    @property
    def planes(self) -> int:
        return len(self.lists.lo) // self.rows

    def by_keys(self, blocks: int) -> Lists | None:
        """The lists by blocks of keys, whose entries are the rows of queries that see them; None
        where blocks do not lie on a grid of their own size."""
        if self.unit != self.size or self.columns is not None:
            return None
        return self.turned or self._turned(blocks)

    def _turned(self, blocks: int) -> Lists:
        """Sorted by block, within it the full entries first: later rows stand first, because what
        is masked near the diagonal of a causal choice are the first rows that see a block."""
        lists, device = self.lists, self.lists.lo.device
        width = len(lists.entry) // len(lists.lo)
        place = torch.arange(width, device=device)
        entry = lists.entry.view(-1, width)
        row = torch.arange(len(lists.lo), device=device, dtype=torch.int32)[:, None]
        count = (lists.hi - lists.lo)[:, None]
        key = torch.where(place < count, row // self.rows * blocks + entry, self.planes * blocks)
        full = place < (lists.mid - lists.lo)[:, None]
        bins = self.planes * blocks + 1
        ends = torch.bincount(key.flatten(), minlength=bins).cumsum(0)
        fulls = torch.bincount(
            torch.where(full, key, self.planes * blocks).flatten(), minlength=bins
        )
        lo = torch.cat([ends.new_zeros(1), ends[:-1]])[: bins - 1]
        order = key.flatten().flip(0).sort(stable=True)[1]
        seen_by = (row % self.rows).expand(-1, width).flatten().flip(0)[order]
        return Lists(
            lo.int(), (lo + fulls[: bins - 1]).int(), ends[: bins - 1].int(), seen_by.contiguous()
        )


def of_choice(chosen: Chosen, causal: bool, S: int, offset: int, device: torch.device) -> Index:
    """The index of keys that were chosen on the device; nothing waits for it."""
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
    lo = torch.arange(len(flat), device=table.device, dtype=torch.int32) * n
    count = (flat >= 0).sum(1, dtype=torch.int32)
    # Full are the blocks that end by the first query of the row, and before S.
    end = torch.full((len(flat), 1), S, device=table.device, dtype=torch.int32)
    if causal:
        end = torch.arange(len(flat), device=table.device, dtype=torch.int32)[:, None] % R
        end = (end * per_row + 1).clamp_max(S)
    full = ((flat >= 0) & (flat * unit + size <= end)).sum(1, dtype=torch.int32)
    return Lists(lo, lo + full, lo + count, flat.flatten())


@lru_cache(maxsize=64)
def of_mask(mask: Mask, T: int, S: int, block: int, offset: int, device: torch.device) -> Index:
    """The index of a mask's tiles on the device; cached by value."""
    if isinstance(mask, Band):
        return of_band(mask, T, S, block, offset, device)
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
    """The patterns as one interval of keys a row, where all are; else byte by byte."""
    kept = tiles.patterns
    count = kept.sum(-1)
    first = kept.int().argmax(-1)
    last = tiles.block - kept.flip(-1).int().argmax(-1)
    if bool((count == torch.where(count > 0, last - first, 0)).all()):
        last = torch.where(count > 0, last, first)
        return INTERVAL, torch.stack([first, last], -1).int()
    return BYTES, kept.to(torch.uint8)


def of_band(band: Band, T: int, S: int, block: int, offset: int, device: torch.device) -> Index:
    """The index of ``lo <= p - j <= hi``, by formulas on the device.

    The tile (r, c) depends on q = r - c alone, but for a last column that S cuts: it is empty,
    partial or full by where q * block + offset lies, so each row's tiles are three runs of q.
    """
    rows, columns = triton.cdiv(T, block), triton.cdiv(S, block)
    far = (rows + columns) * block + abs(offset)
    lo = -far if band.lo is None else max(band.lo, -far)
    hi = far if band.hi is None else min(band.hi, far)
    reach = block - 1
    # p - j in a tile runs from x - reach to x + reach, x = q * block + offset.
    full = -(-(lo + reach - offset) // block), (hi - reach - offset) // block
    least = max(-(-(lo - reach - offset) // block), 1 - columns)
    some = least, max(min((hi + reach - offset) // block, rows - 1), least - 1)
    cut = S % block != 0
    x = torch.arange(some[0], some[1] + 1, device=device)[:, None] * block + offset
    place = torch.arange(block, device=device)
    table = torch.stack([x + place - hi, x + place - lo + 1], -1).clamp_(0, block)
    table = torch.cat([table, table.clamp_max(S % block)] if cut else [table]).int()
    by_query, by_key = (
        _band_lists(r, c, some, full, cut, turned, device)
        for r, c, turned in ((rows, columns, False), (columns, rows, True))
    )
    plane = torch.zeros(1, dtype=torch.int32, device=device)
    return Index(
        by_query, plane, (1, 1), rows, block, block, block, INTERVAL, table=table, turned=by_key
    )


def _band_lists(
    rows: int, columns: int, some: tuple[int, int], full: tuple[int, int], cut: bool,
    turned: bool, device: torch.device,
) -> Lists:  # fmt: skip
    """Rows meet the columns ``r - q`` (turned: ``r + q``) of ``some``; full ones come first."""
    width = min(some[1] - some[0] + 1, columns)
    ends = torch.empty(3, rows, dtype=torch.int32, device=device)
    lists = torch.empty(2, rows * width, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        band_lists[(rows,)](
            *ends, *lists, rows, columns, *some, *full, width, cut,
            TURNED=turned, BLOCK=128, num_warps=1,
        )  # fmt: skip
    return Lists(*ends, *lists)


@triton.jit(do_not_specialize=["rows", "columns", "a", "b", "c", "d", "width", "cut"])
def band_lists(
    LO, MID, HI, ENTRY, PATTERN, rows, columns, a, b, c, d, width, cut,
    TURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's tiles: q runs over ``a..b``, the full ones over ``c..d``."""
    r = tl.program_id(0)
    if TURNED:
        low, high, full_low, full_high = r + a, r + b, r + c, r + d
    else:
        low, high, full_low, full_high = r - b, r - a, r - d, r - c
    low = tl.maximum(low, 0)
    high = tl.maximum(tl.minimum(high, columns - 1), low - 1)
    # The column that S cuts is never full: by queries the last entry, by keys the whole row.
    last = high
    if cut:
        if TURNED:
            last = tl.where(r == rows - 1, -1, high)
        else:
            last = tl.minimum(high, columns - 2)
    full_low = tl.minimum(tl.maximum(full_low, low), high + 1)
    full_high = tl.maximum(tl.minimum(full_high, last), full_low - 1)
    count, full, before = high - low + 1, full_high - full_low + 1, full_low - low
    tl.store(LO + r, r * width)
    tl.store(MID + r, r * width + full)
    tl.store(HI + r, r * width + count)
    for n0 in range(0, count, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        partial = n - full
        beside = tl.where(partial < before, low + partial, full_high + 1 + partial - before)
        column = tl.where(n < full, full_low + n, beside)
        if TURNED:
            q = column - r - a
            at_cut = (r == rows - 1) & (n >= 0)
        else:
            q = r - column - a
            at_cut = column == columns - 1
        q = tl.where(at_cut & (cut != 0), q + b - a + 1, q)
        tl.store(ENTRY + r * width + n, column, mask=n < count)
        tl.store(PATTERN + r * width + n, q, mask=n < count)
