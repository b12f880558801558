"""Columns and diagonals by kernels, as :mod:`subquad.policies.parts.lines` defines them.

Legend: B batch, L last queries, S keys, H query heads, G key heads, K head dim; M keys in a run;
R rows of queries, n runs and v columns in a list.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
PARTS = 32  # of the keys, in which the softmax's sums are found
PROGRAMS = 1024  # that are enough for any GPU
ALL = 1 << 30


@triton.jit
def _queries(Q, l, L, stride, K: tl.constexpr, BK: tl.constexpr):
    d = tl.arange(0, BK)
    there = (l < L)[:, None] & (d < K)[None, :]
    return tl.load(Q + l.to(tl.int64)[:, None] * stride + d[None, :], mask=there, other=0.0)


@triton.jit
def _scores(
    q, KEYS, j, S, stride, scale, K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores in base 2 with keys j, those that there are."""
    d = tl.arange(0, BK)
    there = ((j >= 0) & (j < S))[None, :] & (d < K)[:, None]
    k = tl.load(KEYS + j.to(tl.int64)[None, :] * stride + d[:, None], mask=there, other=0.0)
    return tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)


@triton.jit
def _seen(s, j, l, L, S, window):
    """The scores of queries l with keys j, -inf where unseen."""
    distance = (S - L + l)[:, None] - j[None, :]
    return tl.where((j >= 0)[None, :] & (distance >= 0) & (distance < window), s, float("-inf"))


