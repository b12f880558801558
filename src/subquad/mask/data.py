"""The masks that hold data: documents, packed sequences, chosen blocks, one mask a head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from subquad.mask.algebra import And, Band, Mask, Rect
from subquad.mask.kept import kept
from subquad.mask.table import Table, readable


@dataclass(frozen=True)
class Documents(Mask):
    """Equal ids, both >= 0."""

    ids: Table

    def spec(self):
        return "documents", self.ids.name

    @property
    def planes(self):
        return (self.ids.shape[0] if len(self.ids.shape) == 2 else 1), 1

    def plane(self, b, h):
        return Documents(self.ids[b]) if len(self.ids.shape) == 2 else self

    def _check(self, T, S, offset):
        need = max(S, T + offset)
        if self.ids.shape[-1] != need:
            raise ValueError(f"ids of documents must have length {need}, got {self.ids.shape[-1]}")

    def at(self, p, j):
        ids = self.ids.on(p.device)
        last = len(ids) - 1
        a = ids[p.clamp(0, last)]
        return (a == ids[j.clamp(0, last)]) & (a >= 0) & (p >= 0)

    def _bounds(self, rect):
        p0, p1, j0, j1 = rect
        low_p, high_p = self._extremes(p0, p1)
        low_j, high_j = self._extremes(j0, j1)
        any_ = (low_p <= high_j) & (low_j <= high_p) & (high_p >= 0) & (high_j >= 0)
        one = (low_p == high_p) & (low_j == high_j) & (low_p == low_j) & (low_p >= 0)
        return any_, one & (p0 >= 0)

    def _extremes(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest id in ``a..b``, from tables over powers of two."""
        low, high = _range_tables(self.ids)
        last = low.shape[1] - 1
        a, b = a.clamp(0, last), b.clamp(0, last)
        level = (b - a + 1).log2().long()
        c = b - 2**level + 1
        return (
            torch.minimum(low[level, a], low[level, c]),
            torch.maximum(high[level, a], high[level, c]),
        )


@dataclass(frozen=True)
class Packed(Mask):
    """``part`` inside each of the sequences that ``bounds`` delimits, nothing between them."""

    part: Mask
    bounds: tuple[int, ...]

    def spec(self):
        return "packed", self.part.spec(), self.bounds

    @property
    def planes(self):
        return self.part.planes

    def plane(self, b, h):
        return Packed(self.part.plane(b, h), self.bounds)

    def _check(self, T, S, offset):
        # Queries may be a run of them: those that a device of several has.
        if self.bounds[-1] != S or not 0 <= offset <= S - T:
            raise ValueError(
                f"packed sequences end at {self.bounds[-1]}, got T={T}, S={S}, offset={offset}"
            )
        for a, b in zip(self.bounds[:-1], self.bounds[1:]):
            self.part._check(b - a, b - a, 0)

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor(self.bounds, device=x.device)
        which = torch.searchsorted(bounds[1:], x.contiguous(), right=True)
        return which, bounds[which]

    def at(self, p, j):
        (p_seq, p_start), (j_seq, j_start) = self._place(p), self._place(j)
        return (p_seq == j_seq) & self.part.at(p - p_start, j - j_start)

    def _inside(self, rect: Rect) -> tuple[Tensor, Tensor, Rect]:
        """Do the two sides meet, is all one sequence, and the rectangle counted from its start."""
        (a, start), (b, _), (c, _), (d, _) = (self._place(x) for x in rect)
        p0, p1, j0, j1 = rect
        meet, one = (a <= d) & (c <= b), (a == b) & (c == d) & (a == c)
        return meet, one, (p0 - start, p1 - start, j0 - start, j1 - start)

    def _bounds(self, rect):
        meet, one, inner = self._inside(rect)
        any_, all_ = self.part._bounds(inner)
        return meet & (any_ | ~one), one & all_

    def _signature(self, rect):
        _, one, inner = self._inside(rect)
        columns = self.part._signature(inner)
        where = [torch.where(one, -1, x) for x in (rect[0], rect[2])]
        return where + [torch.where(one, c, 0) for c in columns]


