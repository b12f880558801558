"""The forward kernel: online softmax with two accumulators.

The values' sum with weights ``p t`` cancels where t is large, so t is measured from a running
reference: each row's mean of t over the first block in which it sees a key. The output does not
depend on it.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel

# Compiled once for all of their values.
SIZES = ("T", "S", "H", "G", "plane")
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_at(X, at, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[rows,BLOCK]``: the rows that start at the elements ``at`` of X, 0 where not ``there``."""
    d = tl.arange(0, BLOCK)
    keep = there[:, None] if WIDTH == BLOCK else there[:, None] & (d < WIDTH)[None, :]
    return tl.load(X + at[:, None] + d[None, :], mask=keep, other=0.0)


@triton.jit
def span_of(LO, HI, at, there, S):
    """The keys that each row sees, ``lo <= j < hi``, none where not ``there``."""
    lo = tl.load(LO + at, mask=there, other=0)
    hi = tl.load(HI + at, mask=there, other=0)
    first = tl.min(tl.where(hi > lo, lo, S), 0)
    return lo, hi, first, tl.max(tl.where(hi > lo, hi, 0), 0)


@partial(Kernel, sizes=(*SIZES, "parts"), length=2)
def probe_forward(
    Q, K_, V_, R, LO, HI, O, MEAN, LSE, DRIFT, TOP,
    scale, T, S, H, G, plane, parts,
    sqb, sqt, sqh, skb, sks, skh, svb, svs, svh, srb, srt, srh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SAVES: tl.constexpr, PEAK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. ``scale`` is in base 2; LO and HI step by ``plane`` from
    row to row; O, MEAN, LSE, DRIFT and TOP are contiguous. These and the planes have ``parts`` rows
    for each row of the tensors read, a part of its keys each."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest spans first
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    g = h // (H // G)
    m = block * BM + tl.arange(0, BM)
    exists = m < T
    lo, hi, first, last = span_of(LO, HI, b * plane + m, exists, S)
    own = b // parts
    q = rows_at(Q + own * sqb + h * sqh, m.to(tl.int64) * sqt, exists, K, BK)
    r = rows_at(R + own * srb + h * srh, m.to(tl.int64) * srt, exists, K, BK)
    K_ += own * skb + g * skh
    V_ += own * svb + g * svh

    plain = tl.zeros([BM, BV], tl.float32)
    tilted = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    place = tl.zeros([BM], tl.int32)
    total = tl.zeros([BM], tl.float32)
    tilt = tl.zeros([BM], tl.float32)
    centre = tl.zeros([BM], tl.float32)
    for start in range(first // BN * BN, last, BN):
        n = start + tl.arange(0, BN)
        there = n < S
        k = tl.trans(rows_at(K_, n.to(tl.int64) * sks, there, K, BK))
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        t = tl.dot(r, k, input_precision=PRECISION)
        keep = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None])
        s = tl.where(keep, s, float("-inf"))
        if PEAK:
            most, where = tl.max(s, 1, return_indices=True)
            place = tl.where(most > top, start + where, place)
            new = tl.maximum(top, most)
        else:
            new = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
        safe = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        fresh = tl.sum(w, 1)
        mid = tl.sum(w * t, 1) / tl.where(fresh > 0, fresh, 1.0)
        centre = tl.where(total > 0, centre, mid)
        wu = w * (t - centre[:, None])
        total = total * shrink + fresh
        tilt = tilt * shrink + tl.sum(wu, 1)
        v = rows_at(V_, n.to(tl.int64) * svs, there, V, BV)
        plain = tl.dot(w.to(v.dtype), v, plain * shrink[:, None], input_precision=PRECISION)
        tilted = tl.dot(wu.to(v.dtype), v, tilted * shrink[:, None], input_precision=PRECISION)
        top = new

    seen = total > 0
    some = tl.where(seen, total, 1.0)
    mean = plain / some[:, None]
    drift = tilt / some
    o = mean * (1.0 + drift)[:, None] - tilted / some[:, None]
    at = (b * T + m) * H + h
    d = tl.arange(0, BV)
    to = at[:, None] * V + d[None, :]
    keep = exists[:, None] & (d < V)[None, :]
    tl.store(O + to, o.to(O.dtype.element_ty), mask=keep)
    if SAVES:
        tl.store(MEAN + to, mean.to(MEAN.dtype.element_ty), mask=keep)
    lse = tl.where(seen, (top + tl.log2(some)) * LN2, float("-inf"))
    tl.store(LSE + at, lse, mask=exists)
    tl.store(DRIFT + at, centre + drift, mask=exists)
    if PEAK:
        tl.store(TOP + at, place, mask=exists)
