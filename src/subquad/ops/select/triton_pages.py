"""Pages by the bounds of their keys: scores of all of them, and the best of each list.

Legend: B batch, H query heads, G key heads, K head dim, P pages, N lists, n pages in a list; C
sets of SET neighboring pages.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from subquad.ops.kernel import Kernel, on_device

SET = 16  # pages that are first compared by their best
PAGES = 32  # whose bounds a program finds


@triton.jit
def _there(CLOCK, tokens, window, PAGE: tl.constexpr, CURRENT: tl.constexpr):
    """The first page that may be chosen, the one that may not any more, and the last token's,
    which is chosen already where it is taken in any case."""
    if CLOCK is not None:
        tokens += tl.load(CLOCK).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(tokens - window, 0) // PAGE
    last = (tokens - 1) // PAGE
    return first, last if CURRENT else last + 1, last


@partial(Kernel, sizes=("P", "C", "tokens", "window"))
def bound_kernel(
    Q, LOW, HIGH, CLOCK, OUT, TOP, P, C, tokens, window, H, G, sqb, sqh, slb, slp, slg,
    PAGE: tl.constexpr, CURRENT: tl.constexpr, SET: tl.constexpr,
    GROUP: tl.constexpr, BH: tl.constexpr, SHARE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The bounds of BP pages for the heads that share a key head, and the best of each set."""
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    begin = tl.program_id(0) * BP
    p, d, i = begin + tl.arange(0, BP), tl.arange(0, BK), tl.arange(0, BH)
    h = g * GROUP + i
    first, stop, _ = _there(CLOCK, tokens, window, PAGE, CURRENT)
    stop = tl.minimum(stop, P)
    if (begin < stop) & (begin + BP > first):
        at = b * slb + g * slg + p.to(tl.int64)[:, None] * slp + d[None, :]
        there = (p >= first) & (p < stop)
        read = there[:, None] & (d < K)[None, :]
        low = tl.load(LOW + at, mask=read, other=0.0)
        high = tl.load(HIGH + at, mask=read, other=0.0)
        own = (i < GROUP)[:, None] & (d < K)[None, :]
        q = tl.load(Q + b * sqb + h[:, None] * sqh + d[None, :], mask=own, other=0.0)
        none = tl.zeros_like(q)
        u = tl.dot(tl.where(q > 0, q, none), tl.trans(high), input_precision=PRECISION)
        u = tl.dot(tl.where(q < 0, q, none), tl.trans(low), u, input_precision=PRECISION)
        c = begin // SET + tl.arange(0, BP // SET)
        if SHARE:
            u = tl.sum(u, 0)
            tl.store(OUT + (b * G + g) * P + p, u, mask=there)
            top = tl.max(tl.where(there, u, float("-inf")).reshape([BP // SET, SET]), 1)
            tl.store(TOP + (b * G + g) * C + c, top, mask=c < C)
        else:
            head = (b * H + h)[:, None]
            own = (i < GROUP)[:, None]
            tl.store(OUT + head * P + p[None, :], u, mask=own & there[None, :])
            u = tl.where(there[None, :], u, float("-inf"))
            top = tl.max(u.reshape([BH, BP // SET, SET]), 2)
            tl.store(TOP + head * C + c[None, :], top, mask=own & (c < C)[None, :])


@triton.jit
def _ordered(x, there):
    """Integers in the order of the floats; the least one where nothing is."""
    x = x.to(tl.int32, bitcast=True)
    return tl.where(there, x ^ ((x >> 31) & 0x7FFFFFFF), -2147483648)


@triton.jit
def _largest(x, there, n):
    """Where the n largest of x are, of equals the earlier, and the place of each among them."""
    low = tl.min(tl.where(there, x, 2147483647), 0).to(tl.int64)
    high = tl.max(x, 0).to(tl.int64)
    reach = tl.sum(there.to(tl.int32), 0)  # low; halved until n reach it, or all that do are equal
    while (low < high) & (reach > n):
        half = low + (high - low + 1) // 2
        more = tl.sum((x >= half.to(tl.int32)).to(tl.int32), 0)
        low, reach = tl.where(more >= n, half, low), tl.where(more >= n, more, reach)
        high = tl.where(more >= n, high, half - 1)
    low = low.to(tl.int32)
    keep = there & (x >= low)
    if reach > n:
        ties = (there & (x == low)).to(tl.int32)
        more = tl.sum((x > low).to(tl.int32), 0)
        keep = (x > low) | ((ties > 0) & (tl.cumsum(ties, 0) - ties < n - more))
    kept = keep.to(tl.int32)
    return keep, tl.cumsum(kept, 0) - kept


@partial(Kernel, sizes=("P", "C", "tokens", "window", "n", "width"))
def best_kernel(
    SCORES, TOP, CLOCK, OUT, P, C, tokens, window, n, width,
    PAGE: tl.constexpr, CURRENT: tl.constexpr, SET: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The n best pages of one list, in their order: they lie in the n sets with the best ones."""
    row = tl.program_id(0).to(tl.int64)
    first, stop, last = _there(CLOCK, tokens, window, PAGE, CURRENT)
    OUT += row * width
    c, i = tl.arange(0, BC), tl.arange(0, BN)
    there = (c >= first // SET) & (c * SET < stop)
    top = _ordered(tl.load(TOP + row * C + c, mask=there, other=0.0), there)
    sets = tl.maximum(tl.minimum(tl.cdiv(stop, SET) - first // SET, n), 0)
    keep, place = _largest(top, there, sets)
    tl.store(OUT + place, c, mask=keep & (place < sets))
    tl.debug_barrier()  # what one thread wrote others read
    c = tl.load(OUT + i // SET, mask=i // SET < sets, other=0)
    tl.debug_barrier()
    page = c * SET + i % SET
    there = (i // SET < sets) & (page >= first) & (page < stop)
    x = _ordered(tl.load(SCORES + row * P + page, mask=there, other=0.0), there)
    found = tl.maximum(tl.minimum(stop - first, n), 0)
    keep, place = _largest(x, there, found)
    tl.store(OUT + place, page * PAGE, mask=keep & (place < found))
    tl.store(OUT + i, -1, mask=(i >= found) & (i < n))
    if CURRENT:
        tl.store(OUT + n, last * PAGE)


def _scores(q, low, high, page, tokens, clock, share, window, current):
    """Bounds ``[B,N,P]`` and the best of every SET of them ``[B,N,C]``."""
    (B, H, K), (P, G) = q.shape, low.shape[1:3]
    N, C = G if share else H, triton.cdiv(P, SET)
    out = torch.empty(B, N, P, dtype=torch.float32, device=q.device)
    top = torch.empty(B, N, C, dtype=torch.float32, device=q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    assert low.stride() == high.stride()
    assert low.stride(3) == 1
    bound_kernel.launch(
        (triton.cdiv(P, PAGES), B * G), (q, low, high, clock, out, top), P, C, tokens, window or 0,
        H, G, *q.stride()[:2], *low.stride()[:3],
        PAGE=page, CURRENT=current, SET=SET, GROUP=H // G,
        BH=max(16, triton.next_power_of_2(H // G)), SHARE=share,
        K=K, BK=max(16, triton.next_power_of_2(K)), BP=PAGES,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out, top


def bounds(q, low, high, share):
    """As :func:`subquad.ops.select.pages.bounds`."""
    with on_device(q):
        return _scores(q, low, high, 1, low.shape[1], None, share, None, False)[0]


def best(q, low, high, n, page, tokens, clock, share, current, window):
    """As :func:`subquad.ops.select.pages.best`."""
    with on_device(q):
        scores, top = _scores(q, low, high, page, tokens, clock, share, window, current)
        (B, N, P), C = scores.shape, top.shape[2]
        n = min(n, P)
        out = torch.empty(B, N, n + current, dtype=torch.int32, device=q.device)
        BC, BN = triton.next_power_of_2(C), triton.next_power_of_2(min(n, C)) * SET
        best_kernel.launch(
            (B * N,), (scores, top, clock, out), P, C, tokens, window or 0, n, n + current,
            PAGE=page, CURRENT=current, SET=SET, BC=BC, BN=BN,
            num_warps=max(1, min(32, max(BC, BN) // 256)),
        )  # fmt: skip
    return out
