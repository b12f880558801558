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
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

SLAB = 2**17  # elements of one chunked tensor of a slab; smaller ones wait more for threads


def chunk_limit(width: int) -> int:
    """Tokens a chunk where there are many: a token costs c (K + V) in its chunk and K V in the
    state, so narrow heads take shorter chunks."""
    return 32 if width <= 64 else 64


def chunk_length(T: int, sequences: int | None, width: int) -> int:
    """Tokens a chunk, a power of 2: no more than the sequences have on average."""
    mean = T if sequences is None else T // max(sequences, 1)
    if mean > 32:
        return chunk_limit(width)
    return 32 if mean > 16 else 16


def chunk_count(B: int, T: int, sequences: int | None, width: int) -> int:
    """Chunks of B sequences of T tokens, or the most that T tokens packed as sequences have."""
    c = chunk_length(T, sequences, width)
    return B * -(-T // c) if sequences is None else T // c + sequences


class Room:
    """Memory that all slabs of a pass use in turn: fresh memory of a megabyte costs as much as the
    product that fills it."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory of this name, of the dtype of ``like``, with whatever it holds."""
        size, found = prod(shape), self.buffers.get(name)
        if found is None or found.numel() < size:
            found = self.buffers[name] = like.new_empty(size)
        return found[:size].view(shape)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self(name, a, *a.shape[:2], b.shape[2]))


@dataclass(frozen=True)
class Slab:
    """Some consecutive steps.

    Attributes:
        steps: how many chunks times heads each step holds; their sum is X.
        span: the slice of all chunks times heads that the slab holds.
        chunk: c.
        room: memory for the work on it.
        tokens: the slice of tokens, where all sequences have all of them; else
        where: int64 ``[X c]``, the row of ``[B T H, ...]`` that each place holds, and
        dead: bool ``[X,c,1]``, True past the end of a sequence.
    """

    steps: list[int]
    span: slice
    chunk: int
    room: Room
    tokens: slice | None = None
    where: Tensor | None = None
    dead: Tensor | None = None

    def take(self, x: Tensor, dtype: torch.dtype, out: Tensor | None = None, times=1.0) -> Tensor:
        """``x [B,T,H(,D)]`` as ``[X,c,D]`` (D = 1 where x has none), zero past the ends; it may
        share the memory of x. Or ``x * times`` in ``out``."""
        if out is not None:
            if self.tokens is None or x.dtype != dtype:
                return torch.mul(self.take(x, dtype), times, out=out)
            x = self._chunks(x)
            torch.mul(x, times, out=out.view(x.shape))
            return out
        x = x if x.dim() == 4 else x[..., None]
        if self.tokens is not None:
            rows = self._chunks(x).to(dtype).reshape(-1, self.chunk, x.shape[3])
            return rows.contiguous()
        assert self.where is not None
        assert self.dead is not None
        rows = x.flatten(0, 2).index_select(0, self.where).to(dtype)
        return rows.view(-1, self.chunk, x.shape[3]).masked_fill_(self.dead, 0)

    def put(self, x: Tensor, y: Tensor, times: Tensor | float | None = None) -> None:
        """Write ``y [X,c,D]``, ``times`` a number or ``[X,c,1]``, to its places in
        ``x [B,T,H(,D)]``."""
        x = x if x.dim() == 4 else x[..., None]
        if times is not None and (self.tokens is None or x.dtype != y.dtype):
            y, times = y * times, None
        if self.tokens is not None:
            to = self._chunks(x)
            if times is None:
                to.copy_(y.reshape(to.shape))
            else:
                if isinstance(times, Tensor):
                    times = times.reshape(*to.shape[:4], 1)
                torch.mul(y.reshape(to.shape), times, out=to)
        elif self.where is not None and self.dead is not None:
            live = ~self.dead.flatten()
            rows = y.reshape(-1, x.shape[3])[live]
            x.view(-1, x.shape[3]).index_copy_(0, self.where[live], rows.to(x.dtype))

    def _chunks(self, x: Tensor) -> Tensor:
        """The view ``[steps,B,H,c,D]``."""
        return x[:, self.tokens].unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)


class Plan:
    """The chunks of B sequences of T tokens, or of the packed sequences that cu_seqlens bounds."""

    def __init__(self, B: int, T: int, H: int, width: int, cu: Tensor | None, device) -> None:
        self.N = B if cu is None else cu.numel() - 1
        self.H, self.device = H, device
        self.chunk = chunk_length(T, None if cu is None else self.N, width)
        self.packed = cu is not None
        if cu is None:
            self.starts = torch.arange(B, device=device) * T
            lengths = torch.full_like(self.starts, T)
            self.counts = [B] * -(-T // self.chunk)
            self.whole = T // self.chunk
        else:
            cu = cu.to(device, torch.int64)
            lengths, self.order = cu.diff().sort(descending=True, stable=True)
            self.starts = cu[:-1][self.order]
            steps = torch.arange(-(-int(lengths[0]) // self.chunk), device=device)
            self.counts = (lengths > steps[:, None] * self.chunk).sum(1).tolist()
            self.whole = 0
        self.ends = self.starts + lengths
        self.total = sum(self.counts)
        self.capacity = chunk_count(B, T, None if cu is None else self.N, width)
        self.room = Room()
        self.limit = max(1, SLAB // (self.chunk * width * H))

    def sort(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of ``[N,H,K,V]``, ``[N H,K,V]`` in the order in which sequences are worked."""
        state = state.index_select(0, self.order) if self.packed else state.clone()
        return state.to(dtype).reshape(-1, *state.shape[2:])

    def unsort(self, state: Tensor) -> Tensor:
        """The other way round."""
        state = state.view(self.N, self.H, *state.shape[1:])
        return torch.empty_like(state).index_copy_(0, self.order, state) if self.packed else state

    def slabs(self, reverse: bool = False) -> Iterator[Slab]:
        """The slabs in order, or in reverse order."""
        bounds, first, total = [], 0, 0
        for step, count in enumerate(self.counts):
            if step > first and (total + count > self.limit or step == self.whole):
                bounds.append((first, step))
                first, total = step, 0
            total += count
        if self.counts:
            bounds.append((first, len(self.counts)))
        before = [0, *accumulate(sum(self.counts[a:b]) for a, b in bounds)]
        indices = range(len(bounds))
        for i in reversed(indices) if reverse else indices:
            yield self._slab(*bounds[i], before[i])

    def _slab(self, first: int, last: int, before: int) -> Slab:
        c, H, counts = self.chunk, self.H, self.counts[first:last]
        steps = [n * H for n in counts]
        span = slice(before * H, before * H + sum(steps))
        if last <= self.whole:
            return Slab(steps, span, c, self.room, tokens=slice(first * c, last * c))
        sizes = torch.tensor(counts, device=self.device)
        step = torch.arange(last - first, device=self.device).repeat_interleave(sizes)
        sequence = torch.arange(len(step), device=self.device) - (sizes.cumsum(0) - sizes)[step]
        token = (self.starts[sequence] + (first + step) * c)[:, None]
        token = token + torch.arange(c, device=self.device)
        dead = token >= self.ends[sequence, None]
        heads = torch.arange(H, device=self.device)[:, None]
        where = token.masked_fill(dead, 0)[:, None] * H + heads
        dead = dead.repeat_interleave(H, 0)[..., None]
        return Slab(steps, span, c, self.room, where=where.flatten(), dead=dead)
