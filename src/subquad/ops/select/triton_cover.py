"""FlexPrefill's choice by kernels: as many columns and diagonals, in blocks, as cover a share.

Legend: B batch, L last queries, S keys, H query heads, G key heads, K head dim; b tokens in a
block, n blocks of keys, R rows of queries.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.select import triton_best
from subquad.ops.sizes import cdiv, next_power_of_2


@triton.jit
def _covered(X, S, target, BS: tl.constexpr):
    """The largest of X ``[S]`` (>= 0) that sum up to at most ``target``: the bits of a float above
    which all do, how many these are, and how many of those equal to it do, too."""
    i = tl.arange(0, BS)
    largest = tl.full([BS], 0, tl.int32)
    for start in range(0, S, BS):
        x = tl.load(X + start + i, mask=start + i < S, other=0.0)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True))
    # The least bound, in the order of the floats, above which no more than that lies. A round keeps
    # one quarter of what it may be.
    low, high = tl.full([], -1, tl.int64), tl.max(largest, 0).to(tl.int64)
    while low < high:
        a = low + (high - low) // 4
        b = low + (high - low) // 2
        c = low + 3 * (high - low) // 4
        over_a = tl.zeros([BS], tl.float32)
        over_b = tl.zeros([BS], tl.float32)
        over_c = tl.zeros([BS], tl.float32)
        for start in range(0, S, BS):
            x = tl.load(X + start + i, mask=start + i < S, other=0.0)
            bits = x.to(tl.int32, bitcast=True)
            over_a += tl.where(bits > a.to(tl.int32), x, 0.0)
            over_b += tl.where(bits > b.to(tl.int32), x, 0.0)
            over_c += tl.where(bits > c.to(tl.int32), x, 0.0)
        fits_a = tl.sum(over_a, 0) <= target
        fits_b = tl.sum(over_b, 0) <= target
        fits_c = tl.sum(over_c, 0) <= target
        low = tl.where(fits_a, low, tl.where(fits_b, a + 1, tl.where(fits_c, b + 1, c + 1)))
        high = tl.where(fits_a, a, tl.where(fits_b, b, tl.where(fits_c, c, high)))
    bound = low.to(tl.int32)
    over = tl.zeros([BS], tl.float32)
    more = tl.full([BS], 0, tl.int32)
    ties = tl.full([BS], 0, tl.int32)
    for start in range(0, S, BS):
        there = start + i < S
        x = tl.load(X + start + i, mask=there, other=0.0)
        bits = x.to(tl.int32, bitcast=True)
        over += tl.where(bits > bound, x, 0.0)
        more += (there & (bits > bound)).to(tl.int32)
        ties += (there & (bits == bound)).to(tl.int32)
    each = tl.where(bound > 0, bound, 1).to(tl.float32, bitcast=True)
    fit = tl.minimum((target - tl.sum(over, 0)) / each, tl.sum(ties, 0).to(tl.float32))
    return bound, tl.sum(more, 0), tl.where(bound > 0, fit.to(tl.int32), 0)


@partial(Kernel, sizes=("S", "n", "b", "unit", "least", "most"))
def cover_kernel(
    SUMS, AWARE, BLOCKS, TAKEN, target, S, n, b, unit, least, most,
    BS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """TAKEN ``[2,B,H,n]``: of SUMS ``[2,B,H,S]`` by key and by distance the best blocks, as many as
    cover ``target``; distances in blocks that end as the keys do."""
    by_distance, plane = tl.program_id(1), tl.program_id(0)
    own = (by_distance * tl.num_programs(0) + plane).to(tl.int64)
    SUMS += own * S
    BLOCKS += own * n
    _, over, fit = _covered(SUMS, S, target, BS)
    count = (over + fit + 1) // unit + 1
    count = tl.minimum(tl.maximum(count, least), most)
    if AWARE is not None:
        count = tl.where(tl.load(AWARE + plane) != 0, least, count)
    first = tl.where(by_distance != 0, S - n * b, 0)  # of block 0, which may begin before 0
    for start in range(0, n, BB):
        block = start + tl.arange(0, BB)
        total = tl.zeros([BB], tl.float32)
        for w in range(0, b, BW):
            at = first + block[:, None] * b + w + tl.arange(0, BW)[None, :]
            there = (block < n)[:, None] & (w + tl.arange(0, BW) < b)[None, :]
            there = there & (at >= 0) & (at < S)
            total += tl.sum(tl.load(SUMS + at, mask=there, other=0.0), 1)
        tl.store(BLOCKS + block, total, mask=block < n)
    tl.debug_barrier()
    i = tl.arange(0, BN)
    # The first block, and the nearest, before all others.
    score = tl.load(BLOCKS + i, mask=i < n, other=0.0)
    x = tl.where(i == 0, 2147483647, score.to(tl.int32, bitcast=True))
    x = tl.where(i < n, x, -1)
    found = tl.minimum(tl.maximum(count, 1), n)
    low, high = tl.full([], 0, tl.int64), tl.full([], 2147483647, tl.int64)
    while low < high:
        middle = (low + high + 1) // 2
        reach = tl.sum((x >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reach >= found, middle, low)
        high = tl.where(reach > found, high, tl.where(reach == found, middle, middle - 1))
    bound = low.to(tl.int32)
    more, ties = (x > bound).to(tl.int32), (x == bound).to(tl.int32)
    before = tl.cumsum(ties, 0) - ties
    taken = (more > 0) | ((ties > 0) & (before < found - tl.sum(more, 0)))
    tl.store(TAKEN + own * n + i, taken.to(tl.int8), mask=i < n)


@partial(Kernel, sizes=("L", "S", "n", "b", "H", "G"))
def aware_kernel(
    Q, MEANS, SUMS, PARTS, AWARE, scale, tau, L, S, n, b, H, G, sqb, sqt, sqh,
    K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """AWARE ``[B,H]``: whether the attention of the mean of L queries to MEANS ``[B,n,G,K]`` is
    nearer than ``tau`` to that of the queries, SUMS ``[B,H,S]``, in blocks."""
    plane = tl.program_id(0)
    batch, h = plane // H, plane % H
    d, w = tl.arange(0, BK), tl.arange(0, BW)
    Q += batch.to(tl.int64) * sqb + h * sqh
    q = tl.zeros([BK], tl.float32)
    for i in range(0, L, BW):
        there = (i + w < L)[:, None] & (d < K)[None, :]
        q += tl.sum(tl.load(Q + (i + w)[:, None] * sqt + d[None, :], mask=there, other=0.0), 0)
    q *= scale / L
    MEANS += (batch.to(tl.int64) * n * G + h // (H // G)) * K
    SUMS += plane.to(tl.int64) * S
    PARTS += plane.to(tl.int64) * 2 * n
    for start in range(0, n, BB):
        block = start + tl.arange(0, BB)
        at = MEANS + block[:, None] * (G * K) + d[None, :]
        k = tl.load(at, mask=(block < n)[:, None] & (d < K)[None, :], other=0.0)
        tl.store(PARTS + block, tl.sum(k * q[None, :], 1), mask=block < n)
        total = tl.zeros([BB], tl.float32)
        for i in range(0, b, BW):
            key = block[:, None] * b + i + w[None, :]
            there = (i + w < b)[None, :] & (key < S)
            total += tl.sum(tl.load(SUMS + key, mask=there, other=0.0), 1)
        tl.store(PARTS + n + block, total / L, mask=block < n)
    tl.debug_barrier()
    c = tl.arange(0, BN)
    guess = tl.load(PARTS + c, mask=c < n, other=float("-inf"))
    guess = tl.exp(guess - tl.max(guess, 0))
    guess /= tl.sum(guess, 0)
    truth = tl.load(PARTS + n + c, mask=c < n, other=0.0)
    middle = tl.maximum((guess + truth) / 2, 1e-38)
    apart = guess * tl.log(tl.maximum(guess / middle, 1e-38))  # 0 where guess is
    apart += truth * tl.log(tl.maximum(truth / middle, 1e-38))
    far = tl.sqrt(tl.maximum(tl.sum(apart, 0) / 2, 0.0))
    tl.store(AWARE + plane, (far < tau).to(tl.int8))


@partial(Kernel, sizes=("R", "n", "H", "G"))
def mass_kernel(
    Q, MEANS, AWARE, MASS, scale, R, n, H, G,
    K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """MASS ``[B,H,R,n]``: the attention of row r of Q ``[B,R,H,K]`` to MEANS ``[B,n,G,K]``, where
    the head is aware."""
    r, plane = tl.program_id(0), tl.program_id(1)
    batch, h = plane // H, plane % H
    if tl.load(AWARE + plane) != 0:
        d, c = tl.arange(0, BK), tl.arange(0, BN)
        q = tl.load(Q + ((batch * R + r).to(tl.int64) * H + h) * K + d, mask=d < K, other=0.0)
        MEANS += (batch.to(tl.int64) * n * G + h // (H // G)) * K
        MASS += (plane.to(tl.int64) * R + r) * n
        last = n - R + r
        for start in range(0, last + 1, BB):
            block = start + tl.arange(0, BB)
            at = MEANS + block[:, None] * (G * K) + d[None, :]
            k = tl.load(at, mask=(block < n)[:, None] & (d < K)[None, :], other=0.0)
            tl.store(MASS + block, tl.sum(k * q[None, :], 1) * scale, mask=block <= last)
        tl.debug_barrier()
        s = tl.load(MASS + c, mask=c <= last, other=float("-inf"))
        w = tl.exp(s - tl.max(s, 0))
        tl.store(MASS + c, w / tl.sum(w, 0), mask=c < n)


@partial(Kernel, sizes=("size",))
def bound_kernel(MASS, AWARE, BOUND, target, size, BS: tl.constexpr):
    """BOUND ``[B,H]``: the bits of a float above which MASS ``[B,H,size]`` covers ``target``."""
    plane = tl.program_id(0)
    bound = 2147483647
    if tl.load(AWARE + plane) != 0:
        bound, _, fit = _covered(MASS + plane.to(tl.int64) * size, size, target, BS)
        bound = tl.where(fit > 0, bound - 1, bound)  # of equal ones all
    tl.store(BOUND + plane, bound)


@partial(Kernel, sizes=("R", "n", "first", "width"))
def union_kernel(TAKEN, MASS, BOUND, OUT, R, n, first, width, BN: tl.constexpr):
    """The blocks of one row: columns, diagonals and those of MASS ``[B,H,R,n]`` above its head's
    BOUND; rising, then -1."""
    c, m = tl.arange(0, BN), first + tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    planes = tl.num_programs(1).to(tl.int64)
    there = c <= m
    keep = tl.load(TAKEN + plane * n + c, mask=there, other=0)
    keep = keep | tl.load(TAKEN + (planes + plane) * n + m - c, mask=there, other=0)
    row = plane * R + tl.program_id(0)
    if MASS is not None:
        # No bits are above those of a head that is not aware, whose MASS nobody wrote.
        mass = tl.load(MASS + row * n + c, mask=there, other=0.0).to(tl.int32, bitcast=True)
        keep = keep | (there & (mass > tl.load(BOUND + plane))).to(tl.int8)
    kept = keep.to(tl.int32)
    count = tl.sum(kept, 0)
    OUT += row * width
    tl.store(OUT + tl.cumsum(kept, 0) - kept, c, mask=kept > 0)
    for start in range(0, width, BN):
        at = start + c
        tl.store(OUT + at, -1, mask=(at >= count) & (at < width))


def cover(
    sums: Tensor, aware: Tensor | None, target: float, b: int, unit: int, least: int, most: int
) -> Tensor:
    """The best blocks of ``b`` keys or distances of ``sums [2,B,H,S]``: int8 ``[2,B,H,n]``.

    Args:
        aware: int8 ``[B,H]``, heads that take ``least`` of either.
        target: sum to cover; ``unit`` covered tokens ask for one block.
    """
    _, B, H, S = sums.shape
    n = cdiv(S, b)
    blocks = torch.empty(2, B, H, n, dtype=torch.float32, device=sums.device)
    taken = torch.empty(2, B, H, n, dtype=torch.int8, device=sums.device)
    BW = min(next_power_of_2(b), 256)
    with on_device(sums):
        cover_kernel.launch(
            (B * H, 2), (sums, aware, blocks, taken), target, S, n, b, unit, least, most,
            BS=min(8192, max(16, next_power_of_2(S))), BB=max(1, 8192 // BW), BW=BW,
            BN=max(16, next_power_of_2(n)), num_warps=16,
        )  # fmt: skip
    return taken


def query_aware(
    q: Tensor, k: Tensor, by_key: Tensor, b: int, scale: float, tau: float
) -> tuple[Tensor, Tensor]:
    """Heads whose attention from the mean of the last queries ``q [B,L,H,K]`` to the means of
    blocks of ``k [B,S,G,K]`` is nearer than ``tau`` to their attention: int8 ``[B,H]``, and the
    means, float32 ``[B,n,G,K]``."""
    (B, L, H, K), (S, G) = q.shape, k.shape[1:3]
    q = q if q.stride(-1) == 1 else q.contiguous()
    means = triton_best.means(k, b, 0, counted=True)
    n = means.shape[1]
    parts = torch.empty(B, H, 2, n, dtype=torch.float32, device=q.device)
    aware = torch.empty(B, H, dtype=torch.int8, device=q.device)
    with on_device(q):
        aware_kernel.launch(
            (B * H,), (q, means, by_key, parts, aware), scale, tau, L, S, n, b, H, G,
            *q.stride()[:3], K=K, BK=next_power_of_2(K), BB=32, BW=64,
            BN=max(16, next_power_of_2(n)), num_warps=8,
        )  # fmt: skip
    return aware, means


def best_pairs(
    q: Tensor, means: Tensor, aware: Tensor, b: int, lead: int, scale: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """The attention of blocks of ``q [B,T,H,K]`` (token 0 at place ``lead`` of its block) to blocks
    of keys, by their means: float32 ``[B,H,R,n]``, and the bits of a float above which its entries
    cover ``gamma`` of it, int32 ``[B,H]``; of heads that are ``aware``."""
    (B, _, H, K), (n, G) = q.shape, means.shape[1:3]
    queries = triton_best.means(q, b, lead, counted=True, wanted=aware)
    R = queries.shape[1]
    mass = torch.empty(B, H, R, n, dtype=torch.float32, device=q.device)
    bound = torch.empty(B, H, dtype=torch.int32, device=q.device)
    with on_device(q):
        mass_kernel.launch(
            (R, B * H), (queries, means, aware, mass), scale, R, n, H, G,
            K=K, BK=next_power_of_2(K), BB=64, BN=max(16, next_power_of_2(n)),
            num_warps=8,
        )  # fmt: skip
        bound_kernel.launch(
            (B * H,), (mass, aware, bound), gamma * R, R * n,
            BS=min(8192, max(16, next_power_of_2(R * n))), num_warps=16,
        )  # fmt: skip
    return mass, bound


def union(taken: Tensor, pairs: tuple[Tensor, Tensor] | None, R: int, width: int) -> Tensor:
    """The lists of the last R rows, of blocks ``taken [2,B,H,n]`` by key and by distance and of the
    best ``pairs``: int32 ``[B,H,R,width]``, rising, -1 at the end."""
    _, B, H, n = taken.shape
    out = torch.empty(B, H, R, width, dtype=torch.int32, device=taken.device)
    BN = max(16, next_power_of_2(n))
    with on_device(taken):
        union_kernel.launch(
            (R, B * H), (taken, *(pairs or (None, None)), out), R, n, n - R, width, BN=BN,
            num_warps=max(1, min(16, BN // 512)),
        )  # fmt: skip
    return out
