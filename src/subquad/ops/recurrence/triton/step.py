"""Token by token, the state in registers: decoding, and the recurrent form."""

import triton.language as tl

from subquad.ops.recurrence.triton.parts import CHANNEL, HEAD, kernel, segment


@kernel
def step(
    Q, K_, V_, G_, BETA, INIT, TABLE, O, FINAL,
    scale, T, H, HQ, HK, HV, HD, HB,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = tl.program_id(1)
    block = pid % blocks
    first, end, sequence, _, _, _ = segment(TABLE, pid // blocks, T, T, 1, PACKED)
    c = tl.arange(0, BK)
    r = block * BV + tl.arange(0, BV)
    ok = (c[:, None] < K) & (r[None, :] < V)
    at = ((sequence.to(tl.int64) * H + h) * K + c[:, None]) * V + r[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_INIT:
        S = tl.load(INIT + at, mask=ok, other=0.0)
    for n in range((end - first).to(tl.int32)):
        t = first + n
        k = tl.load(K_ + (t * HK + h * HK // H) * K + c, mask=c < K, other=0.0).to(tl.float32)
        q = tl.load(Q + (t * HQ + h * HQ // H) * K + c, mask=c < K, other=0.0).to(tl.float32)
        v = tl.load(V_ + (t * HV + h * HV // H) * V + r, mask=r < V, other=0.0).to(tl.float32)
        if DECAY == HEAD:
            S *= tl.exp(tl.load(G_ + t * HD + h * HD // H))
        if DECAY == CHANNEL:
            g = tl.load(G_ + (t * HD + h * HD // H) * K + c, mask=c < K, other=0.0)
            S *= tl.exp(g)[:, None]
        if DELTA:
            v -= tl.sum(S * k[:, None], axis=0)
            v *= tl.load(BETA + t * HB + h * HB // H)
        S += k[:, None] * v[None, :]
        o = tl.sum(S * q[:, None], axis=0) * scale
        tl.store(O + (t * H + h) * V + r, o.to(O.dtype.element_ty), mask=r < V)
    tl.store(FINAL + at, S, mask=ok)