@partial(Kernel, sizes=("L", "S", "window", "each", "H", "G"))
def part_kernel(
    Q, KEYS, TOP, TOTAL, scale, L, S, window, each, H, G, sqb, sqt, sqh, skb, skt, skh,
    K: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TOP and TOTAL ``[B,H,L,parts]``: the largest score in each part of ``each`` keys, and the sum
    of 2**(score - it)."""
    part, b, h = tl.program_id(0), tl.program_id(2) // H, tl.program_id(2) % H
    l = tl.program_id(1) * BL + tl.arange(0, BL)
    q = _queries(Q + b.to(tl.int64) * sqb + h * sqh, l, L, sqt, K, BK)
    KEYS += b.to(tl.int64) * skb + h // (H // G) * skh
    top = tl.full([BL], float("-inf"), tl.float32)
    total = tl.zeros([BL], tl.float32)
    for first in range(part * each, tl.minimum(part * each + each, S), BN):
        j = first + tl.arange(0, BN)
        s = _seen(_scores(q, KEYS, j, S, skt, scale, K, BK, PRECISION), j, l, L, S, window)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = new
    at = (tl.program_id(2).to(tl.int64) * L + l) * tl.num_programs(0) + part
    tl.store(TOP + at, top, mask=l < L)
    tl.store(TOTAL + at, total, mask=l < L)


@partial(Kernel, sizes=("L", "S", "window", "H", "G", "tiles"))
def last_kernel(
    Q, KEYS, TOP, TOTAL, SUMS, scale, L, S, window, H, G, tiles, sqb, sqt, sqh, skb, skt, skh,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """SUMS ``[L / BN,2,B,H,S]``: of BN queries the sums by key and by distance. A program takes
    ``tiles`` times BN distances, from the near ones on: at these each row sees keys of two tiles,
    further to the left from distance to distance; the nearer tile was that of the step before."""
    plane, planes = tl.program_id(2), tl.num_programs(2).to(tl.int64)
    b, h = plane // H, plane % H
    i = tl.arange(0, BN)
    first = tl.program_id(1) * BN
    l = first + i
    at = (plane.to(tl.int64) * L + l)[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tops = tl.load(TOP + at, mask=(l < L)[:, None], other=0.0)
    totals = tl.load(TOTAL + at, mask=(l < L)[:, None], other=1.0)
    top = tl.max(tops, 1)
    lse = top + tl.log2(tl.sum(totals * tl.exp2(tops - top[:, None]), 1))
    lse = tl.where(l < L, lse, float("inf"))
    q = _queries(Q + b.to(tl.int64) * sqb + h * sqh, l, L, sqt, K, BK)
    KEYS += b.to(tl.int64) * skb + h // (H // G) * skh
    BY_KEY = SUMS + (tl.program_id(1) * 2 * planes + plane) * S
    BY_DISTANCE = BY_KEY + planes * S
    start = tl.program_id(0) * tiles
    place = S - L + first  # of the first query
    j = place - start * BN + 1 + i
    s = _seen(_scores(q, KEYS, j, S, skt, scale, K, BK, PRECISION), j, l, L, S, window)
    near = tl.exp2(s - lse[:, None])
    if start == 0:
        tl.store(BY_KEY + j, tl.sum(near, 0), mask=j < S)
        for after in range(place + 1 + BN, S, BN):
            tl.store(BY_KEY + after + i, 0.0, mask=after + i < S)
    own = i[:, None] - i[None, :] + BN - 1
    for t in range(start, tl.minimum(start + tiles, tl.cdiv(S, BN))):
        j = place - (t + 1) * BN + 1 + i
        s = _seen(_scores(q, KEYS, j, S, skt, scale, K, BK, PRECISION), j, l, L, S, window)
        far = tl.exp2(s - lse[:, None])
        tl.store(BY_KEY + j, tl.sum(far, 0), mask=j >= 0)
        w = tl.gather(far, tl.minimum(own, BN - 1), 1)
        w = tl.where(own < BN, w, tl.gather(near, tl.maximum(own - BN, 0), 1))
        tl.store(BY_DISTANCE + t * BN + i, tl.sum(w, 0), mask=t * BN + i < S)
        near = far


def last_rows(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """As :func:`subquad.policies.parts.lines.last_rows`."""
    (B, L, H, K), (S, G) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    wide = 64 if q.dtype.itemsize == 2 and K <= 128 else 32
    chunks, all_tiles = cdiv(L, wide), cdiv(S, wide)
    sums = torch.empty(chunks, 2, B, H, S, dtype=torch.float32, device=q.device)
    parts = torch.empty(2, B, H, L, PARTS, dtype=torch.float32, device=q.device)
    each = cdiv(all_tiles, PARTS) * wide
    tiles = max(1, min(32, all_tiles * chunks * B * H // PROGRAMS))
    numbers = (H, G, *q.stride()[:3], *k.stride()[:3])
    common = {
        "K": K, "BK": max(16, next_power_of_2(K)), "BN": wide,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    window = ALL if window is None else window
    with on_device(q):
        part_kernel.launch(
            (PARTS, chunks, B * H), (q, k, *parts),
            scale, L, S, window, each, *numbers, BL=wide, **common, num_warps=4, num_stages=3,
        )  # fmt: skip
        last_kernel.launch(
            (cdiv(all_tiles, tiles), chunks, B * H), (q, k, *parts, sums),
            scale, L, S, window, H, G, tiles, *numbers[2:], PARTS=PARTS, **common,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return sums[0] if chunks == 1 else sums.sum(0)


@partial(Kernel, sizes=("S", "n_keys", "n_distances", "sinks", "local"))
def best_kernel(SUMS, KEYS, DISTANCES, S, n_keys, n_distances, sinks, local, BS: tl.constexpr):
    """The best keys ``[B,H,n_keys]``, of which the first ``sinks`` are forced, and distances."""
    plane, by_distance = tl.program_id(0), tl.program_id(1)
    SUMS += (by_distance * tl.num_programs(0) + plane).to(tl.int64) * S
    n = tl.where(by_distance != 0, n_distances, n_keys)
    forced = tl.where(by_distance != 0, local, sinks)
    i = tl.arange(0, BS)
    # The largest bound that n reach, or any that n do exactly; floats >= 0 are in the order of
    # their bits. A round keeps a quarter of what it may be, and its three counts are one sum.
    low, high = tl.full([], 0, tl.int64), tl.full([], 2147483647, tl.int64)
    while low < high:
        a = low + (high - low + 3) // 4
        b = low + (2 * (high - low) + 3) // 4
        c = low + (3 * (high - low) + 3) // 4
        reach = tl.zeros([BS], tl.int64)
        for start in range(0, S, BS):
            x = tl.load(SUMS + start + i, mask=start + i < S, other=-1.0)
            bits = tl.where(start + i < forced, 2147483647, x.to(tl.int32, bitcast=True))
            reach += (bits >= a.to(tl.int32)).to(tl.int64)
            reach += (bits >= b.to(tl.int32)).to(tl.int64) << 21
            reach += (bits >= c.to(tl.int32)).to(tl.int64) << 42
        counts = tl.sum(reach, 0)
        of_a, of_b, of_c = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        in_a, in_b, in_c = of_a >= n, of_b >= n, of_c >= n
        low = tl.where(in_c, c, tl.where(in_b, b, tl.where(in_a, a, low)))
        high = tl.where(in_c, high, tl.where(in_b, c - 1, tl.where(in_a, b - 1, a - 1)))
        high = tl.where((of_a == n) | (of_b == n) | (of_c == n), low, high)
    bound = low.to(tl.int32)
    more = tl.zeros([BS], tl.int32)
    for start in range(0, S, BS):
        x = tl.load(SUMS + start + i, mask=start + i < S, other=-1.0)
        bits = tl.where(start + i < forced, 2147483647, x.to(tl.int32, bitcast=True))
        more += (bits > bound).to(tl.int32)
    missing = n - tl.sum(more, 0)
    OUT = KEYS + plane.to(tl.int64) * n_keys
    if by_distance != 0:
        OUT = DISTANCES + plane.to(tl.int64) * n_distances
    done, met = 0, 0
    for start in range(0, S, BS):
        x = tl.load(SUMS + start + i, mask=start + i < S, other=-1.0)
        bits = tl.where(start + i < forced, 2147483647, x.to(tl.int32, bitcast=True))
        # Of those equal to the bound the earlier ones, as many as are missing.
        ties = ((bits == bound) & (start + i < S)).to(tl.int32)
        before = met + tl.cumsum(ties, 0) - ties
        keep = (bits > bound) | ((ties > 0) & (before < missing))
        kept = keep.to(tl.int32)
        tl.store(OUT + done + tl.cumsum(kept, 0) - kept, start + i, mask=keep)
        done += tl.sum(kept, 0)
        met += tl.sum(ties, 0)


def best(sums: Tensor, keys: tuple[int, int], distances: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As :func:`subquad.policies.parts.lines.best`, int32; of equals the earlier."""
    _, B, H, S = sums.shape
    (v, sinks), (s, local) = ((min(n, S), min(forced, n, S)) for n, forced in (keys, distances))
    found_keys, found_distances = (
        torch.empty(B, H, n, dtype=torch.int32, device=sums.device) for n in (v, s)
    )
    with on_device(sums):
        best_kernel.launch(
            (B * H, 2), (sums, found_keys, found_distances), S, v, s, sinks, local,
            BS=min(8192, max(16, next_power_of_2(S))), num_warps=16,
        )  # fmt: skip
    return found_keys, found_distances


@triton.jit
def _before(LIST, x, count, HALVINGS: tl.constexpr):
    """How many of the ``count`` rising entries (then -1) of a list lie before each of x."""
    low = tl.zeros_like(x)
    high = low + count
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        open_ = low < high
        own = tl.load(LIST + middle, mask=open_, other=-1).to(tl.int32)
        after = (own >= 0) & (own < x)
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & ~after, middle, high)
    return low


