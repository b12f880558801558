"""Random masks beside their meaning: a plain predicate of the query's place and the key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from subquad import mask

Pair = tuple[mask.Mask, Callable[[int, int], bool]]


def dense(meaning: Callable[[int, int], bool], T: int, S: int, offset: int) -> torch.Tensor:
    return torch.tensor([[bool(meaning(i + offset, j)) for j in range(S)] for i in range(T)])


def rising(count: int, shape: tuple[int, ...], g: torch.Generator | None = None) -> torch.Tensor:
    """Random lists of up to ``shape[-1]`` of ``count`` numbers, rising, -1 at the end."""
    drawn = torch.randint(0, count + 1, shape, generator=g).sort(-1)[0]
    twice = torch.zeros_like(drawn, dtype=torch.bool)
    twice[..., 1:] = drawn[..., 1:] == drawn[..., :-1]
    drawn = drawn.masked_fill(twice, count).sort(-1)[0]
    return torch.where(drawn == count, -1, drawn)


def atoms(S: int) -> st.SearchStrategy[Pair]:
    """Masks of one plane over S keys, with queries at 0..S-1."""
    n = st.integers(0, S)
    size = st.integers(1, 7)

    def documents(ids: list[int]) -> Pair:
        return mask.documents(torch.tensor(ids)), lambda p, j: ids[p] == ids[j] >= 0

    def packed(cuts: list[int], left: int) -> Pair:
        bounds = [0, *sorted(cuts), S]
        which = [sum(p >= c for c in bounds[1:]) for p in range(S)]
        return (
            mask.packed(mask.window(left) | mask.sinks(2), bounds),
            lambda p, j: which[p] == which[j] and (0 <= p - j <= left or j - bounds[which[p]] < 2),
        )

    def blocks(size: int, rows: int, seed: int) -> Pair:
        g = torch.Generator().manual_seed(seed)
        count = -(-S // size)
        index = rising(count, (-(-S // rows), 3), g)
        kept = [set(r) for r in index.tolist()]
        return mask.blocks(index, size, rows), lambda p, j: j // size in kept[p // rows]

    def spans(size: int, rows: int, seed: int) -> Pair:
        g = torch.Generator().manual_seed(seed)
        starts = size * rising(-(-S // size), (-(-S // rows), 2), g)
        starts = torch.where((starts < 0) | (starts + seed % 3 >= S), -1, starts + seed % 3)
        columns = rising(S, (-(-S // rows), 4), g)
        runs = [[s for s in row if s >= 0] for row in starts.tolist()]
        single = [set(row) for row in columns.tolist()]
        return (
            mask.spans(starts, columns, size, rows),
            lambda p, j: j in single[p // rows] or any(s <= j < s + size for s in runs[p // rows]),
        )

    def bands(low: int, high: int, rows: int, keys: int, shift: int) -> Pair:
        high = max(low, high)
        return (
            mask.block_band(low, high, rows, keys, shift=shift, key_shift=2),
            lambda p, j: low <= (p + shift) // rows - (j + 2) // keys <= high,
        )

    def placed(start: int, forgot: int, size: int) -> Pair:
        return (
            mask.placed(
                mask.block_band(0, 1, size), torch.tensor([start]), torch.tensor([-forgot])
            ),
            lambda p, j: p >= start and 0 <= (p - start) // size - (j + forgot) // size <= 1,
        )

    return st.one_of(
        st.builds(bands, st.integers(-2, 2), st.integers(-2, 3), size, size, st.integers(-5, 5)),
        st.builds(placed, n, st.integers(0, 5), size),
        st.just((mask.causal(), lambda p, j: j <= p)),
        st.just((mask.full(), lambda p, j: True)),
        st.builds(
            lambda a, b: (mask.window(a, b), lambda p, j: p - a <= j <= p + b), n, st.integers(0, 5)
        ),
        st.builds(lambda n: (mask.sinks(n), lambda p, j: j < n), n),
        st.builds(lambda n: (mask.prefix(n), lambda p, j: p < n and j < n), n),
        st.builds(
            lambda s, w: (mask.strided(max(s, w), w), lambda p, j: (p - j) % max(s, w) < w),
            size,
            size,
        ),
        st.builds(documents, st.lists(st.integers(-1, 2), min_size=S, max_size=S)),
        st.builds(packed, st.lists(n, max_size=3), size) if S else st.nothing(),
        st.builds(blocks, size, size, st.integers(0, 99)),
        st.builds(spans, size, size, st.integers(0, 99)),
    )


def expressions(S: int) -> st.SearchStrategy[Pair]:
    def both(a: Pair, b: Pair) -> Pair:
        return a[0] & b[0], lambda p, j: a[1](p, j) and b[1](p, j)

    def either(a: Pair, b: Pair) -> Pair:
        return a[0] | b[0], lambda p, j: a[1](p, j) or b[1](p, j)

    def neither(a: Pair) -> Pair:
        return ~a[0], lambda p, j: not a[1](p, j)

    return st.recursive(
        atoms(S),
        lambda inner: st.one_of(
            st.builds(both, inner, inner),
            st.builds(either, inner, inner),
            st.builds(neither, inner),
        ),
        max_leaves=4,
    )
