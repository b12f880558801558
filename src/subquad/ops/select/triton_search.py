"""The search of :mod:`subquad.ops.select.search` as one kernel: a program halves and chooses for a
row until its segments are single blocks; nothing but what it found leaves the multiprocessor.

Legend: B batch, T queries, S keys, N heads that search (F query heads each), G key heads, K head
dim; R rows of ROWS queries, of which m a head are asked; n blocks kept.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2, processors

SCORED = 1 << 28  # scores of first rounds held at once


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
def _searched(r, offset, window, S, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """How many blocks lie before the window of row r; one cut short sees as far as a whole one."""
    end = tl.minimum(tl.maximum(offset + (r + 1) * ROWS - window, 0), S)
    return (end + SIZE - 1) // SIZE


@triton.jit
def _of_heads(k, q, C: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """``[BT,C]``: each head's largest product with the keys, ``q [BK,C * queries]``."""
    s = tl.dot(k, q, input_precision=PRECISION)
    return tl.max(tl.reshape(s, [BT, C, s.shape[1] // C]), 2)


@partial(Kernel, sizes=("T", "S", "offset", "window", "begin", "N", "G", "R", "n", "m", "level"))
def first_kernel(
    Q, KEYS, OUT, T, S, offset, window, begin, N, G, R, n, m, level,
    sqb, sqt, sqh, skb, skt, skh,
    ROWS: tl.constexpr, BEGIN: tl.constexpr, STEP: tl.constexpr, CENTER: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr,
    C: tl.constexpr, MORE: tl.constexpr, ROUNDS: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What ROUNDS first rounds may score, the same for all heads of a group, so that these keys are
    read once: OUT ``[2 * ROUNDS,B,N,R,n]`` for R rows from ``begin`` on, of a segment the left and
    the right half, then their right halves. A program takes C and MORE heads of one row, BM queries
    each."""
    r = begin + tl.num_programs(0) - 1 - tl.program_id(0)
    share = N // G
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    h = tl.program_id(2) * (C + MORE)
    blocks = _searched(r, offset, window, S, ROWS, SIZE)
    if blocks > n:
        span = blocks.to(tl.float64) / n
        own = Q + b.to(tl.int64) * sqb + g * share * sqh
        x = tl.arange(0, C * BM)
        of = tl.minimum(h + x // BM, share - 1) * m + tl.minimum(x % BM, m - 1)
        q = _asked(own, of, r, T, sqt, sqh, m, ROWS, BEGIN, STEP, K, BK)
        q_more = q
        if MORE:
            x_more = tl.arange(0, MORE * BM)
            of_more = tl.minimum(h + C + x_more // BM, share - 1) * m
            of_more += tl.minimum(x_more % BM, m - 1)
            q_more = _asked(own, of_more, r, T, sqt, sqh, m, ROWS, BEGIN, STEP, K, BK)
        KEYS += b.to(tl.int64) * skb + g * skh
        OUT += ((b * N + g * share + h).to(tl.int64) * R + r - begin) * n
        away = R.to(tl.int64) * n
        d = tl.arange(0, BK)
        c = tl.arange(0, C)
        best = tl.full([BT, C], float("-inf"), tl.float32)
        if MORE:
            c_more = C + tl.arange(0, MORE)
            best_more = tl.full([BT, MORE], float("-inf"), tl.float32)
        scored = tl.where(span > 2, 2 * ROUNDS, 2)
        for step in range(0, tl.cdiv(n, BT) * scored * SIZE):
            i = step // (scored * SIZE) * BT + tl.arange(0, BT)
            kind, place = step // SIZE % scored, step % SIZE
            a = (span * i).to(tl.int32)
            size = (span * (i + 1)).to(tl.int32) - a
            half = size // 2
            block = a + tl.where(kind % 2 == 1, half, 0)
            if CENTER or ROUNDS == 2:
                inner = tl.where(kind % 2 == 1, size - half, half) // 2
                block += tl.where((kind >= 2) | CENTER, inner, 0)
            key = tl.minimum(block * SIZE + place, S - 1).to(tl.int64)
            at = KEYS + key[:, None] * skt + d[None, :]
            k = tl.load(at) if K == BK else tl.load(at, mask=(d < K)[None, :], other=0.0)
            s = _of_heads(k, q, C, BT, PRECISION)
            best = tl.where(place == 0, s, tl.maximum(best, s))
            to = OUT + kind * level + i[:, None]
            done = (i < n)[:, None] & (place == SIZE - 1)
            tl.store(to + c[None, :] * away, best, mask=done & (h + c < share)[None, :])
            if MORE:
                s_more = _of_heads(k, q_more, MORE, BT, PRECISION)
                best_more = tl.where(place == 0, s_more, tl.maximum(best_more, s_more))
                tl.store(
                    to + c_more[None, :] * away, best_more,
                    mask=done & (h + c_more < share)[None, :],
                )  # fmt: skip


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


@triton.jit
def _keep(left, right, low, A, SIZES, KNOWN, i, n):
    """The n best halves, by their scores, in place of n segments: the bound that they reach, which
    is at least ``low``, and which left and right halves went where."""
    there = i < n
    size = tl.load(SIZES + i, mask=there, other=0)
    x = tl.where(size > 1, _ordered(left), -2147483648)
    y = tl.where(size > 0, _ordered(right), -2147483648)
    bound = _bound(x, y, low, n)
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
    tl.store(KNOWN + to, _score_of(x), mask=keep_x)
    to += keep_x.to(tl.int32)
    tl.store(A + to, a + half, mask=keep_y)
    tl.store(SIZES + to, size - half, mask=keep_y)
    tl.store(KNOWN + to, _score_of(y), mask=keep_y)
    return bound, keep_x, to - keep_x.to(tl.int32), keep_y, to


NUMBERS = ("T", "S", "offset", "window", "begin", "many", "tasks", "N", "G", "R", "n", "m", "level")


@partial(Kernel, sizes=NUMBERS)
def search_kernel(
    Q, KEYS, FIRST, OUT, PLACES, SCORES, T, S, offset, window, begin, many, tasks, N, G, R, n, m,
    level, sqb, sqt, sqh, skb, skt, skh,
    F: tl.constexpr, ROWS: tl.constexpr, BEGIN: tl.constexpr, STEP: tl.constexpr,
    CENTER: tl.constexpr, ROUNDS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    SIZE: tl.constexpr, BM: tl.constexpr, MORE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row after row, the long ones first. A program's own PLACES ``[3,n]`` and SCORES ``[2,n]``
    hold its segments' sizes, the halves to be scored and scores."""
    i = tl.arange(0, BN)
    there = i < n
    pid = tl.program_id(0).to(tl.int64)
    SIZES = PLACES + pid * 3 * n
    LEFT = SIZES + n
    RIGHT = LEFT + n
    KNOWN = SCORES + pid * 2 * n
    FRESH = KNOWN + n
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        plane, ahead = task // many, many - 1 - task % many
        r = begin + ahead
        b, h = plane // N, plane % N
        A = OUT + (plane.to(tl.int64) * R + r) * n  # where its segments begin
        blocks = _searched(r, offset, window, S, ROWS, SIZE)
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
            if ROUNDS:
                given = FIRST + (plane.to(tl.int64) * many + ahead) * n + i
                tl.store(KNOWN + i, tl.load(given, mask=there), mask=there)
                tl.store(FRESH + i, tl.load(given + level, mask=there), mask=there)
            elif not CENTER:
                # A left half has the score of the whole.
                _score(q, q_more, keys, A, KNOWN, n, S, skt, K, BK, SIZE, BT, MORE, PRECISION)
            low = tl.full([], -2147483647, tl.int32)
            turn = 0
            while span > 1:
                tl.debug_barrier()
                if turn >= ROUNDS:
                    a = tl.load(A + i, mask=there, other=0)
                    size = tl.load(SIZES + i, mask=there, other=0)
                    half = size // 2
                    count = n
                    if CENTER:
                        tl.store(LEFT + i, a + half // 2, mask=there)
                        tl.store(RIGHT + i, a + half + (size - half) // 2, mask=there)
                        tl.debug_barrier()
                        _score(
                            q, q_more, keys, LEFT, KNOWN, n, S, skt, K, BK, SIZE, BT, MORE,
                            PRECISION,
                        )  # fmt: skip
                    else:
                        # A single block is its own right half: its score is known.
                        parted = (size > 1).to(tl.int32)
                        tl.store(RIGHT + tl.cumsum(parted, 0) - 1, a + half, mask=size > 1)
                        count = tl.sum(parted, 0)
                        tl.debug_barrier()
                    _score(
                        q, q_more, keys, RIGHT, FRESH, count, S, skt, K, BK, SIZE, BT, MORE,
                        PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                at = FRESH + i
                if CENTER:
                    low = tl.full([], -2147483647, tl.int32)
                else:
                    parted = tl.load(SIZES + i, mask=there, other=0) > 1
                    if turn >= ROUNDS:
                        at = FRESH + tl.cumsum(parted.to(tl.int32), 0) - 1
                    at = tl.where(parted, at, KNOWN + i)
                left = tl.load(KNOWN + i, mask=there, other=0.0)
                right = tl.load(at, mask=there, other=0.0)
                low, lefts, to, rights, beyond = _keep(left, right, low, A, SIZES, KNOWN, i, n)
                if ROUNDS == 2:  # noqa: SIM102 (only one of the two is known to the compiler)
                    if turn == 0 and span > 2:
                        of = tl.load(given + 2 * level, mask=lefts, other=0.0)
                        tl.store(FRESH + to, of, mask=lefts)
                        of = tl.load(given + 3 * level, mask=rights, other=0.0)
                        tl.store(FRESH + beyond, of, mask=rights)
                span *= 0.5
                turn += 1
            tl.debug_barrier()


def search(
    q: Tensor, k: Tensor, n: int, rows: int, size: int, window: int, sample: tuple[int, int],
    center: bool, offset: int, N: int,
) -> Tensor:  # fmt: skip
    """As :func:`subquad.ops.select.search.halving` says; n blocks of ``size`` keys."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    begin, step = sample if rows > 1 else (0, 1)
    R, m, F = cdiv(T, rows), len(range(begin, rows, step)), H // N
    BM, more = pieces(F * m)
    C, rest = heads(N // G, m)
    BT, programs, options = config(F * m, n, q.element_size())
    rounds, BT_first, first_options = first_config(N // G if T > 1 else 1, q.element_size())
    rounds = min(rounds, 1) if center else rounds
    common = {
        "ROWS": rows, "BEGIN": begin, "STEP": step, "CENTER": center, "K": K,
        "BK": max(16, next_power_of_2(K)), "SIZE": size, "ROUNDS": rounds,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    strides = *q.stride()[:3], *k.stride()[:3]
    out = torch.empty(B, N, R, n, dtype=torch.int32, device=q.device)
    programs = min(B * N * R, programs * processors(q.device))
    places = torch.empty(programs, 3, n, dtype=torch.int32, device=q.device)
    scores = torch.empty(programs, 2, n, dtype=torch.float32, device=q.device)
    most = max(1, SCORED // (2 * rounds * B * N * n)) if rounds else R
    with on_device(q):
        for first in range(0, R, most):
            many = min(most, R - first)
            level = B * N * many * n
            known = torch.empty(2 * rounds, level, dtype=torch.float32, device=q.device)
            if rounds:
                first_kernel.launch(
                    (many, B * G, cdiv(N // G, C + rest)), (q, k, known),
                    T, S, offset, window, first, N, G, many, n, m, level, *strides, **common,
                    BM=max(16 // C, next_power_of_2(m)), C=C, MORE=rest, BT=BT_first,
                    **first_options,
                )  # fmt: skip
            search_kernel.launch(
                (min(programs, B * N * many),), (q, k, known, out, places, scores),
                T, S, offset, window, first, many, B * N * many, N, G, R, n, m, level, *strides,
                **common, F=F, BM=BM, MORE=more, BT=BT, BN=max(16, next_power_of_2(n)),
                **options,
            )  # fmt: skip
    return out


def config(queries: int, n: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """Keys of a step, programs of a multiprocessor and launch options of the search: the fastest on
    an H100 in bfloat16, with 16 to 192 queries and n of 1,632 and 3,264."""
    if n <= 2048 or (n <= 4096 and 16 < queries <= 128):
        return 64, 2, {"num_warps": 4, "num_stages": 3}
    if itemsize > 2 or n > 4096 or queries > 128:
        return 128 // itemsize * 2, 1, {"num_warps": 8, "num_stages": 3}
    return 128, 2, {"num_warps": 8, "num_stages": 3, "maxnreg": 128}


def first_config(share: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """For how many rounds ``share`` heads score what any may need; keys of a step, options."""
    return 0 if share == 1 else 2, 64, {"num_warps": 4, "num_stages": 3 if itemsize == 2 else 2}


def pieces(queries: int) -> tuple[int, int]:
    """Two powers of two, at least 16 and at most 128, that hold so many: no product is wide in
    vain."""
    first = min(128, max(16, next_power_of_2(queries + 1) // 2))
    rest = queries - first
    return first, max(16, next_power_of_2(rest)) if rest > 0 else 0


def heads(share: int, m: int) -> tuple[int, int]:
    """Two powers of two of a group's heads, of up to 128 queries each."""
    C = min(max(1, 128 // next_power_of_2(m)), next_power_of_2(share + 1) // 2)
    rest = min(share - C, C)
    return C, next_power_of_2(rest) if rest > 0 else 0
