"""Without the delta rule, decays per head or none: nothing but the state goes from chunk to chunk.

So the scores are made where the state passes by, and nothing is prepared but the decays. The pass
back in time is the same one, for the state's gradient; :mod:`gradients` takes all chunks at once.

    o  =  scale (exp(G) (q S) + A v)                    A = lower(q_i . k_j exp(G_i - G_j))
    S  <- exp(G_end) S  + (exp(G_end - G) k)^T v        S before each chunk
    dS <- exp(G_end) dS + (scale exp(G) q)^T do         dS after each chunk

A sequence that is split starts every segment from zero, and ``join`` carries the state over the
segments. The state stands transposed, ``[V,K]``. Decays go by powers of two, as the GPU's own
instruction takes them.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    LOG2E,
    bulk,
    bulk_put_t,
    halved,
    in_registers,
    kernel,
    segment,
)
from subquad.ops.recurrence.triton.state import added, keep, no_tiles, state_at


@triton.jit
def _rows(
    X, t, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr,
    TILES: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """A chunk's rows, TILES of BW columns each."""
    found = no_tiles()
    for b in tl.static_range(TILES):
        found += (bulk(X, t, left, heads, h, column + b * BW, W, C, BW, BULK),)
    return found


@triton.jit
def _faded(S, factor):
    found = no_tiles()
    for b in tl.static_range(len(S)):
        found += (S[b] * factor,)
    return found