@partial(Kernel, sizes=("most", "s"))
def near_kernel(DISTANCES, NEARER, most, s, HALVINGS: tl.constexpr, BX: tl.constexpr):
    """NEARER ``[B,H,most+1]``: the largest of the distances ``[B,H,s]`` below each x, or -1."""
    x = tl.program_id(0) * BX + tl.arange(0, BX)
    DISTANCES += tl.program_id(1).to(tl.int64) * s
    low = _before(DISTANCES, x, s, HALVINGS)
    d = tl.load(DISTANCES + low - 1, mask=low > 0, other=-1).to(tl.int32)
    tl.store(NEARER + tl.program_id(1).to(tl.int64) * (most + 1) + x, d, mask=x <= most)


@partial(Kernel, sizes=("R", "n", "first", "most", "S", "M"))
def run_kernel(NEARER, STARTS, COUNT, REACH, R, n, first, most, S, M, BR: tl.constexpr):
    """Walks the distances of BR rows from far to near: the runs of M keys that they need. Rows that
    are done wait for the others."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    row = tl.program_id(1).to(tl.int64) * R + r
    NEARER += tl.program_id(1).to(tl.int64) * (most + 1)
    end = M * (first + 1 + r)
    d = tl.load(NEARER + end, mask=r < R, other=-1)
    reach = tl.where(d < 0, 0, tl.maximum(end - d, M))
    start = reach - M
    count = tl.zeros([BR], tl.int32)
    while tl.max(d, 0) >= 0:
        there = (d >= 0) & (start < S)
        tl.store(STARTS + row * n + count, start, mask=there)
        count += there.to(tl.int32)
        d = tl.load(NEARER + tl.maximum(end - reach, 0), mask=d >= 0, other=-1)
        start = tl.where(end - d <= reach + M, reach, end - d - M)
        reach = tl.where(d < 0, reach, start + M)
    tl.store(COUNT + row, count, mask=r < R)
    tl.store(REACH + row, reach, mask=r < R)


@partial(Kernel, sizes=("R", "n", "v", "M"))
def outside_kernel(
    COLUMNS, STARTS, COUNT, REACH, OUT, R, n, v, M, HALVINGS: tl.constexpr, BV: tl.constexpr
):
    """The columns of one row that lie before its reach and in none of its runs, packed, then -1."""
    row = tl.program_id(1).to(tl.int64) * R + tl.program_id(0)
    STARTS += row * n
    OUT += row * v
    COLUMNS += tl.program_id(1).to(tl.int64) * v
    count, reach = tl.load(COUNT + row), tl.load(REACH + row)
    done = 0
    for i in range(0, v, BV):
        begin = tl.load(COLUMNS + i).to(tl.int32)
        if (begin >= 0) & (begin < reach):
            j = i + tl.arange(0, BV)
            x = tl.load(COLUMNS + j, mask=j < v, other=-1).to(tl.int32)
            low = _before(STARTS, x + 1, count, HALVINGS)  # the runs that start at x or before
            last = tl.load(STARTS + tl.maximum(low - 1, 0), mask=low > 0, other=-M)
            single = (x >= 0) & (x < reach) & (x - last >= M)
            kept = single.to(tl.int32)
            tl.store(OUT + done + tl.cumsum(kept, 0) - kept, x, mask=single)
            done += tl.sum(kept, 0)
    for i in range(done, v, BV):
        tl.store(OUT + i + tl.arange(0, BV), -1, mask=i + tl.arange(0, BV) < v)


def blocks(columns: Tensor, distances: Tensor, T: int, S: int, size: int) -> tuple[Tensor, Tensor]:
    """As :func:`subquad.policies.parts.lines.blocks`, int32, the lists as wide as any could be."""
    (B, H, v), s = columns.shape, distances.shape[2]
    columns, distances = columns.contiguous(), distances.contiguous()
    first, last = (S - T) // size, cdiv(S, size)
    R, n = last - first, min(last, s)  # each run spends a distance
    most = size * last
    nearer = torch.empty(B, H, most + 1, dtype=torch.int32, device=columns.device)
    count, reach = (nearer.new_empty(B, H, R) for _ in range(2))
    starts = nearer.new_full((B, H, R, n), -1)
    single = nearer.new_empty(B, H, R, v)
    with on_device(columns):
        near_kernel.launch(
            (cdiv(most + 1, 1024), B * H), (distances, nearer), most, s,
            HALVINGS=s.bit_length(), BX=1024, num_warps=4,
        )  # fmt: skip
        run_kernel.launch(
            (cdiv(R, 32), B * H), (nearer, starts, count, reach), R, n, first, most, S, size,
            BR=32, num_warps=1,
        )  # fmt: skip
        outside_kernel.launch(
            (R, B * H), (columns, starts, count, reach, single), R, n, v, size,
            HALVINGS=n.bit_length(), BV=min(512, next_power_of_2(v)), num_warps=4,
        )  # fmt: skip
    return starts, single
