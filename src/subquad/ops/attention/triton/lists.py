"""Lists of chosen blocks, made on the device in few launches: where each list ends, and the same
lists by blocks of keys.

The second is a counting sort. Bins are the blocks' halves (first the rows that see all of a block,
then the others); rows are cut into runs, later rows first, so that a bin's count in each run says
where the run's own rows go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2

MOST_RUNS = 1024  # a run of several rows is walked one row after the other


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


@partial(Kernel, sizes=("n", "rows", "R", "per_row", "S"))
def list_ends(
    ENTRY, LO, MID, HI, n, rows, R, per_row, S,
    SIZE: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of ENTRY ``[rows,n]``, each row rising with -1 at its end: where the full entries (those that
    end before S and, under causality, by the row's first query) and all of them end."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = row < rows
    end = tl.minimum(row % R * per_row + 1, S) if CAUSAL else row * 0 + S
    count = tl.zeros([BR], tl.int32)
    fulls = tl.zeros([BR], tl.int32)
    for i in range(0, n, BN):
        at = i + tl.arange(0, BN)
        there = inside[:, None] & (at < n)[None, :]
        e = tl.load(ENTRY + row.to(tl.int64)[:, None] * n + at[None, :], mask=there, other=-1)
        full = (e >= 0) & (e * UNIT + SIZE <= end[:, None])
        count += tl.sum((e >= 0).to(tl.int32), 1)
        fulls += tl.sum(full.to(tl.int32), 1)
    tl.store(LO + row, row * n, mask=inside)
    tl.store(MID + row, row * n + fulls, mask=inside)
    tl.store(HI + row, row * n + count, mask=inside)


@partial(Kernel, sizes=("R", "blocks", "runs", "each"))
def count_rows(LO, MID, HI, ENTRY, COUNT, R, blocks, runs, each, BN: tl.constexpr):
    """The rows of every bin and run, added to COUNT ``[bins,runs]``. One program for a row."""
    row = tl.program_id(0)
    lo, mid, hi = tl.load(LO + row), tl.load(MID + row), tl.load(HI + row)
    run = (R - 1 - row % R) // each
    for i in range(lo, hi, BN):
        at = i + tl.arange(0, BN)
        e = tl.load(ENTRY + at, mask=at < hi, other=0)
        own = ((row // R * blocks + e) * 2 + (at >= mid).to(tl.int32)).to(tl.int64)
        tl.atomic_add(COUNT + own * runs + run, 1, mask=at < hi, sem="relaxed")


@partial(Kernel, sizes=("bins", "runs"))
def rank_runs(COUNT, TOTAL, bins, runs, BB: tl.constexpr, BR: tl.constexpr):
    """COUNT becomes the rows of the runs before, TOTAL ``[bins]`` those of all."""
    own, run = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BR)
    there = (own < bins)[:, None] & (run < runs)[None, :]
    at = COUNT + own.to(tl.int64)[:, None] * runs + run[None, :]
    x = tl.load(at, mask=there, other=0)
    tl.store(at, tl.cumsum(x, 1) - x, mask=there)
    tl.store(TOTAL + own, tl.sum(x, 1), mask=own < bins)


@partial(Kernel, sizes=("R", "blocks", "bins", "runs", "each"))
def deal_rows(
    LO, MID, HI, ENTRY, COUNT, TOTAL, END, LO2, MID2, HI2, ROW, R, blocks, bins, runs, each,
    BN: tl.constexpr,
):  # fmt: skip
    """Each row to its places, and where the lists of blocks begin and end. One program for a run of
    a plane; END ``[bins]`` is TOTAL summed up."""
    run, plane = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for i in range((plane * runs + run) * BN, bins // 2, programs * BN):
        own = i + tl.arange(0, BN)
        there = own < bins // 2
        middle = tl.load(END + own * 2, mask=there, other=0)
        tl.store(LO2 + own, middle - tl.load(TOTAL + own * 2, mask=there, other=0), mask=there)
        tl.store(MID2 + own, middle, mask=there)
        tl.store(HI2 + own, tl.load(END + own * 2 + 1, mask=there, other=0), mask=there)
    for r in range(R - 1 - run * each, tl.maximum(R - 1 - (run + 1) * each, -1), -1):
        row = plane * R + r
        lo, mid, hi = tl.load(LO + row), tl.load(MID + row), tl.load(HI + row)
        for i in range(lo, hi, BN):
            at = i + tl.arange(0, BN)
            there = at < hi
            e = tl.load(ENTRY + at, mask=there, other=0)
            own = ((plane * blocks + e) * 2 + (at >= mid).to(tl.int32)).to(tl.int64)
            start = tl.load(END + own, mask=there) - tl.load(TOTAL + own, mask=there)
            rank = tl.load(COUNT + own * runs + run, mask=there)
            tl.store(ROW + start + rank, r, mask=there)
            tl.store(COUNT + own * runs + run, rank + 1, mask=there)
        tl.debug_barrier()  # the next row of the run reads what this one wrote


def of_table(table: Tensor, causal: bool, unit: int, size: int, per_row: int, S: int) -> Lists:
    """The lists of ``table [...,R,n]``, rising with -1 at the end."""
    R, n = table.shape[-2:]
    rows = table.shape[:-1].numel()
    lo, mid, hi = table.new_empty(3, rows)
    BN = min(128, next_power_of_2(max(n, 1)))
    BR = 1024 // BN
    with on_device(table):
        list_ends.launch(
            (cdiv(rows, BR),), (table, lo, mid, hi), n, rows, R, per_row, S,
            SIZE=size, UNIT=unit, CAUSAL=causal, BR=BR, BN=BN, num_warps=4,
        )  # fmt: skip
    return Lists(lo, mid, hi, table.flatten())


def by_blocks(lists: Lists, R: int, blocks: int) -> Lists:
    """The lists by the blocks of every plane of R rows: entries are the rows that see a block,
    those that see all of it first, of either later rows first."""
    lo, own, planes = lists.lo, (lists.lo, lists.mid, lists.hi, lists.entry), len(lists.lo) // R
    runs, bins = min(R, MOST_RUNS), 2 * planes * blocks
    each = cdiv(R, runs)
    count, total = lo.new_zeros(bins, runs), lo.new_empty(bins)
    lo2, mid2, hi2 = (lo.new_empty(planes * blocks) for _ in range(3))
    row = torch.empty_like(lists.entry)
    BR = next_power_of_2(runs)
    BB = max(1, 2048 // BR)
    with on_device(lo):
        count_rows.launch((planes * R,), (*own, count), R, blocks, runs, each, BN=64, num_warps=1)
        rank_runs.launch((cdiv(bins, BB),), (count, total), bins, runs, BB=BB, BR=BR, num_warps=4)
        end = total.cumsum(0, dtype=torch.int32)
        deal_rows.launch(
            (runs, planes), (*own, count, total, end, lo2, mid2, hi2, row),
            R, blocks, bins, runs, each, BN=64, num_warps=1,
        )  # fmt: skip
    return Lists(lo2, mid2, hi2, row)
