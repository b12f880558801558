"""The search of :mod:`subquad.ops.select.search` as one kernel: a program halves and chooses for a
row until its segments are single blocks; nothing but what it found leaves the multiprocessor.

Legend: B batch, T queries, S keys, N heads that search (F query heads each), G key heads, K head
dim; R rows of ROWS queries, of which m a head are asked; n blocks kept.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device


@triton.jit
def _asked(
    Q, x, r, T, sqt, sqh, m, ROWS: tl.constexpr, BEGIN: tl.constexpr, STEP: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``[BK,len(x)]``: the queries x of those that speak for row r, head by head."""
    first = r * ROWS
    # A row cut short repeats its last one (its first, where there is no other).
    beyond = T - 1 - first - BEGIN
    last = tl.where(beyond < 0, first, first + BEGIN + beyond // STEP * STEP)
    token = tl.minimum(first + BEGIN + x % m * STEP, last)
    d = tl.arange(0, BK)
    at = token.to(tl.int64) * sqt + x // m * sqh
    q = tl.load(Q + at[:, None] + d[None, :], mask=(d < K)[None, :], other=0.0)
    return tl.trans(q)


@triton.jit
def _score(
    q, q_more, KEYS, BLOCKS, OUT, count, S, skt,
    K: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr,
    MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest product of a query with a key of each of ``count`` listed blocks."""
    d = tl.arange(0, BK)
    best = tl.full([BT], float("-inf"), tl.float32)
    block = tl.load(BLOCKS + tl.arange(0, BT), mask=tl.arange(0, BT) < count, other=0)
    for i in range(0, tl.cdiv(count, BT) * SIZE):
        j = i // SIZE * BT + tl.arange(0, BT)
        # A step ahead, so that the copy of the next keys need not wait for the list.
        next_j = (i + 1) // SIZE * BT + tl.arange(0, BT)
        after = tl.load(BLOCKS + next_j, mask=next_j < count, other=0)
        key = tl.minimum(block * SIZE + i % SIZE, S - 1).to(tl.int64)
        at = KEYS + key[:, None] * skt + d[None, :]
        k = tl.load(at) if K == BK else tl.load(at, mask=(d < K)[None, :], other=0.0)
        s = tl.max(tl.dot(k, q, input_precision=PRECISION), 1)
        if MORE:
            s = tl.maximum(s, tl.max(tl.dot(k, q_more, input_precision=PRECISION), 1))
        best = tl.where(i % SIZE == 0, s, tl.maximum(best, s))
        tl.store(OUT + j, best, mask=(j < count) & (i % SIZE == SIZE - 1))
        block = after


@triton.jit
def _ordered(score):
    """Integers in the order of the scores."""
    x = score.to(tl.int32, bitcast=True)
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(x):
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bound(x, y, low, n):
    """The largest integer that n of x and y reach, or any that n do exactly; not below ``low``."""
    high = tl.maximum(tl.max(x, 0), tl.max(y, 0))
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((x >= middle).to(tl.int32) + (y >= middle).to(tl.int32), 0)
        low = tl.where(count >= n, middle, low)
        high = tl.where(count > n, high, tl.where(count == n, middle, middle - 1))
    return low


@partial(Kernel, sizes=("T", "S", "offset", "window", "tasks", "N", "G", "R", "n", "m"))
def search_kernel(
    Q, KEYS, OUT, PLACES, SCORES, T, S, offset, window, tasks, N, G, R, n, m,
    sqb, sqt, sqh, skb, skt, skh,
    F: tl.constexpr, ROWS: tl.constexpr, BEGIN: tl.constexpr, STEP: tl.constexpr,
    CENTER: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr,
    BM: tl.constexpr, MORE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row after row, the long ones first. A program's own PLACES ``[3,n]`` and SCORES ``[3,n]``
    hold its segments' sizes and the halves to be scored, and these scores."""
    i = tl.arange(0, BN)
    there = i < n
    pid = tl.program_id(0).to(tl.int64)
    SIZES = PLACES + pid * 3 * n
    LEFT = SIZES + n
    RIGHT = LEFT + n
    KNOWN = SCORES + pid * 3 * n
    OF_LEFT = KNOWN + n
    OF_RIGHT = OF_LEFT + n
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        r = R - 1 - task % R
        b, h = task // R // N, task // R % N
        A = OUT + (task // R * R + r).to(tl.int64) * n  # where its segments begin
        end = tl.minimum(tl.maximum(offset + (r + 1) * ROWS - window, 0), S)
        blocks = (end + SIZE - 1) // SIZE
        if blocks <= n:
            tl.store(A + i, tl.where(i < blocks, i, -1), mask=there)
        else:
            own = Q + b.to(tl.int64) * sqb + h * F * sqh
            each = tl.minimum(tl.arange(0, BM), F * m - 1)
            q = _asked(own, each, r, T, sqt, sqh, m, ROWS, BEGIN, STEP, K, BK)
            q_more = q
            if MORE:
                rest = tl.minimum(BM + tl.arange(0, MORE), F * m - 1)
                q_more = _asked(own, rest, r, T, sqt, sqh, m, ROWS, BEGIN, STEP, K, BK)
            keys = KEYS + b.to(tl.int64) * skb + h * G // N * skh
            span = blocks.to(tl.float64) / n
            a = (span * i).to(tl.int32)
            tl.store(A + i, a, mask=there)
            tl.store(SIZES + i, (span * (i + 1)).to(tl.int32) - a, mask=there)
            tl.debug_barrier()
            if not CENTER:
                # A left half has the score of the whole.
                _score(q, q_more, keys, A, KNOWN, n, S, skt, K, BK, SIZE, BT, MORE, PRECISION)
            low = tl.full([], -2147483647, tl.int32)
            while span > 1:
                tl.debug_barrier()
                a = tl.load(A + i, mask=there, other=0)
                size = tl.load(SIZES + i, mask=there, other=0)
                half = size // 2
                if CENTER:
                    tl.store(LEFT + i, a + half // 2, mask=there)
                    tl.store(RIGHT + i, a + half + (size - half) // 2, mask=there)
                    tl.debug_barrier()
                    _score(
                        q, q_more, keys, LEFT, OF_LEFT, n, S, skt, K, BK, SIZE, BT, MORE, PRECISION
                    )
                    _score(
                        q, q_more, keys, RIGHT, OF_RIGHT, n, S, skt, K, BK, SIZE, BT, MORE,
                        PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    left = tl.load(OF_LEFT + i, mask=there, other=0.0)
                    right = tl.load(OF_RIGHT + i, mask=there, other=0.0)
                else:
                    # A single block is its own right half: its score is known.
                    asked = (size > 1).to(tl.int32)
                    tl.store(RIGHT + tl.cumsum(asked, 0) - asked, a + half, mask=size > 1)
                    tl.debug_barrier()
                    _score(
                        q, q_more, keys, RIGHT, OF_RIGHT, tl.sum(asked, 0), S, skt, K, BK, SIZE,
                        BT, MORE, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    size = tl.load(SIZES + i, mask=there, other=0)
                    asked = (size > 1).to(tl.int32)
                    left = tl.load(KNOWN + i, mask=there, other=0.0)
                    right = tl.load(
                        OF_RIGHT + tl.cumsum(asked, 0) - asked, mask=size > 1, other=0.0
                    )
                    right = tl.where(size > 1, right, left)
                x = tl.where(size > 1, _ordered(left), -2147483648)
                y = tl.where(size > 0, _ordered(right), -2147483648)
                bound = _bound(x, y, low, n)
                if not CENTER:
                    low = bound  # the n best keep their scores
                more = tl.sum((x > bound).to(tl.int32) + (y > bound).to(tl.int32), 0)
                # Of those equal to it, the earlier ones, as many as are missing.
                x_ties, y_ties = (x == bound).to(tl.int32), (y == bound).to(tl.int32)
                before = tl.cumsum(x_ties + y_ties, 0) - x_ties - y_ties
                keep_x = (x > bound) | ((x_ties > 0) & (before < n - more))
                keep_y = (y > bound) | ((y_ties > 0) & (before + x_ties < n - more))
                kept = keep_x.to(tl.int32) + keep_y.to(tl.int32)
                to = tl.cumsum(kept, 0) - kept
                tl.debug_barrier()  # what is read again need not be held meanwhile
                a = tl.load(A + i, mask=there, other=0)
                size = tl.load(SIZES + i, mask=there, other=0)
                half = size // 2
                tl.debug_barrier()
                tl.store(A + to, a, mask=keep_x)
                tl.store(SIZES + to, half, mask=keep_x)
                if not CENTER:
                    tl.store(KNOWN + to, _score_of(x), mask=keep_x)
                to += keep_x.to(tl.int32)
                tl.store(A + to, a + half, mask=keep_y)
                tl.store(SIZES + to, size - half, mask=keep_y)
                if not CENTER:
                    tl.store(KNOWN + to, _score_of(y), mask=keep_y)
                span *= 0.5
            tl.debug_barrier()


def search(
    q: Tensor, k: Tensor, n: int, rows: int, size: int, window: int, sample: tuple[int, int],
    center: bool, offset: int, N: int,
) -> Tensor:  # fmt: skip
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    begin, step = sample if rows > 1 else (0, 1)
    R, m, F = triton.cdiv(T, rows), len(range(begin, rows, step)), H // N
    out = torch.empty(B, N, R, n, dtype=torch.int32, device=q.device)
    BM, more = pieces(F * m)
    BN = max(16, triton.next_power_of_2(n))
    tasks = B * N * R
    programs = min(tasks, PROGRAMS * processors(q.device.index))
    places = torch.empty(programs, 3, n, dtype=torch.int32, device=q.device)
    with on_device(q):
        search_kernel.launch(
            (programs,), (q, k, out, places, torch.empty_like(places, dtype=torch.float32)),
            T, S, offset, window, tasks, N, G, R, n, m, *q.stride()[:3], *k.stride()[:3],
            F=F, ROWS=rows, BEGIN=begin, STEP=step, CENTER=center, K=K,
            BK=max(16, triton.next_power_of_2(K)), SIZE=size, BM=BM, MORE=more, BT=BT, BN=BN,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


PROGRAMS, BT, WARPS, STAGES = 2, 64, 4, 3


def pieces(queries: int) -> tuple[int, int]:
    """Two powers of two, at least 16 and at most 128, that hold so many: no product is wide in
    vain."""
    first = min(128, max(16, triton.next_power_of_2(queries + 1) // 2))
    rest = queries - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@lru_cache(maxsize=8)
def processors(index: int | None) -> int:
    """Multiprocessors of the GPU; 8 where the kernels are interpreted."""
    if not torch.cuda.is_available():
        return 8
    return torch.cuda.get_device_properties(index or 0).multi_processor_count
