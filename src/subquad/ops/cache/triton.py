"""A token enters a cache: its key, its value and the bounds of its page in one launch."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel, on_device


@partial(Kernel, sizes=("at", "sinks", "window"))
def append_kernel(
    NEW_K, NEW_V, KEYS, VALUES, LOW, HIGH, CLOCK, at, sinks, window, G,
    nkb, nkh, nvb, nvh, skb, skt, skh, svb, svt, svh, slb, slp, slh,
    PAGE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    t = at
    if CLOCK is not None:
        t += tl.load(CLOCK)
    slot = t.to(tl.int64)
    if window > 0:
        slot = tl.where(slot < sinks, slot, sinks + (slot - sinks) % window)
    k = tl.load(NEW_K + b * nkb + g * nkh + d, mask=d < K, other=0.0)
    v = tl.load(NEW_V + b * nvb + g * nvh + e, mask=e < V, other=0.0)
    tl.store(KEYS + b * skb + slot * skt + g * skh + d, k, mask=d < K)
    tl.store(VALUES + b * svb + slot * svt + g * svh + e, v, mask=e < V)
    if LOW is not None:
        page = b * slb + (slot // PAGE) * slp + g * slh + d
        low = tl.load(LOW + page, mask=d < K, other=0.0)
        high = tl.load(HIGH + page, mask=d < K, other=0.0)
        fresh = slot % PAGE == 0
        tl.store(LOW + page, tl.where(fresh, k, tl.minimum(low, k)), mask=d < K)
        tl.store(HIGH + page, tl.where(fresh, k, tl.maximum(high, k)), mask=d < K)


def append(k, v, keys, values, at, clock, ring, bounds):
    """As :func:`subquad.ops.cache.append`."""
    (B, _, G, K), V = k.shape, v.shape[3]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    low, high, page, steps = None, None, 1, (0, 0, 0)
    if bounds is not None:
        low, high, page = bounds
        steps = low.stride()[:3]
        assert low.stride() == high.stride()
    with on_device(k):
        append_kernel.launch(
            (B * G,), (k, v, keys, values, low, high, clock), at, *(ring or (0, 0)), G,
            k.stride(0), k.stride(2), v.stride(0), v.stride(2),
            *keys.stride()[:3], *values.stride()[:3], *steps,
            PAGE=page, K=K, V=V, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V),
            num_warps=1,
        )  # fmt: skip