@triton.jit
def _put_outputs(
    O, o, a, x, t, left, H, h, value, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    FINE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``o [BV,C]`` and the values ``x [BV,C]`` times their scores ``a``."""
    if FINE:
        high, low = halved(a)
        o = tl.dot(x, high, o)
        o = tl.dot(x, low, o)
    else:
        o = tl.dot(x, a.to(x.dtype), o, input_precision=PRECISION)
    bulk_put_t(O, o, t, left, H, h, value, V, C, BV, BULK)


@kernel
def decays(
    G_, TABLE, GS, T, HD, C: tl.constexpr, BH: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """GS ``[chunks,HD,C]``: a chunk's log decays, summed from its start, to the base 2."""
    index = tl.program_id(0)
    first, end, _, _, _, chunk = segment(TABLE, index, T, C, C, PACKED)
    n = tl.arange(0, C)[:, None]
    h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    left = end - first
    g = tl.load(G_ + (first + n) * HD + h, mask=(h < HD) & (n < left), other=0.0).to(tl.float32)
    G = tl.cumsum(g, axis=0) * LOG2E
    tl.store(GS + (chunk.to(tl.int64) * HD + h) * C + n, G, mask=h < tl.where(left > 0, HD, 0))


@kernel
def states(
    X, Y, Q, GS, INIT, TABLE, HS, O, LOCAL, LINK, LAST,
    scale, T, SIZE, H, HX, HY, HQ, HD,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr, CARRIED: tl.constexpr,
    KEEP: tl.constexpr, OUTPUT: tl.constexpr, FINE: tl.constexpr, SPLIT: tl.constexpr,
    BACK: tl.constexpr, BULK: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one head, BV value and BK key columns of the state (OUTPUT: all, in tiles of
    BK); X is v (BACK: do), Y is k (BACK: q).

    INIT is the state before each segment (CARRIED: as :func:`join` wrote it). KEEP writes HS, the
    state before every chunk (BACK: the gradient after it); OUTPUT writes O. SPLIT starts every
    segment from zero, writes its own result to LOCAL and its decay to LINK; else LAST gets the
    state after a sequence (BACK: the gradient before it). FINE lets the scores enter O as two
    bfloat16, and where no decay fades what the state has lost the state, too.

    EARLY asks for a chunk's tiles before the outputs of the one before it are written. The compiler
    asks at a chunk's end, but before what stands under a condition; there nothing reads from tiles,
    which may be gone.
    """
    tiles: tl.constexpr = (K + BK - 1) // BK if OUTPUT else 1
    columns_of: tl.constexpr = 1 if OUTPUT else (K + BK - 1) // BK
    blocks: tl.constexpr = (V + BV - 1) // BV * columns_of
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // blocks
    part = pid % blocks
    value = part // columns_of * BV
    column = part % columns_of * BK
    first, end, sequence, opens, closes, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = value + tl.arange(0, BV)
    hx, hy, hq, hd = h * HX // H, h * HY // H, h * HQ // H, h * HD // H

    S = no_tiles()
    for b in tl.static_range(tiles):
        columns = column + b * BK + tl.arange(0, BK)
        if CARRIED:
            at = INIT + (index.to(tl.int64) * H + h) * (V * K) + rows[:, None] * K
            ok = (rows[:, None] < V) & (columns[None, :] < K)
            S += (tl.load(at + columns[None, :], mask=ok, other=0.0),)
        elif HAS_INIT:
            at, ok = state_at(INIT, index, h, H, rows, columns, K, V)
            S += (tl.load(at, mask=ok, other=0.0),)
        else:
            S += (tl.zeros([BV, BK], tl.float32),)
    total = 0.0
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    if SPLIT:  # what the last segment (BACK: the first) adds is asked for by nobody
        chunks = tl.where(opens if BACK else closes, 0, chunks)
    i = tl.arange(0, C)[None, :]
    j = tl.arange(0, C)[:, None]
    whole = 0.0
    if DECAY:
        n = 0
        if BACK:
            n = tl.maximum(chunks - 1, 0)
        whole = tl.load(GS + ((chunk + n).to(tl.int64) * HD + hd) * C + C - 1, mask=chunks > 0)
    for m in range(chunks):
        n = m
        if BACK:
            n = chunks - 1 - m
        t = first + n * C
        left = end - t
        if DECAY:
            row = GS + ((chunk + n).to(tl.int64) * HD + hd) * C
            G = tl.load(row + tl.arange(0, C))
            # A step ahead: loads that scale an accumulator are not moved ahead by the compiler.
            if BACK:
                later = tl.load(row - HD * C + C - 1, mask=n > 0, other=0.0)
            else:
                later = tl.load(row + HD * C + C - 1, mask=n + 1 < chunks, other=0.0)
        x = bulk(X, t, left, HX, hx, value, V, C, BV, BULK)
        y = _rows(Y, t, left, HY, hy, column, K, C, BK, tiles, BULK)
        kind = x.dtype
        if KEEP:
            keep(HS, S[0].to(kind), chunk + n, h, H, value, column, K, V, BV, BK, BULK)
        if OUTPUT:
            q = _rows(Q, t, left, HQ, hq, 0, K, C, BK, tiles, BULK)
            o = tl.zeros([BV, C], tl.float32)
            for b in tl.static_range(tiles):
                if FINE and not DECAY:
                    high, low = halved(S[b])
                    o = tl.dot(high, tl.trans(q[b]), o)
                    o = tl.dot(low, tl.trans(q[b]), o)
                else:
                    o = tl.dot(S[b].to(kind), tl.trans(q[b]), o, input_precision=PRECISION)
        # Between the outputs' products: after them the state's would still run when those of the
        # next chunk begin, and the assembler would wait after every single one (C7515).
        x = tl.trans(x)
        if EARLY:
            x = in_registers(x)
        written = x
        if DECAY:
            if BACK:
                written = (written * (tl.exp2(G) * scale)[None, :]).to(kind)
            else:
                written = (written * tl.exp2(whole - G)[None, :]).to(kind)
            S = _faded(S, tl.exp2(whole))
            total += whole
            whole = later
        elif BACK:
            written = (written * scale).to(kind)
        S = added(S, written, y, PRECISION)
        if OUTPUT:
            a = tl.zeros([C, C], tl.float32)
            for b in tl.static_range(tiles):
                a = tl.dot(y[b], tl.trans(q[b]), a, input_precision=PRECISION)
            if DECAY:
                o *= (tl.exp2(G) * scale)[None, :]
                a *= tl.exp2(tl.where(i >= j, G[None, :] - G[:, None], float("-inf"))) * scale
            else:
                o *= scale
                a = tl.where(i >= j, a * scale, 0.0)
            if EARLY:
                if left > 0:
                    _put_outputs(O, o, a, x, t, left, H, h, value, V, C, BV, FINE, BULK, PRECISION)
            else:
                _put_outputs(O, o, a, x, t, left, H, h, value, V, C, BV, FINE, BULK, PRECISION)
    if SPLIT:
        keep(LOCAL, S[0], index, h, H, value, column, K, V, BV, BK, False)
        tl.store(LINK + index.to(tl.int64) * H + h, tl.exp2(total))
    elif LAST is not None:
        if BACK:
            closes = opens
        for b in tl.static_range(tiles):
            columns = column + b * BK + tl.arange(0, BK)
            at, ok = state_at(LAST, sequence, h, H, rows, columns, K, V)
            tl.store(at, S[b], mask=ok & (rows[:, None] < tl.where(closes, V, 0)))


@kernel
def join(
    LOCAL, LINK, INIT, FIRST, OUT,
    T, SIZE, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, HAS_INIT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Carry the state (BACK: its gradient) over the segments of one sequence: OUT gets what stands
    before each (BACK: after it)."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    sequence = tl.program_id(0) // blocks
    h = tl.program_id(1)
    if PACKED:
        low = tl.load(FIRST + sequence)
        count = tl.load(FIRST + sequence + 1) - low
    else:
        count = tl.cdiv(T, SIZE)
        low = sequence * count
    row = tl.program_id(0) % blocks * BV
    rows = row + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        at, ok = state_at(INIT, sequence, h, H, rows, columns, K, V)
        S = tl.load(at, mask=ok, other=0.0)
    ok = (rows[:, None] < V) & (columns[None, :] < K)
    for n in range(count):
        index = low + n
        if BACK:
            index = low + count - 1 - n
        keep(OUT, S, index, h, H, row, 0, K, V, BV, BK, False)
        base = index.to(tl.int64) * H + h
        at = LOCAL + base * (V * K) + rows[:, None] * K + columns[None, :]
        S = S * tl.load(LINK + base) + tl.load(at, mask=ok, other=0.0)
