"""Attention of rows of queries over blocks of keys found for them, a window and sinks: one softmax.

Legend: B batch, T queries (the last of S keys), H query heads, G key heads, K and V head dims; N
heads that have lists, H/N query heads each; R rows of queries, n blocks a list.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.ops.attention.triton.walk import rows_of
from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(
    acc, top, total, q, K_, V_, key, there, low, high, stride_k, stride_v, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The listed keys added to the running softmax; MASKED, those from ``low`` to ``high``."""
    at = key.to(tl.int64)
    k = rows_of(K_, at, there, stride_k, K, BK, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        keep = there[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] <= high[:, None])
        s = tl.where(keep, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    safe = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    w = tl.exp2(s * scale - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(w, 1)
    v = rows_of(V_, at, there, stride_v, V, BV, MASKED)
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total


@partial(Kernel, sizes=("T", "S", "offset", "window", "sinks", "H", "G", "N", "R", "n"))
def found_kernel(
    Q, K_, V_, FOUND, O, scale, T, S, offset, window, sinks, H, G, N, R, n,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, HG: tl.constexpr, BM: tl.constexpr,
    SIZE: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BQ queries of a row, of HG heads that share its list."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest lists first
    b = tl.program_id(1) // (H // HG)
    h = tl.program_id(1) % (H // HG) * HG
    x = tl.arange(0, BM)
    first = part * BQ
    token = first + x // HG
    exists = (x < BQ * HG) & (token < T)
    q_at = token.to(tl.int64) * sqt + x % HG * sqh
    q = rows_of(Q + b.to(tl.int64) * sqb + h * sqh, q_at, exists, 1, K, BK, True)
    g = h // (H // G)
    K_ += b.to(tl.int64) * skb + g * skh
    V_ += b.to(tl.int64) * svb + g * svh
    FOUND += ((b * N + h // (H // N)).to(tl.int64) * R + first // ROWS) * n
    p = token + offset
    near = first + offset - window + 1  # where the window of the first query begins
    last = tl.minimum(first + BQ + offset, S)

    # Lists rise: first blocks that reach into the sinks, then those that all queries see, then
    # those that are in the windows of some.
    count, begun, clear = 0, 0, 0
    for y in range(0, n, BL):
        own = tl.load(FOUND + y + tl.arange(0, BL), mask=y + tl.arange(0, BL) < n, other=-1)
        count += tl.sum((own >= 0).to(tl.int32), 0)
        begun += tl.sum(((own >= 0) & (own * SIZE < sinks)).to(tl.int32), 0)
        clear += tl.sum(((own >= 0) & (own * SIZE + SIZE <= near)).to(tl.int32), 0)
    whole = tl.maximum(clear - begun, 0) * SIZE // BN

    acc = tl.zeros([BM, BV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    scale = tl.maximum(scale, 1e-30) * LOG2E  # 0 times -inf would be NaN
    i = tl.arange(0, BN)
    key = tl.load(FOUND + begun + i // SIZE, mask=i < whole * BN, other=0) * SIZE + i % SIZE
    for step in range(0, whole):
        # A step ahead, so that the copy of the next keys need not wait for the list.
        at = (step + 1) * BN + i
        block = tl.load(FOUND + begun + at // SIZE, mask=at < whole * BN, other=0)
        after = block * SIZE + at % SIZE
        acc, top, total = _step(
            acc, top, total, q, K_, V_, key, True, 0, 0, skt, svt, scale,
            K, V, BK, BV, False, PRECISION,
        )  # fmt: skip
        key = after

    # What is left of the list, a block that the sinks end in, the windows, the sinks.
    rest = (count - begun) * SIZE
    done = whole * BN
    far = tl.cdiv(rest - done, BN) * BN
    cut = far + tl.where(sinks % SIZE > 0, tl.cdiv(begun * SIZE, BN), 0) * BN
    near = tl.maximum(near, sinks)
    local = cut + tl.cdiv(tl.maximum(last - near, 0), BN) * BN
    for start in range(0, local + tl.minimum(sinks, last), BN):
        at = start + i
        listed = tl.where(at < far, done + at, at - far)
        there = (at < cut) & (listed < tl.where(at < far, rest, begun * SIZE))
        block = tl.load(FOUND + listed // SIZE + tl.where(at < far, begun, 0), mask=there, other=0)
        key = tl.where(at < local, near + at - cut, at - local)
        key = tl.where(at < cut, block * SIZE + listed % SIZE, key)
        there = (there | (at >= cut)) & (key < last)
        # From which of the sinks' end, the window's begin and its end to which: all of one step.
        low = tl.where(start < local, sinks, 0)
        low = tl.maximum(low, tl.where((start >= cut) & (start < local), p - window + 1, 0))
        high = tl.minimum(
            tl.where(start < cut, p - window, p), tl.where(start < local, S, sinks - 1)
        )
        acc, top, total = _step(
            acc, top, total, q, K_, V_, key, there, low, high, skt, svt, scale,
            K, V, BK, BV, True, PRECISION,
        )  # fmt: skip

    at = ((b.to(tl.int64) * T + token) * H + h + x % HG)[:, None] * V
    v = tl.arange(0, BV)
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(O + at + v[None, :], o.to(O.dtype.element_ty), mask=exists[:, None] & (v < V)[None, :])


def found_attention(
    q: Tensor, k: Tensor, v: Tensor, found: Tensor, *,
    rows: int, size: int, window: int, sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    """Each query over the blocks of ``size`` keys found for its row, the last ``window`` keys and
    the first ``sinks``, none after it and none twice.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``.
        found: int ``[B,N,R,n]``, rising, -1 at the end; a row for every ``rows`` queries.

    Returns:
        ``o [B,T,H,V]``. Not differentiable.
    """
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if scale < 0:
        q, scale = -q, -scale
    N, R, n = found.shape[1:]
    o = torch.empty(B, T, H, V, dtype=v.dtype, device=q.device)
    most = 128 if q.dtype.itemsize == 2 else 64
    BQ = next(i for i in range(min(rows, most), 0, -1) if rows % i == 0)
    HG = together(H // N, BQ, most)
    BM = max(16, next_power_of_2(BQ * HG))
    BN, options = config(BM, max(K, V), q.dtype.itemsize)
    with on_device(q):
        found_kernel.launch(
            (cdiv(T, BQ), B * (H // HG)), (q, k, v, found.contiguous(), o),
            scale, T, S, S - T, window, sinks, H, G, N, R, n,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            K=K, V=V, BK=max(16, next_power_of_2(K)), BV=max(16, next_power_of_2(V)),
            ROWS=rows, BQ=BQ, HG=HG, BM=BM, SIZE=size, BN=BN,
            BL=min(2048, max(16, next_power_of_2(n))),
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            **options,
        )  # fmt: skip
    return o


def together(heads: int, BQ: int, most: int) -> int:
    """How many of the heads that share a list a program takes."""
    return next(i for i in range(heads, 0, -1) if heads % i == 0 and (i * BQ <= most or i == 1))


def config(BM: int, width: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """Keys of a step and launch options."""
    if BM == 32:  # no sum goes from warp to warp; three programs a multiprocessor
        return 64 if itemsize == 2 else 32, {"num_warps": 2, "num_stages": 2}
    warps, stages = 8 if BM == 128 else 4, 3 if width * itemsize <= 256 else 2
    return 64 if itemsize == 2 else 32, {"num_warps": warps, "num_stages": stages}
