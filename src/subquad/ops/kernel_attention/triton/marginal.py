"""Kernels of linear attention by states of blocks: write them, read them, and both backward.

    h_n = phi(k)^T v,   z_n = sum phi(k)                  over the keys of block n
    o = phi(q) S / d,   d = phi(q) . Z + eps              over the queries of block m
    dnum = do / d,      dd = -(do . o) / d
    dphi_q = dnum S^T + dd Z,   dS = phi(q)^T dnum,   dZ = phi(q)^T dd
    dphi_k = v dh^T + dz,       dv = phi(k) dh

phi is made where it is needed and never stored. Where SPLIT, a matrix ``[K,V]`` is stored as two of
bfloat16 that add up to it, ``far`` elements apart: the product with the map of blocks, whose
entries are 0 and 1, then runs on tensor cores and loses 2^-16.

Legend: BT rows of a tile, PHI the feature map: 0 softmax over a head's features, 1 elu + 1, 2 relu.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel

kernel = partial(Kernel, sizes=("T", "H", "G", "N", "size", "far"))  # none costs a compilation


@triton.jit
def _rows(X, t, there, stride, D: tl.constexpr, BD: tl.constexpr):
    """``[BT,BD]`` of X in float32, zeros outside."""
    d = tl.arange(0, BD)
    at = X + t.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _phi(x, there, PHI: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    inside = there[:, None] & (tl.arange(0, BD) < D)[None, :]
    if PHI == 0:
        x = tl.where((tl.arange(0, BD) < D)[None, :], x, float("-inf"))
        p = tl.exp(x - tl.max(x, 1)[:, None])
        f = p / tl.sum(p, 1)[:, None]
    elif PHI == 1:
        f = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    else:
        f = tl.maximum(x, 0.0)
    return tl.where(inside, f, 0.0)


@triton.jit
def _grad_phi(x, f, df, PHI: tl.constexpr):
    if PHI == 0:
        return f * (df - tl.sum(f * df, 1)[:, None])
    elif PHI == 1:
        return df * tl.where(x > 0, 1.0, f)
    else:
        return tl.where(x > 0, df, 0.0)


@triton.jit
def _matrix(
    X, at, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """float32 ``[BD,BE]`` of the matrix number ``at`` of X ``[...,D,E]``, zeros outside."""
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    place = X + at.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
    return tl.load(place, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _store_matrix(
    X, value, at, far, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    place = X + at.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
    mask = (d < D)[:, None] & (e < E)[None, :]
    if SPLIT:
        high = value.to(tl.bfloat16)
        tl.store(place, high, mask=mask)
        tl.store(place + far, (value - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(place, value, mask=mask)


@kernel
def write_states(
    K_, V_, HS, Z, T, H, G, N, size, far, skb, skt, skh, svb, svt, svh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PHI: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    K_ += b * skb + g * skh
    V_ += b * svb + g * svh
    stop = tl.minimum(T, (n + 1) * size)
    h = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    for first in range(n * size, stop, BT):
        t = first + tl.arange(0, BT)
        f = _phi(_rows(K_, t, t < stop, skt, K, BK), t < stop, PHI, K, BK)
        v = _rows(V_, t, t < stop, svt, V, BV)
        h += tl.dot(tl.trans(f), v, input_precision=PRECISION)
        z += tl.sum(f, 0)
    blocks = N * 2 if SPLIT else N
    _store_matrix(HS, h, tl.program_id(1).to(tl.int64) * blocks + n, far, K, V, BK, BV, SPLIT)
    d = tl.arange(0, BK)
    tl.store(Z + (tl.program_id(1).to(tl.int64) * N + n) * K + d, z, mask=d < K)


@kernel
def read_states(
    Q, S, Z, O, T, H, G, N, size, far, eps, sqb, sqt, sqh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, b, h = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    Q += b * sqb + h * sqh
    at = tl.program_id(1).to(tl.int64) * N + m
    stop = tl.minimum(T, (m + 1) * size)
    s = _matrix(S, at, K, V, BK, BV)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    z = tl.load(Z + at * K + d, mask=d < K, other=0.0)
    for first in range(m * size, stop, BT):
        t = first + tl.arange(0, BT)
        f = _phi(_rows(Q, t, t < stop, sqt, K, BK), t < stop, PHI, K, BK)
        o = tl.dot(f, s, input_precision=PRECISION) / (tl.sum(f * z[None, :], 1) + eps)[:, None]
        place = O + ((b * T + t) * H + h)[:, None] * V + e[None, :]
        tl.store(place, o, mask=(t < stop)[:, None] & (e < V)[None, :])


@kernel
def read_backward(
    Q, S, Z, DO, DQ, DS, DZ, T, H, G, N, size, far, eps, sqb, sqt, sqh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PHI: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, b, h = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    Q += b * sqb + h * sqh
    at = tl.program_id(1).to(tl.int64) * N + m
    stop = tl.minimum(T, (m + 1) * size)
    s = _matrix(S, at, K, V, BK, BV)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    z = tl.load(Z + at * K + d, mask=d < K, other=0.0)
    ds = tl.zeros([BK, BV], tl.float32)
    dz = tl.zeros([BK], tl.float32)
    for first in range(m * size, stop, BT):
        t = first + tl.arange(0, BT)
        there = t < stop
        x = _rows(Q, t, there, sqt, K, BK)
        f = _phi(x, there, PHI, K, BK)
        row = (b * T + t) * H + h
        do = tl.load(
            DO + row[:, None] * V + e[None, :], mask=there[:, None] & (e < V)[None, :], other=0.0
        )
        sum_ = tl.sum(f * z[None, :], 1) + eps
        o = tl.dot(f, s, input_precision=PRECISION) / sum_[:, None]
        dnum = do / sum_[:, None]
        dsum = -tl.sum(dnum * o, 1)
        ds += tl.dot(tl.trans(f), dnum, input_precision=PRECISION)
        dz += tl.sum(f * dsum[:, None], 0)
        df = tl.dot(dnum, tl.trans(s), input_precision=PRECISION) + dsum[:, None] * z[None, :]
        dx = _grad_phi(x, f, df, PHI)
        place = DQ + row[:, None] * K + d[None, :]
        tl.store(place, dx, mask=there[:, None] & (d < K)[None, :])
    heads = H // G
    blocks = N * heads * 2 if SPLIT else N * heads
    group = tl.program_id(1).to(tl.int64) // heads
    own = group * blocks + (h % heads) * N + m
    _store_matrix(DS, ds, own, far, K, V, BK, BV, SPLIT)
    tl.store(DZ + at * K + d, dz, mask=d < K)


@kernel
def write_backward(
    K_, V_, DH, DZ, DK, DV, T, H, G, N, size, far, skb, skt, skh, svb, svt, svh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PHI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, b, g = tl.program_id(0), (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    K_ += b * skb + g * skh
    V_ += b * svb + g * svh
    at = tl.program_id(1).to(tl.int64) * N + n
    stop = tl.minimum(T, (n + 1) * size)
    dh = _matrix(DH, at, K, V, BK, BV)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    dz = tl.load(DZ + at * K + d, mask=d < K, other=0.0)
    for first in range(n * size, stop, BT):
        t = first + tl.arange(0, BT)
        there = t < stop
        x = _rows(K_, t, there, skt, K, BK)
        f = _phi(x, there, PHI, K, BK)
        v = _rows(V_, t, there, svt, V, BV)
        df = tl.dot(v, tl.trans(dh), input_precision=PRECISION) + dz[None, :]
        row = (b * T + t) * G + g
        dx = _grad_phi(x, f, df, PHI)
        tl.store(DK + row[:, None] * K + d[None, :], dx, mask=there[:, None] & (d < K)[None, :])
        dv = tl.dot(f, dh, input_precision=PRECISION)
        tl.store(DV + row[:, None] * V + e[None, :], dv, mask=there[:, None] & (e < V)[None, :])
