"""Pages by the bounds of their keys: scores of all of them, and the best of each list.

Legend: B batch, H query heads, G key heads, K head dim, P pages, N lists, n pages in a list.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from subquad.ops.kernel import Kernel, on_device


@triton.jit
def _there(CLOCK, tokens, window, PAGE: tl.constexpr):
    """How many tokens there are, and the first page that may be read."""
    if CLOCK is not None:
        tokens += tl.load(CLOCK).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(tokens - window, 0) // PAGE
    return tokens, first


@partial(Kernel, sizes=("P", "tokens", "window"))
def bound_kernel(
    Q, LOW, HIGH, CLOCK, OUT, P, tokens, window, H, G, sqb, sqh, slb, slp, slg,
    PAGE: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The bounds of BP pages for the heads that share a key head."""
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    p, d = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BK)
    tokens, first = _there(CLOCK, tokens, window, PAGE)
    last = tl.minimum(tl.cdiv(tokens, PAGE), P)
    if (tl.program_id(0) * BP < last) & (tl.program_id(0) * BP + BP > first):
        at = b * slb + g * slg + p.to(tl.int64)[:, None] * slp + d[None, :]
        there = (p < last)[:, None] & (d < K)[None, :]
        low = tl.load(LOW + at, mask=there, other=0.0).to(tl.float32)
        high = tl.load(HIGH + at, mask=there, other=0.0).to(tl.float32)
        total = tl.zeros([BP], tl.float32)
        for i in tl.static_range(GROUP):
            h = g * GROUP + i
            q = tl.load(Q + b * sqb + h * sqh + d, mask=d < K, other=0.0).to(tl.float32)
            u = tl.sum(tl.maximum(q[None, :] * low, q[None, :] * high), 1)
            total += u
            if not SHARE:
                tl.store(OUT + (b * H + h) * P + p, u, mask=p < last)
        if SHARE:
            tl.store(OUT + (b * G + g) * P + p, total, mask=p < last)


@partial(Kernel, sizes=("P", "tokens", "window", "n", "width"))
def best_kernel(
    SCORES, CLOCK, OUT, P, tokens, window, n, width,
    PAGE: tl.constexpr, CURRENT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The n best pages of one list, in their order."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    tokens, first = _there(CLOCK, tokens, window, PAGE)
    last = (tokens - 1) // PAGE
    stop = last if CURRENT else last + 1  # the last page is chosen already, or may be
    there = (i >= first) & (i < stop)
    OUT += row * width
    found = tl.maximum(tl.minimum(stop - first, n), 0)
    x = tl.load(SCORES + row * P + i, mask=there, other=0.0).to(tl.int32, bitcast=True)
    x = tl.where(there, x ^ ((x >> 31) & 0x7FFFFFFF), -2147483648)  # in the order of the scores
    # The largest bound that as many pages reach; a round keeps one quarter of what it may be, and
    # its three counts of up to 2^16 are one sum, as sums over all threads are what a round takes.
    low = tl.min(tl.where(there, x, 2147483647), 0).to(tl.int64)
    high = tl.max(x, 0).to(tl.int64)
    while low < high:
        a = low + (high - low + 3) // 4
        b = low + (2 * (high - low) + 3) // 4
        c = low + (3 * (high - low) + 3) // 4
        reach = (x >= a.to(tl.int32)).to(tl.int64)
        reach += (x >= b.to(tl.int32)).to(tl.int64) << 20
        reach += (x >= c.to(tl.int32)).to(tl.int64) << 40
        counts = tl.sum(reach, 0)
        over_a = (counts & 0xFFFFF) >= found
        over_b = ((counts >> 20) & 0xFFFFF) >= found
        over_c = (counts >> 40) >= found
        low = tl.where(over_c, c, tl.where(over_b, b, tl.where(over_a, a, low)))
        high = tl.where(over_c, high, tl.where(over_b, c - 1, tl.where(over_a, b - 1, a - 1)))
    low = low.to(tl.int32)
    # Of those equal to it the earlier ones, as many as are missing.
    more, ties = (x > low).to(tl.int32), (there & (x == low)).to(tl.int32)
    missing = found - tl.sum(more, 0)
    before = tl.cumsum(ties, 0) - ties
    keep = (more > 0) | ((ties > 0) & (before < missing))
    kept = keep.to(tl.int32)
    place = tl.cumsum(kept, 0) - kept
    tl.store(OUT + place, i * PAGE, mask=keep & (place < found))
    tl.store(OUT + i, -1, mask=(i >= found) & (i < n))
    if CURRENT:
        tl.store(OUT + n, last * PAGE)


def _scores(q, low, high, page, tokens, clock, share, window):
    (B, H, K), (P, G) = q.shape, low.shape[1:3]
    out = torch.empty(B, G if share else H, P, dtype=torch.float32, device=q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    assert low.stride() == high.stride()
    assert low.stride(3) == 1
    bound_kernel.launch(
        (triton.cdiv(P, 32), B * G), (q, low, high, clock, out), P, tokens, window or 0, H, G,
        *q.stride()[:2], *low.stride()[:3],
        PAGE=page, GROUP=H // G, SHARE=share, K=K, BK=triton.next_power_of_2(K), BP=32,
        num_warps=4,
    )  # fmt: skip
    return out


def bounds(q, low, high, share):
    """As :func:`subquad.ops.select.pages.bounds`."""
    with on_device(q):
        return _scores(q, low, high, 1, low.shape[1], None, share, None)


def best(q, low, high, n, page, tokens, clock, share, current, window):
    """As :func:`subquad.ops.select.pages.best`."""
    with on_device(q):
        scores = _scores(q, low, high, page, tokens, clock, share, window)
        B, N, P = scores.shape
        n = min(n, P)
        out = torch.empty(B, N, n + current, dtype=torch.int32, device=q.device)
        BP = max(16, triton.next_power_of_2(P))
        warps = max(1, min(8, BP // 256), min(32, BP // 1024))  # up to 32 scores a thread
        best_kernel.launch(
            (B * N,), (scores, clock, out), P, tokens, window or 0, n, n + current,
            PAGE=page, CURRENT=current, BP=BP, num_warps=warps,
        )  # fmt: skip
    return out
