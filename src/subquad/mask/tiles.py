"""Which tiles of T x S pairs are empty, full or partial, found without a dense T x S tensor.

A quadtree goes down from coarse squares and splits only those of which the mask cannot tell that
they are empty or full, so the work follows the length of the mask's edges. The tiles that remain
are evaluated pair by pair, once for every distinct signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.mask.kept import kept

if TYPE_CHECKING:
    from subquad.mask.algebra import Mask

COARSE = 16  # the quadtree starts with a grid of at most this many squares a side
CHUNK = 1 << 22  # pairs evaluated at once
FULL = -1


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a mask that keep any pair, by rows of tiles.

    Row ``r`` of tiles of the distinct plane ``d`` owns the entries ``ptr[d * rows + r]`` up to
    ``ptr[d * rows + r + 1]`` of ``column`` and ``pattern``, its columns rising.

    Attributes:
        T, S, block, offset: what was asked.
        planes: how many masks these are, over the batch and over the heads.
        plane: int32 ``[planes]``, the distinct plane that each one is.
        ptr: int32 ``[D * rows + 1]``.
        column: int32 ``[n]``, the tile's column.
        pattern: int32 ``[n]``, -1 for a full tile, else its entry in ``bits``.
        bits: int32 ``[P, block, ceil(block / 32)]``, the distinct partial tiles: pair (i, j) is bit
            ``j % 32`` of word ``j // 32`` of row i. Pairs beyond T and S are not kept.
    """

    T: int
    S: int
    block: int
    offset: int
    planes: tuple[int, int]
    plane: Tensor
    ptr: Tensor
    column: Tensor
    pattern: Tensor
    bits: Tensor = field(repr=False)

    @property
    def rows(self) -> int:
        return -(-self.T // self.block)

    @property
    def columns(self) -> int:
        return -(-self.S // self.block)

    @cached_property
    def patterns(self) -> Tensor:
        """bool ``[P, block, block]``: ``bits`` unpacked."""
        bit = torch.arange(32, dtype=torch.int32, device="cpu")
        return ((self.bits[..., None] >> bit) & 1).flatten(2)[..., : self.block].bool()

    @cached_property
    def area(self) -> int:
        """Pairs kept, summed over the planes."""
        if not self.rows:
            return 0
        partial = self.patterns.flatten(1).sum(1)
        kept = torch.cat([partial, partial.new_tensor([self.block**2])])
        per_entry = torch.cat([kept.new_zeros(1), kept[self.pattern].cumsum(0)])
        ends = per_entry[self.ptr[:: self.rows].long()]
        return int(ends.diff()[self.plane.long()].sum())

    def row(self, r: int, plane: int = 0) -> tuple[Tensor, Tensor]:
        """``(column, pattern)`` of the row ``r`` of tiles of the distinct plane ``plane``."""
        a, b = self.ptr[plane * self.rows + r : plane * self.rows + r + 2].tolist()
        return self.column[a:b], self.pattern[a:b]


@kept(64)
def tiles(mask: Mask, T: int, S: int, block: int, offset: int) -> Tiles:
    B, H = mask.planes
    parts: dict[Mask, int] = {}
    plane = []
    for b in range(B):
        for h in range(H):
            part = mask.plane_in((B, H), b, h)
            plane.append(parts.setdefault(part, len(parts)))
    rows = -(-T // block)
    found = [_single(part, T, S, block, offset) for part in parts]
    counts = [torch.bincount(row, minlength=rows) for row, *_ in found]
    ptr = torch.zeros(len(found) * rows + 1, dtype=torch.int32)
    torch.cumsum(torch.cat(counts), 0, out=ptr[1:])
    # Each plane numbers its own patterns: count on from the planes before it, then join equals.
    bits, patterns, seen = [], [], 0
    for _, _, pattern, own in found:
        patterns.append(torch.where(pattern == FULL, FULL, pattern + seen))
        bits.append(own)
        seen += len(own)
    table, pattern = torch.cat(bits), torch.cat(patterns)
    if len(found) > 1 and seen:
        table, place = table.unique(dim=0, return_inverse=True)
        pattern = torch.where(pattern == FULL, FULL, place[pattern.clamp_min(0)])
    return Tiles(
        T, S, block, offset, (B, H),
        plane=torch.tensor(plane, dtype=torch.int32).view(B, H),
        ptr=ptr,
        column=torch.cat([column for _, column, *_ in found]).int(),
        pattern=pattern.int(),
        bits=table,
    )  # fmt: skip


def _single(
    mask: Mask, T: int, S: int, block: int, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One plane's tiles, sorted: row, column, pattern of each, and the table of bits."""
    clipped = mask.clipped(T + offset, S)
    rows, columns = -(-T // block), -(-S // block)
    full, partial = _descend(clipped, rows, columns, block, offset)
    pattern, bits = _evaluate(clipped, partial, block, offset)
    keep = pattern != _EMPTY
    row, column = torch.cat([full, partial[:, keep]], 1)
    pattern = torch.cat([torch.full_like(full[0], FULL), pattern[keep]])
    order = (row * columns + column).argsort()
    return row[order], column[order], pattern[order], bits


def _descend(mask: Mask, rows: int, columns: int, block: int, offset: int) -> tuple[Tensor, Tensor]:
    """The full tiles and the undecided ones: ``[2, n]`` rows and columns of tiles."""
    side = 1
    while side * COARSE < max(rows, columns):
        side *= 2
    squares = torch.cartesian_prod(
        torch.arange(-(-rows // side)), torch.arange(-(-columns // side))
    ).T
    full = []
    while True:
        r, c = squares * side
        squares = squares[:, (r < rows) & (c < columns)]
        any_, all_ = mask._bounds(_rectangles(squares, side * block, offset))
        full.append(_split(squares[:, all_], side))
        squares = squares[:, any_ & ~all_]
        if side == 1:
            return torch.cat(full, 1), squares
        squares, side = _split(squares, 2), side // 2


def _split(squares: Tensor, n: int) -> Tensor:
    """Every square cut in n x n."""
    inner = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    return (squares[:, :, None] * n + inner[:, None]).flatten(1)


def _rectangles(squares: Tensor, size: int, offset: int):
    p0, j0 = squares[0] * size + offset, squares[1] * size
    return p0, p0 + size - 1, j0, j0 + size - 1


_EMPTY = -2


def _evaluate(mask: Mask, squares: Tensor, block: int, offset: int) -> tuple[Tensor, Tensor]:
    """The pattern of every tile (full, empty or an entry of the table), and the table."""
    words = -(-block // 32)
    if squares.shape[1] == 0:
        return squares[0], torch.zeros(0, block, words, dtype=torch.int32)
    rect = _rectangles(squares, block, offset)
    signatures = torch.stack(mask._signature(rect), 1)
    _, which = signatures.unique(dim=0, return_inverse=True)
    first = torch.full((int(which.max()) + 1,), len(which)).scatter_reduce_(
        0, which, torch.arange(len(which)), "amin"
    )
    span = torch.arange(block, dtype=torch.int32)
    bits, kinds = [], []
    for some in first.split(max(1, CHUNK // block**2)):
        p = (rect[0][some].int()[:, None] + span)[:, :, None]
        j = (rect[2][some].int()[:, None] + span)[:, None, :]
        kept = mask.at(p, j).expand(-1, block, block)
        count = kept.sum((1, 2))
        kinds.append(torch.where(count == 0, _EMPTY, torch.where(count == block**2, FULL, 0)))
        bits.append(_pack(kept))
    kind = torch.cat(kinds)
    table, place = torch.cat(bits)[kind == 0].unique(dim=0, return_inverse=True)
    kind[kind == 0] = place
    return kind[which], table


def _pack(kept: Tensor) -> Tensor:
    """bool ``[n, block, block]`` to int32 words ``[n, block, ceil(block / 32)]``."""
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[2] % 32)).view(torch.uint8)
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    octets = (kept.unflatten(2, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)
