"""Blocks by their means: means, products of means, and the best blocks of each row.

Legend: B batch, H query heads, G key heads, K head dim; R rows, each a block of queries; n blocks
of keys.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel, on_device
from subquad.ops.sizes import cdiv, next_power_of_2


@partial(Kernel, sizes=("T", "H", "lead", "size"))
def mean_kernel(
    X, WANTED, OUT, T, H, lead, size, sxb, sxt, sxh,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """OUT ``[B,n,H,K]``: a block's sum over its size, or COUNTED over the tokens that it has; token
    0 is at place ``lead`` of the first. Of heads that are not
    WANTED (int8 ``[B,H]``, 0 or 1) nothing is read."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    d = tl.arange(0, BK)
    X += b.to(tl.int64) * sxb + h * sxh
    total = tl.zeros([BK], tl.float32)
    end = size
    if WANTED is not None:
        end = size * tl.load(WANTED + tl.program_id(1)).to(tl.int32)
    for i in range(0, end, BT):
        place = i + tl.arange(0, BT)
        t = tl.program_id(0) * size - lead + place
        there = ((place < size) & (t >= 0) & (t < T))[:, None] & (d < K)[None, :]
        x = tl.load(X + t.to(tl.int64)[:, None] * sxt + d[None, :], mask=there, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    count = size
    if COUNTED:
        first = tl.program_id(0) * size - lead
        count = tl.minimum(first + size, T) - tl.maximum(first, 0)
    to = ((b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * H + h) * K
    tl.store(OUT + to + d, (total / count).to(OUT.dtype.element_ty), mask=d < K)


@partial(Kernel, sizes=("R", "n", "first", "H", "G"))
def product_kernel(
    Q, X, OUT, R, n, first, H, G, sqb, sqr, sqh, sxb, sxn, sxg,
    K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT ``[B,H,R,n]``; tiles after all of their rows stay unwritten."""
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    if tl.program_id(0) * BN < first + tl.program_id(1) * BR + BR:
        q_at = Q + b.to(tl.int64) * sqb + h * sqh + r[:, None] * sqr + d[None, :]
        q = tl.load(q_at, mask=(r < R)[:, None] & (d < K)[None, :], other=0.0)
        x_at = X + b.to(tl.int64) * sxb + h // (H // G) * sxg + c[None, :] * sxn + d[:, None]
        x = tl.load(x_at, mask=(c < n)[None, :] & (d < K)[:, None], other=0.0)
        s = tl.dot(q, x, input_precision=PRECISION)
        to = (tl.program_id(2).to(tl.int64) * R + r)[:, None] * n + c[None, :]
        tl.store(OUT + to, s, mask=(r < R)[:, None] & (c < n)[None, :])


@partial(Kernel, sizes=("R", "n", "k", "rows", "size", "sinks", "local", "offset"))
def top_kernel(
    SCORES, OUT, R, n, k, rows, size, sinks, local, offset, CAUSAL: tl.constexpr, BN: tl.constexpr
):
    """The k best blocks of one row, rising, then -1."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    diagonal = ((tl.program_id(0) % R + 1) * rows - 1 + offset) // size
    there = i < n
    if CAUSAL:
        there = there & (i <= diagonal)
    score = tl.load(SCORES + row * n + i, mask=there, other=0.0).to(tl.float32)
    forced = (i < sinks) | ((i <= diagonal) & (i > diagonal - local))
    score = tl.where(forced, float("inf"), score)
    there = there & (score > float("-inf"))
    x = score.to(tl.int32, bitcast=True)
    x = tl.where(there, x ^ ((x >> 31) & 0x7FFFFFFF), -2147483648)  # in the order of the scores
    found = tl.minimum(tl.sum(there.to(tl.int32), 0), k)
    # The largest bound that as many reach, or any that so many do exactly. A round keeps a quarter
    # of what it may be, and its three counts of up to 2^14 are one sum.
    low = tl.min(tl.where(there, x, 2147483647), 0).to(tl.int64)
    high = tl.max(x, 0).to(tl.int64)
    high = tl.where(found < k, low, high)
    while low < high:
        a = low + (high - low + 3) // 4
        b = low + (2 * (high - low) + 3) // 4
        c = low + (3 * (high - low) + 3) // 4
        reach = (x >= a.to(tl.int32)).to(tl.int64)
        reach += (x >= b.to(tl.int32)).to(tl.int64) << 20
        reach += (x >= c.to(tl.int32)).to(tl.int64) << 40
        counts = tl.sum(reach, 0)
        of_a, of_b, of_c = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
        in_a, in_b, in_c = of_a >= found, of_b >= found, of_c >= found
        low = tl.where(in_c, c, tl.where(in_b, b, tl.where(in_a, a, low)))
        high = tl.where(in_c, high, tl.where(in_b, c - 1, tl.where(in_a, b - 1, a - 1)))
        exact = (of_a == found) | (of_b == found) | (of_c == found)
        high = tl.where(exact, low, high)
    bound = low.to(tl.int32)
    # Of those equal to it the earlier ones, as many as are missing.
    more, ties = (there & (x > bound)).to(tl.int32), (there & (x == bound)).to(tl.int32)
    missing = found - tl.sum(more, 0)
    before = tl.cumsum(ties, 0) - ties
    keep = (more > 0) | ((ties > 0) & (before < missing))
    kept = keep.to(tl.int32)
    OUT += row * k
    tl.store(OUT + tl.cumsum(kept, 0) - kept, i, mask=keep)
    for start in range(0, k, BN):
        tl.store(OUT + start + i, -1, mask=(start + i >= found) & (start + i < k))


def means(
    x: Tensor, size: int, lead: int, counted: bool = False, wanted: Tensor | None = None
) -> Tensor:
    """As :func:`subquad.ops.select.pool.means`; ``counted``, float32 over the tokens that there are
    (of the heads ``wanted``, int8 ``[B,H]``; others' are not defined)."""
    B, T, H, K = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    n = cdiv(lead + T, size)
    dtype = torch.float32 if counted else x.dtype
    out = torch.empty(B, n, H, K, dtype=dtype, device=x.device)
    BK = next_power_of_2(K)
    BT = min(next_power_of_2(size), max(1, 16384 // BK))
    with on_device(x):
        mean_kernel.launch(
            (n, B * H), (x, wanted, out), T, H, lead, size, *x.stride()[:3],
            K=K, BK=BK, BT=BT, COUNTED=counted, num_warps=4 if BT * BK >= 4096 else 1,
        )  # fmt: skip
    return out


def products(queries: Tensor, means: Tensor, first: int) -> Tensor:
    """As :func:`subquad.ops.select.score.products`."""
    (B, R, H, K), (n, G) = queries.shape, means.shape[1:3]
    out = torch.empty(B, H, R, n, dtype=torch.float32, device=queries.device)
    BK = max(16, next_power_of_2(K))
    wide = 64 if BK * queries.element_size() <= 512 else 32
    with on_device(queries):
        product_kernel.launch(
            (cdiv(n, wide), cdiv(R, wide), B * H), (queries, means, out),
            R, n, first, H, G, *queries.stride()[:3], *means.stride()[:3],
            K=K, BK=BK, BR=wide, BN=wide, num_warps=4,
            PRECISION="tf32x3" if queries.dtype == torch.float32 else "tf32",
        )  # fmt: skip
    return out


def top(
    scores: Tensor, k: int, size: int, rows: int, causal: bool, sinks: int, local: int, offset: int
) -> Tensor:
    """As :func:`subquad.ops.select.choose.top`."""
    R, n = scores.shape[-2:]
    scores, k = scores.contiguous(), min(k, n)
    out = torch.empty(*scores.shape[:-1], k, dtype=torch.int32, device=scores.device)
    BN = max(16, next_power_of_2(n))
    with on_device(scores):
        top_kernel.launch(
            (out.numel() // k,), (scores, out), R, n, k, rows, size, sinks, local, offset,
            CAUSAL=causal, BN=BN, num_warps=max(1, min(16, BN // 512)),
        )  # fmt: skip
    return out
