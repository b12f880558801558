"""Kernels of gates that no norm goes with: a gated product, and the decay by softplus."""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel
from subquad.ops.layer.triton.activation import activate, with_slope


@Kernel
def gated_forward(X, GATE, Y, n, ACT: tl.constexpr, BN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * activate(gate, ACT)).to(Y.dtype.element_ty), mask=at < n)


@Kernel
def gated_backward(DY, X, GATE, DX, DGATE, n, ACT: tl.constexpr, BN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=at < n, other=0.0).to(tl.float32)
    gate, slope = with_slope(tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32), ACT)
    tl.store(DX + at, (dy * gate).to(DX.dtype.element_ty), mask=at < n)
    tl.store(DGATE + at, (dy * x * slope).to(DGATE.dtype.element_ty), mask=at < n)


@triton.jit
def _softplus(z):
    """log(1 + e^z), and its slope."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    # The instruction for log2 is off by 2^-22 near 1, where a series does better.
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6))))))
    log = tl.where(e < 1 / 16, series, tl.log2(1 + e) * 0.6931471805599453)
    return tl.maximum(z, 0.0) + log, tl.where(z >= 0, 1.0, e) / (1 + e)


@partial(Kernel, sizes=["tokens"])
def decay_forward(X, A_LOG, DT_BIAS, Y, tokens, D, K, sx, BR: tl.constexpr, BD: tl.constexpr):
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    t = tl.program_id(0) * BR + tl.arange(0, BR)
    on = (t < tokens)[:, None] & (d < D)[None, :]
    a = tl.exp(tl.load(A_LOG + d // K, mask=d < D, other=0.0).to(tl.float32))
    bias = tl.load(DT_BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(X + t.to(tl.int64)[:, None] * sx + d[None, :], mask=on, other=0.0)
    step, _ = _softplus(x.to(tl.float32) + bias[None, :])
    tl.store(Y + t.to(tl.int64)[:, None] * D + d[None, :], -a[None, :] * step, mask=on)


@partial(Kernel, sizes=["tokens"])
def decay_backward(
    DY, X, A_LOG, DT_BIAS, DX, DA, DB, tokens, D, K, sy, sx, BR: tl.constexpr, BD: tl.constexpr
):
    """DA, DB ``[programs,D]``: what the tiles of each program add to the gradients of A_log, before
    the sum over a head's channels, and of dt_bias."""
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    a = tl.exp(tl.load(A_LOG + d // K, mask=d < D, other=0.0).to(tl.float32))
    bias = tl.load(DT_BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    da = tl.zeros([BR, BD], tl.float32)
    db = tl.zeros([BR, BD], tl.float32)
    for start in range(tl.program_id(0) * BR, tokens, tl.num_programs(0) * BR):
        t = start + tl.arange(0, BR)
        on = (t < tokens)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None]
        x = tl.load(X + at * sx + d[None, :], mask=on, other=0.0).to(tl.float32)
        dy = tl.load(DY + at * sy + d[None, :], mask=on, other=0.0).to(tl.float32)
        dy *= -a[None, :]
        step, slope = _softplus(x + bias[None, :])
        da += dy * step
        dx = dy * slope
        db += dx
        tl.store(DX + at * D + d[None, :], dx.to(DX.dtype.element_ty), mask=on)
    at = tl.program_id(0).to(tl.int64) * D + d
    tl.store(DA + at, tl.sum(da, 0), mask=d < D)
    tl.store(DB + at, tl.sum(db, 0), mask=d < D)
