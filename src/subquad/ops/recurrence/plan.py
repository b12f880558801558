"""How sequences are cut into chunks, and in what order the chunks are worked.

Chunks never cross the end of a sequence. They are worked step by step: step s holds chunk s of
every sequence that has one, longest sequences first, so that the sequences alive at a step are
always the first ones. Many short sequences thus make one wide step, a long one many narrow steps.
Consecutive steps are joined to slabs, whose intermediates stay in the processor's cache.

Legend: N sequences, H heads, c chunk length, X chunks times heads of a slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
SLAB = 2**19  # elements of one chunked tensor; measured in benchmarks/cpu.py


def chunk_length(tokens: int, sequences: int) -> int:
    """Tokens a chunk: 64, or less where the sequences are shorter on average."""
    if tokens > 32 * sequences:
        return CHUNK
    return 32 if tokens > 16 * sequences else 16


def chunk_count(B: int, T: int, sequences: int | None) -> int:
    """Chunks of B sequences of T tokens, or at most of T tokens packed as ``sequences``."""
    if sequences is None:
        return B * -(-T // chunk_length(T, 1))
    return T // chunk_length(T, sequences) + sequences


@dataclass(frozen=True)
class Slab:
    """Some consecutive steps.

    Attributes:
        where: int64 ``[X * c]``, the row of ``[B*T*H, ...]`` that each place holds.
        live: bool ``[X, c]``, False past the end of a sequence; None where all are live.
        steps: the slice of the slab's X chunks that each step holds.
        span: the slice of all chunks that the slab holds.
        chunk: c.
    """

    where: Tensor
    live: Tensor | None
    steps: list[slice]
    span: slice
    chunk: int

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x [B,T,H(,D)]`` as ``[X,c,D]`` (D = 1 where x has none); zero past the ends."""
        rows = x.flatten(0, 2).index_select(0, self.where).to(dtype)
        rows = rows.view(-1, self.chunk, x.shape[3] if x.dim() == 4 else 1)
        return rows if self.live is None else rows.masked_fill_(~self.live[..., None], 0)

    def put(self, x: Tensor, y: Tensor) -> None:
        """Write ``y [X,c,D]`` to its places in ``x [B,T,H(,D)]``."""
        where, rows = self.where, y.reshape(-1, *x.shape[3:])
        if self.live is not None:
            live = self.live.flatten()
            where, rows = where[live], rows[live]
        x.view(-1, *x.shape[3:]).index_copy_(0, where, rows.to(x.dtype))


class Plan:
    """The chunks of B sequences of T tokens, or of the packed sequences that cu_seqlens bounds."""

    def __init__(self, B: int, T: int, H: int, width: int, cu: Tensor | None, device) -> None:
        self.H = H
        self.sequences = B if cu is None else cu.numel() - 1
        self.chunk = chunk_length(T, 1 if cu is None else self.sequences)
        self.device = device
        if cu is None:
            lengths = torch.full((B,), T, dtype=torch.int64, device=device)
            starts = torch.arange(B, device=device) * T
            self.order = None
            self.lengths, self.counts = [T] * B, [B] * -(-T // self.chunk)
        else:
            cu = cu.to(device, torch.int64)
            lengths, self.order = cu.diff().sort(descending=True, stable=True)
            starts = cu[:-1][self.order]
            self.lengths = lengths.tolist()
            steps = torch.arange(-(-self.lengths[0] // self.chunk), device=device)
            self.counts = (lengths > steps[:, None] * self.chunk).sum(1).tolist()
        self.starts, self.ends = starts, starts + lengths
        self.limit = max(1, SLAB // (self.chunk * width * H))

    def sort(self, state: Tensor) -> Tensor:
        """``[N,...]`` in the order in which the sequences are worked."""
        return state if self.order is None else state.index_select(0, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        if self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)

    def slabs(self, reverse: bool = False) -> Iterator[Slab]:
        """The slabs in order, or in reverse order."""
        bounds, total, first = [], 0, 0
        for step, count in enumerate(self.counts):
            if step > first and total + count > self.limit:
                bounds.append((first, step))
                first, total = step, 0
            total += count
        if self.counts:
            bounds.append((first, len(self.counts)))
        before = [0]
        for a, b in bounds:
            before.append(before[-1] + sum(self.counts[a:b]))
        indices = range(len(bounds))
        for i in reversed(indices) if reverse else indices:
            yield self._slab(*bounds[i], before[i])

    def _slab(self, first: int, last: int, before: int) -> Slab:
        c, H, counts = self.chunk, self.H, self.counts[first:last]
        sizes = torch.tensor(counts, device=self.device)
        step = torch.arange(last - first, device=self.device).repeat_interleave(sizes)
        sequence = torch.arange(len(step), device=self.device) - (sizes.cumsum(0) - sizes)[step]
        token = (self.starts[sequence] + (first + step) * c)[:, None]
        token = token + torch.arange(c, device=self.device)
        live = None
        if any(self.lengths[n - 1] < (first + s + 1) * c for s, n in enumerate(counts)):
            live = token < self.ends[sequence, None]
            token = token.where(live, 0)
            live = live.repeat_interleave(H, 0)
        heads = torch.arange(H, device=self.device)[:, None]
        steps, end = [], 0
        for n in counts:
            steps.append(slice(end, end + n * H))
            end += n * H
        span = slice(before * H, before * H + end)
        return Slab((token[:, None] * H + heads).flatten(), live, steps, span, c)
