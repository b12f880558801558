"""The passes over time: the state carried through the chunks of a segment, and its gradient.

The state stands transposed, ``[BV,K]`` in float32 registers: a program owns BV of its value
columns. Products then take the state and the new values as their left operand, from registers.
Per chunk, with P and W of :mod:`prepare` (D = v without the delta rule):

    D = P (beta v) + W S          o = QG S + A D          S <- exp(G_end) S + KG^T D
    dD = A^T do + KG dS           F = P^T dD              dS <- exp(G_end) dS + QG^T do + W^T dD
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    SIZES,
    fade,
    numbers,
    put_t,
    segment,
    tile,
    tile_t,
)


@triton.jit
def _state_at(X, index, h, H, rows, columns, K: tl.constexpr, V: tl.constexpr):
    """Pointers and mask of ``X [index,H,K,V]`` as the transposed ``[rows of V, columns of K]``."""
    at = X + ((index.to(tl.int64) * H + h) * K + columns[None, :]) * V + rows[:, None]
    return at, (columns[None, :] < K) & (rows[:, None] < V)


@triton.jit
def _keep(HS, S, chunk, h, H, rows, columns, K: tl.constexpr, V: tl.constexpr):
    """Write ``S [rows of V, columns of K]`` to ``HS [chunks,H,V,K]``."""
    at = HS + (chunk.to(tl.int64) * H + h) * (V * K) + rows[:, None] * K + columns[None, :]
    tl.store(at, S, mask=(rows[:, None] < V) & (columns[None, :] < K))


@triton.jit(do_not_specialize=SIZES)
def scan(
    Q, K_, V_, G_, BETA, A, P, W, GC, INIT, TABLE, O, D_, HS, FINAL, LOCAL, TOTAL,
    scale, T, SIZE, H, HQ, HK, HV, HD, HB,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one head, BV columns of the state.

    OUTPUT writes o; KEEP the state before every chunk (HS) and, for the delta rule, D; END the
    state after the last segment of a sequence. SPLIT starts every segment from zero and writes its
    own final state to LOCAL, for the delta rule beside its transition (further columns, from the
    identity), else beside its summed decay (TOTAL).
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    links: tl.constexpr = (K + BV - 1) // BV if SPLIT and DELTA else 0
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // (blocks + links)
    block = pid % (blocks + links)
    first, end, sequence, _, closes, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = block * BV + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    hq, hk, hv = h * HQ // H, h * HK // H, h * HV // H
    hd, hb = h * HD // H, h * HB // H

    S = tl.zeros([BV, BK], tl.float32)
    if SPLIT and DELTA:
        S = tl.where(columns[None, :] == rows[:, None] - blocks * BV, 1.0, 0.0)
    if HAS_INIT:
        at, ok = _state_at(INIT, index, h, H, rows, columns, K, V)
        S = tl.load(at, mask=ok, other=0.0)
    if DECAY == CHANNEL:
        total = tl.zeros([BK], tl.float32)
    else:
        total = 0.0

    i = tl.arange(0, C)[None, :]
    j = tl.arange(0, C)[:, None]
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    for n in range(chunks):
        t = first + n * C
        left = end - t
        k = tile(K_, t, left, HK, hk, 0, K, C, BK)
        kind = k.dtype
        Sd = S.to(kind)
        if KEEP:
            _keep(HS, Sd, chunk + n, h, H, rows, columns, K, V)
        # A transition's columns carry no values.
        rest = tl.where(block < blocks, left, 0)
        v = tile_t(V_, t, rest, HV, hv, block * BV, V, C, BV)
        if DECAY == HEAD:
            g = numbers(G_, t, left, HD, hd, C)
            G = tl.cumsum(g, axis=0)
            g_end = tl.sum(g, axis=0)
        if DELTA:
            beta = numbers(BETA, t, left, HB, hb, C)
            p = tile(P, t, left, H, h, 0, C, C, C)
            w = tile(W, t, left, H, h, 0, K, C, BK)
            D = tl.dot((v * beta[None, :]).to(kind), tl.trans(p), input_precision=PRECISION)
            D = tl.dot(Sd, tl.trans(w), D, input_precision=PRECISION)
            if KEEP:
                put_t(D_, D, t, left, H, h, block * BV, V, C, BV)
            Dd = D.to(kind)
        else:
            D = v
            Dd = v
        if OUTPUT:
            q = tile(Q, t, left, HQ, hq, 0, K, C, BK)
            o = tl.dot(Sd, tl.trans(q), input_precision=PRECISION)
            if DECAY == CHANNEL:
                a = tl.trans(tile(A, t, left, H, h, 0, C, C, C))
            else:
                a = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
                if DECAY == HEAD:
                    o *= (tl.exp(G) * scale)[None, :]
                    a *= fade(G[None, :], G[:, None], i >= j)
                else:
                    o *= scale
                    a = tl.where(i >= j, a, 0.0)
                a = a.to(kind)
            o = tl.dot(Dd, a, o, input_precision=PRECISION)
            put_t(O, o, t, left, H, h, block * BV, V, C, BV)
        if DECAY == HEAD:
            S *= tl.exp(g_end)
            Dd = (D * tl.exp(g_end - G)[None, :]).to(kind)
            total += g_end
        if DECAY == CHANNEL:
            c_end = tl.load(
                GC + ((chunk + n).to(tl.int64) * H + h) * K + columns, mask=columns < K, other=0.0
            )
            S *= tl.exp(c_end)[None, :]
            total += c_end
        S = tl.dot(Dd, k, S, input_precision=PRECISION)

    if SPLIT:
        at = LOCAL + (index.to(tl.int64) * H + h) * ((blocks + links) * BV * K)
        at += rows[:, None] * K + columns[None, :]
        tl.store(at, S, mask=columns[None, :] < K)
        if (not DELTA) and block == 0:
            if DECAY == CHANNEL:
                to = TOTAL + (index.to(tl.int64) * H + h) * K + columns
                tl.store(to, total, mask=columns < K)
            else:
                tl.store(TOTAL + index.to(tl.int64) * H + h, total)
    if END:
        at, ok = _state_at(FINAL, sequence, h, H, rows, columns, K, V)
        tl.store(at, S, mask=ok & (rows[:, None] < tl.where(closes, V, 0)))


@triton.jit(do_not_specialize=SIZES)
def scan_back(
    Q, K_, G_, DO, A, P, W, GC, INIT, TABLE, OUT, HS, START, LOCAL,
    scale, T, SIZE, H, HQ, HK, HD,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient from a segment's end to its start.

    INIT is the gradient at the end of each segment. Writes HS, the gradient after every chunk;
    OUT, that is F for the delta rule and dv else; START, the gradient at the start of a sequence.
    SPLIT starts every segment from zero and writes only its result, to LOCAL.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // blocks
    block = pid % blocks
    first, end, sequence, opens, _, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = block * BV + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    hq, hk, hd = h * HQ // H, h * HK // H, h * HD // H

    dS = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        at, ok = _state_at(INIT, index, h, H, rows, columns, K, V)
        dS = tl.load(at, mask=ok, other=0.0)

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    for m in range(chunks):
        n = chunks - 1 - m
        t = first + n * C
        left = end - t
        q = tile(Q, t, left, HQ, hq, 0, K, C, BK)
        kind = q.dtype
        do = tile_t(DO, t, left, H, h, block * BV, V, C, BV)
        if DECAY == HEAD:
            g = numbers(G_, t, left, HD, hd, C)
            G = tl.cumsum(g, axis=0)
            g_end = tl.sum(g, axis=0)
        if (not SPLIT) or DELTA:
            k = tile(K_, t, left, HK, hk, 0, K, C, BK)
            dSd = dS.to(kind)
            dD = tl.dot(dSd, tl.trans(k), input_precision=PRECISION)
            if DECAY == CHANNEL:
                a = tile(A, t, left, H, h, 0, C, C, C)
            else:
                a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                if DECAY == HEAD:
                    dD *= tl.exp(g_end - G)[None, :]
                    a *= fade(G[:, None], G[None, :], i >= j)
                else:
                    a = tl.where(i >= j, a, 0.0)
                a = a.to(kind)
            dD = tl.dot(do, a, dD, input_precision=PRECISION)
            if not SPLIT:
                _keep(HS, dSd, chunk + n, h, H, rows, columns, K, V)
        if DECAY == HEAD:
            dS *= tl.exp(g_end)
            do = (do * (tl.exp(G) * scale)[None, :]).to(kind)
        elif DECAY == CHANNEL:
            c_end = tl.load(
                GC + ((chunk + n).to(tl.int64) * H + h) * K + columns, mask=columns < K, other=0.0
            )
            dS *= tl.exp(c_end)[None, :]
        else:
            do = (do * scale).to(kind)
        dS = tl.dot(do, q, dS, input_precision=PRECISION)
        if DELTA:
            dDd = dD.to(kind)
            w = tile(W, t, left, H, h, 0, K, C, BK)
            dS = tl.dot(dDd, w, dS, input_precision=PRECISION)
            if not SPLIT:
                p = tile(P, t, left, H, h, 0, C, C, C)
                F = tl.dot(dDd, p, input_precision=PRECISION)
                put_t(OUT, F, t, left, H, h, block * BV, V, C, BV)
        elif not SPLIT:
            put_t(OUT, dD, t, left, H, h, block * BV, V, C, BV)

    if SPLIT:
        at = LOCAL + (index.to(tl.int64) * H + h) * (blocks * BV * K)
        at += rows[:, None] * K + columns[None, :]
        tl.store(at, dS, mask=columns[None, :] < K)
    else:
        at, ok = _state_at(START, sequence, h, H, rows, columns, K, V)
        tl.store(at, dS, mask=ok & (rows[:, None] < tl.where(opens, V, 0)))


@triton.jit(do_not_specialize=SIZES)
def combine(
    LOCAL, LINK, INIT, FIRST, OUT, FINAL,
    T, SIZE, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LOCAL_ROWS: tl.constexpr, LINK_ROWS: tl.constexpr, LINK_ROW: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state (BACK: its gradient) over the segments of one sequence, exactly.

    OUT gets the state before each segment (BACK: the gradient after it). A segment adds its LOCAL
    result to its transition applied to what came in: the matrix in LINK's rows from LINK_ROW on
    for the delta rule, else the factor exp(LINK).
    """
    pid = tl.program_id(0)
    h = tl.program_id(1)
    blocks: tl.constexpr = (V + BV - 1) // BV
    sequence = pid // blocks
    block = pid % blocks
    if PACKED:
        low = tl.load(FIRST + sequence)
        count = tl.load(FIRST + sequence + 1) - low
    else:
        count = tl.cdiv(T, SIZE)
        low = sequence * count
    rows = block * BV + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        at, ok = _state_at(INIT, sequence, h, H, rows, columns, K, V)
        S = tl.load(at, mask=ok, other=0.0)
    for n in range(count):
        index = low + n
        if BACK:
            index = low + count - 1 - n
        at, ok = _state_at(OUT, index, h, H, rows, columns, K, V)
        tl.store(at, S, mask=ok)
        base = index.to(tl.int64) * H + h
        at = LOCAL + base * (LOCAL_ROWS * K) + rows[:, None] * K + columns[None, :]
        ok = (rows[:, None] < V) & (columns[None, :] < K)
        local = tl.load(at, mask=ok, other=0.0)
        if DELTA:
            r = tl.arange(0, BK)
            place = r[:, None] * K + columns[None, :]
            if BACK:
                place = r[None, :] * K + columns[:, None]
            source = LINK + base * (LINK_ROWS * K) + LINK_ROW * K + place
            link = tl.load(source, mask=(r[:, None] < K) & (columns[None, :] < K), other=0.0)
            S = tl.dot(S, link, local, input_precision=PRECISION)
        elif DECAY == CHANNEL:
            factor = tl.load(LINK + base * K + columns, mask=columns < K, other=0.0)
            S = S * tl.exp(factor)[None, :] + local
        elif DECAY == HEAD:
            S = S * tl.exp(tl.load(LINK + base)) + local
        else:
            S += local
    if not BACK:
        at, ok = _state_at(FINAL, sequence, h, H, rows, columns, K, V)
        tl.store(at, S, mask=ok)