class Chosen(Mask):
    """Keys listed for every row of queries: ``rows`` of them share a list, of ``size`` keys an
    entry."""

    rows: int
    size: int

    @property
    def tables(self) -> tuple[Table, ...]:
        """The lists, int ``[..., R, n]``: rising, -1 at the end of the shorter ones."""
        raise NotImplementedError

    @property
    def cell(self) -> int:
        """Keys that are always kept together."""
        raise NotImplementedError

    def _map(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """bool ``[R, cells]``, what each row keeps, and its sums from the corner."""
        raise NotImplementedError

    @property
    def planes(self):
        leads = [(1, 1, *table.shape[:-2]) for table in self.tables]
        return max(lead[-2] for lead in leads), max(lead[-1] for lead in leads)

    def _check(self, T, S, offset):
        need = -(-(T + offset) // self.rows)
        last = -(-S // self.cell) - 1
        for table in self.tables:
            if table.shape[-2] < need:
                raise ValueError(
                    f"index must have {need} rows of {self.rows} queries to reach position "
                    f"{T + offset - 1}, got {table.shape[-2]}"
                )
            if readable(table.tensor) and int(table.tensor.max()) > last:
                raise ValueError(
                    f"index must lie in -1..{last} for S={S}, got {int(table.tensor.max())}"
                )

    def at(self, p, j):
        kept, _ = self._map(p.device)
        r, c = p // self.rows, j // self.cell
        inside = (r >= 0) & (r < kept.shape[0]) & (c < kept.shape[1])
        return inside & kept[r.clamp(0, kept.shape[0] - 1), c.clamp(0, kept.shape[1] - 1)]

    def _bounds(self, rect):
        _, sums = self._map(rect[0].device)
        R, C = sums.shape
        p0, p1, j0, j1 = rect
        r0, r1 = p0.clamp_min(0) // self.rows, p1.clamp_min(-1) // self.rows + 1
        c0, c1 = j0 // self.cell, j1 // self.cell + 1
        cells = (r1 - r0) * (c1 - c0)
        r0, r1, c0, c1 = (x.clamp(0, n - 1) for x, n in ((r0, R), (r1, R), (c0, C), (c1, C)))
        found = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        return found > 0, (found == cells) & (p0 >= 0)


@dataclass(frozen=True)
class Blocks(Chosen):
    """The row ``p // rows`` keeps the key blocks ``index[..., p // rows, :]``."""

    index: Table
    size: int
    rows: int

    def spec(self):
        return "blocks", self.index.name, self.size, self.rows

    @property
    def tables(self):
        return (self.index,)

    @property
    def cell(self):
        return self.size

    def plane(self, b, h):
        return Blocks(_plane_of(self.index, b, h), self.size, self.rows)

    def _map(self, device):
        return _cells((self.index,), (1,), device)


@dataclass(frozen=True)
class Spans(Chosen):
    """The row ``p // rows`` keeps ``size`` keys from each of ``starts`` on, and ``columns``."""

    starts: Table
    columns: Table
    size: int
    rows: int

    def spec(self):
        return "spans", self.starts.name, self.columns.name, self.size, self.rows

    @property
    def tables(self):
        return self.starts, self.columns

    @property
    def cell(self):
        return 1

    def plane(self, b, h):
        starts, columns = (_plane_of(t, b, h) for t in self.tables)
        return Spans(starts, columns, self.size, self.rows)

    def _map(self, device):
        return _cells(self.tables, (self.size, 1), device)


@dataclass(frozen=True)
class PerHead(Mask):
    """One mask for each query head."""

    parts: tuple[Mask, ...]

    def spec(self):
        return "per_head", *[part.spec() for part in self.parts]

    @property
    def planes(self):
        return max(part.planes[0] for part in self.parts), len(self.parts)

    def plane(self, b, h):
        return self.parts[h].plane_in(self.planes, b, 0)

    def _check(self, T, S, offset):
        for part in set(self.parts):
            part._check(T, S, offset)


@kept(16)
def _range_tables(ids: Table) -> tuple[Tensor, Tensor]:
    """Least and largest id of every run of ``2**level`` ids from each start: ``[levels, N]``."""
    low = high = ids.tensor.cpu()
    lows, highs, step = [low], [high], 1
    while 2 * step <= len(low):
        later = torch.arange(len(low)).add_(step).clamp_(max=len(low) - 1)
        low, high = torch.minimum(low, low[later]), torch.maximum(high, high[later])
        lows.append(low)
        highs.append(high)
        step *= 2
    return torch.stack(lows), torch.stack(highs)


def _plane_of(table: Table, b: int, h: int) -> Table:
    lead = (1, 1, *table.shape[:-2])[-2:]
    where = (b % lead[0], h % lead[1])[4 - len(table.shape) :]
    return table[where] if where else table


@lru_cache(maxsize=16)
def _cells(
    tables: tuple[Table, ...], widths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which cells the rows keep, ``widths`` of them from each entry on, and the sums of that from
    the corner: bool ``[R, C]`` and int32 ``[R + 1, C + 1]``."""
    R = tables[0].shape[0]
    last = max(int(t.tensor.max()) if t.tensor.numel() else -1 for t in tables)
    C = max(last, 0) + max(widths)
    kept = torch.zeros(R, C + 1, dtype=torch.bool, device=device)
    for table, width in zip(tables, widths, strict=True):
        entry = table.on(device).long()[:, :, None]
        cells = torch.where(entry < 0, C, entry + torch.arange(width, device=device))
        kept.scatter_(1, cells.flatten(1), True)
    kept = kept[:, :C]
    sums = torch.zeros(R + 1, C + 1, dtype=torch.int32, device=device)
    sums[1:, 1:] = kept.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    return kept, sums


def choice(mask: Mask | None) -> tuple[Chosen, bool] | None:
    """The lists of keys and whether causality cuts them, if that is all that the mask says."""
    if isinstance(mask, (Blocks, Spans)):
        return mask, False
    if isinstance(mask, And) and len(mask.parts) == 2:
        for chosen, rest in (mask.parts, mask.parts[::-1]):
            if isinstance(chosen, (Blocks, Spans)) and rest == Band(0, None):
                return chosen, True
    return None
