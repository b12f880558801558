"""Kernels of the norms over the last axis, gated or not.

    r = (inv sum u^2 + eps)^-1/2,   y = u r w act(gate)      (u = x)
    gate first:                     y = u r w                (u = x act(gate))

``inv`` is 1 over the width (a mean), or 1 (a sum). Legend: tokens, G groups of W channels, each
normed by itself, BW >= W a power of two, BR tokens of a tile.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel
from subquad.ops.layer.triton.activation import activate, with_slope


@triton.jit
def _tile(X, t, d, stride, tokens, there):
    """``[BR,BW]`` of X in float32."""
    at = X + t.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(t < tokens)[:, None] & there[None, :], other=0.0).to(tl.float32)


@partial(Kernel, sizes=["tokens"])
def norm_forward(
    X, GATE, WEIGHT, Y, tokens, inv, eps, W, G, sx, sg,
    ACT: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BW)
    there, d = c < W, tl.program_id(1) * W + c
    t = tl.program_id(0) * BR + tl.arange(0, BR)
    x = _tile(X, t, d, sx, tokens, there)
    if GATE is not None:
        gate = activate(_tile(GATE, t, d, sg, tokens, there), ACT)
        if FIRST:
            x *= gate
    y = x * tl.rsqrt(tl.sum(x * x, 1) * inv + eps)[:, None]
    if WEIGHT is not None:
        y *= tl.load(WEIGHT + d, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATE is not None and not FIRST:
        y *= gate
    at = Y + t.to(tl.int64)[:, None] * (G * W) + d[None, :]
    tl.store(at, y.to(Y.dtype.element_ty), mask=(t < tokens)[:, None] & there[None, :])


@partial(Kernel, sizes=["tokens"])
def norm_backward(
    DY, X, GATE, WEIGHT, DX, DGATE, PARTS, tokens, inv, eps, W, G, sy, sx, sg,
    ACT: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """PARTS ``[programs,G W]``: what the tiles of each program add to dw."""
    c = tl.arange(0, BW)
    there, d = c < W, tl.program_id(1) * W + c
    w = tl.full([BW], 1.0, tl.float32)
    if WEIGHT is not None:
        w = tl.load(WEIGHT + d, mask=there, other=0.0).to(tl.float32)
    dw = tl.zeros([BR, BW], tl.float32)
    for start in range(tl.program_id(0) * BR, tokens, tl.num_programs(0) * BR):
        t = start + tl.arange(0, BR)
        x = _tile(X, t, d, sx, tokens, there)
        dy = _tile(DY, t, d, sy, tokens, there)
        u = x
        if GATE is not None:
            gate, slope = with_slope(_tile(GATE, t, d, sg, tokens, there), ACT)
            if FIRST:
                u = x * gate
        r = tl.rsqrt(tl.sum(u * u, 1) * inv + eps)[:, None]
        n = u * r
        if GATE is not None and not FIRST:
            dgate = dy * n * w[None, :] * slope
            dy *= gate
        dw += dy * n
        dy *= w[None, :]
        du = r * (dy - n * (tl.sum(dy * n, 1) * inv)[:, None])
        if GATE is not None and FIRST:
            dgate = du * x * slope
            du *= gate
        at = t.to(tl.int64)[:, None] * (G * W) + d[None, :]
        on = (t < tokens)[:, None] & there[None, :]
        tl.store(DX + at, du.to(DX.dtype.element_ty), mask=on)
        if GATE is not None:
            tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), mask=on)
    if WEIGHT is not None:
        at = PARTS + tl.program_id(0).to(tl.int64) * (G * W) + d
        tl.store(at, tl.sum(dw, 0), mask=there)
