"""The passes over time: the state carried through the chunks of a segment, and its gradient.

The state stands transposed, ``[BV,K]`` in float32 registers: a program owns BV of its value
columns. Products then take the state and the new values as their left operand, from registers.
Per chunk, with A, P, QG, KG and KW of :mod:`prepare` (D = v without the delta rule):

    U = beta (v - KW S)       D = U + P U         o = QG S + A D     S <- exp(G_end) S + KG^T D
    dD = A^T do + KG dS       F = dD + P^T dD     dS <- exp(G_end) dS + QG^T do - KW^T beta F

For a decay per head QG, KG and KW are q and k, and the factors are put on what they meet. Without
``A`` (FUSE: short sequences, no delta rule) the scores are computed here, one launch in all.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    betas,
    block,
    bulk,
    bulk_block,
    fade,
    gate_row,
    gates,
    halved,
    kernel,
    put_t,
    segment,
    whole_gate,
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


@triton.jit
def _operand(
    X, GATED, t, left, heads, hx, chunk, H, h,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """q or k of a chunk: the gated one that prepare wrote, or X itself."""
    if DECAY == CHANNEL:
        return block(GATED, chunk, H, h, 0, K, C, BK)
    else:
        return bulk(X, t, left, heads, hx, 0, K, C, BK, BULK)


@kernel
def scan(
    Q, K_, V_, G_, A, AL, P, BS, BD, QG, KG, KW, GS, GD, INIT, TABLE,
    O, D_, HS, FINAL, LOCAL, TOTAL,
    scale, T, SIZE, H, HQ, HK, HV, HD,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr, SPLIT: tl.constexpr,
    FUSE: tl.constexpr, FINE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one head, BV columns of the state.

    FINE lets the scores and D enter o as two bfloat16 each, their rounding as the second, and
    where no decay fades what the state has lost the state and what is written to it, too.

    OUTPUT writes o; KEEP the state before every chunk (HS) and, for the delta rule, D; END the
    state after the last segment of a sequence. SPLIT starts every segment from zero (HAS_INIT then
    says whether a state will come in) and writes its own final state to LOCAL, for the delta rule
    beside its transition (further columns, from the identity), else beside its decay (TOTAL).
    """
    FINER: tl.constexpr = FINE and not (DELTA and DECAY == HEAD)
    blocks: tl.constexpr = (V + BV - 1) // BV
    links: tl.constexpr = (K + BV - 1) // BV if SPLIT and DELTA else 0
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // (blocks + links)
    part = pid % (blocks + links)
    first, end, sequence, opens, closes, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = part * BV + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    hq, hk, hv, hd = h * HQ // H, h * HK // H, h * HV // H, h * HD // H

    S = tl.zeros([BV, BK], tl.float32)
    if SPLIT and DELTA:
        S = tl.where(columns[None, :] == rows[:, None] - blocks * BV, 1.0, 0.0)
    if HAS_INIT and not SPLIT:
        at, ok = _state_at(INIT, index, h, H, rows, columns, K, V)
        S = tl.load(at, mask=ok, other=0.0)
    if DECAY == CHANNEL:
        total = tl.full([BK], 1.0, tl.float32)
    else:
        total = 1.0

    i = tl.arange(0, C)[None, :]
    j = tl.arange(0, C)[:, None]
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    if SPLIT and DELTA:
        # Not needed: the last segment's own result, and the first one's transition of no state.
        idle = closes & (part < blocks)
        if not HAS_INIT:
            idle = idle | (opens & (part >= blocks))
        chunks = tl.where(idle, 0, chunks)
    whole = 1.0
    if DECAY == HEAD and not FUSE:
        whole = whole_gate(G_, GS, first, chunks, HD, hd, chunk, H, h, C, FUSE)
    for n in range(chunks):
        t = first + n * C
        left = end - t
        if DECAY == HEAD:
            if FUSE:
                whole = whole_gate(G_, GS, t, left, HD, hd, chunk, H, h, C, FUSE)
            else:  # a step ahead, since it is read when all else waits
                later = whole_gate(G_, GS, t, left - C, HD, hd, chunk + n + 1, H, h, C, FUSE)
        k = _operand(K_, KG, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
        kind = k.dtype
        if FINER:
            Sd, Sl = halved(S)
        else:
            Sd = S.to(kind)
        if KEEP:
            _keep(HS, Sd, chunk + n, h, H, rows, columns, K, V)
        # A transition's columns carry no values.
        values = part < blocks
        v = bulk(
            V_, tl.where(values, t, 1 << 30), tl.where(values, left, 0), HV, hv, part * BV,
            V, C, BV, BULK,
        )  # fmt: skip
        v = tl.trans(v)
        if DECAY == HEAD:
            G, rise, fall = gates(G_, GS, GD, t, left, HD, hd, chunk + n, H, h, C, FUSE, BULK)
        if DELTA:
            beta = betas(BS, BD, chunk + n, H, h, C, BULK)
            p = tl.trans(bulk_block(P, chunk + n, H, h, C, C, BULK))
            kw = k
            if DECAY == CHANNEL:
                kw = block(KW, chunk + n, H, h, 0, K, C, BK)
            read = tl.dot(Sd, tl.trans(kw), input_precision=PRECISION)
            if FINER:
                read = tl.dot(Sl, tl.trans(kw), read)
            if DECAY == HEAD:
                read *= rise
            # Turns v within the tensor cores, exactly. A difference, no accumulator: what goes
            # into operands that way is read steps ahead.
            eye = tl.where(i == j, 1.0, 0.0).to(kind)
            D = (tl.dot(v, eye, input_precision=PRECISION) - read) * beta
            D = tl.dot(D.to(kind), p, D, input_precision=PRECISION)
            if KEEP:
                put_t(D_, D, t, left, H, h, part * BV, V, C, BV)
            if FINE:
                Dd, Dl = halved(D)
            else:
                Dd = D.to(kind)
        else:
            D = v
            Dd = v
        written = Dd
        if DECAY == HEAD:
            S *= whole
            written = (D * fall).to(kind)
            total *= whole
            if not FUSE:
                whole = later
        if DECAY == CHANNEL:
            place = GS + ((chunk + n).to(tl.int64) * H + h) * (3 * K) + columns
            factor = tl.load(place, mask=columns < K, other=0.0)
            S *= factor[None, :]
            total *= factor
        S = tl.dot(written, k, S, input_precision=PRECISION)
        if FINER and DELTA:
            S = tl.dot(Dl, k, S)
        if OUTPUT:
            q = _operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
            o = tl.dot(Sd, tl.trans(q), input_precision=PRECISION)
            if FINER:
                o = tl.dot(Sl, tl.trans(q), o)
            if DECAY == HEAD:
                o *= rise * scale
            elif DECAY != CHANNEL:
                o *= scale
            if FUSE:
                a = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
                if DECAY == HEAD:
                    a *= fade(G, tl.trans(G), i >= j)
                else:
                    a = tl.where(i >= j, a, 0.0)
                if FINE:
                    a, al = halved(a)
                else:
                    a = a.to(kind)
            else:
                a = tl.trans(bulk_block(A, chunk + n, H, h, C, C, BULK))
                if FINE:
                    al = tl.trans(bulk_block(AL, chunk + n, H, h, C, C, BULK))
            o = tl.dot(Dd, a, o, input_precision=PRECISION)
            if FINE:
                o = tl.dot(Dd, al, o)
                if DELTA:
                    o = tl.dot(Dl, a, o)
            put_t(O, o, t, left, H, h, part * BV, V, C, BV)

    if SPLIT:
        at = LOCAL + (index.to(tl.int64) * H + h) * ((blocks + links) * BV * K)
        at += rows[:, None] * K + columns[None, :]
        tl.store(at, S, mask=columns[None, :] < K)
        if (not DELTA) and part == 0:
            if DECAY == CHANNEL:
                to = TOTAL + (index.to(tl.int64) * H + h) * K + columns
                tl.store(to, total, mask=columns < K)
            else:
                tl.store(TOTAL + index.to(tl.int64) * H + h, total)
    if END:
        at, ok = _state_at(FINAL, sequence, h, H, rows, columns, K, V)
        tl.store(at, S, mask=ok & (rows[:, None] < tl.where(closes, V, 0)))


@kernel
def scan_back(
    Q, K_, G_, DO, A, P, BS, BD, QG, KG, KW, GS, GD, INIT, TABLE, OUT, HS, START, LOCAL,
    scale, T, SIZE, H, HQ, HK, HD,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    SPLIT: tl.constexpr, FUSE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
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
    part = pid % blocks
    first, end, sequence, opens, _, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = part * BV + tl.arange(0, BV)
    columns = tl.arange(0, BK)
    hq, hk, hd = h * HQ // H, h * HK // H, h * HD // H

    dS = tl.zeros([BV, BK], tl.float32)
    if HAS_INIT:
        at, ok = _state_at(INIT, index, h, H, rows, columns, K, V)
        dS = tl.load(at, mask=ok, other=0.0)

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    if SPLIT:  # nothing comes before the first segment
        chunks = tl.where(opens, 0, chunks)
    whole = 1.0
    if DECAY == HEAD:
        n = tl.maximum(chunks - 1, 0)
        if not FUSE:
            whole = whole_gate(G_, GS, first, chunks, HD, hd, chunk + n, H, h, C, FUSE)
        if BULK:
            falls = gate_row(GS, 2, chunk + n, H, h, C)
    for m in range(chunks):
        n = chunks - 1 - m
        t = first + n * C
        left = end - t
        if DECAY == HEAD:
            if FUSE:
                whole = whole_gate(G_, GS, t, left, HD, hd, chunk, H, h, C, FUSE)
            else:
                later = whole_gate(G_, GS, t, n, HD, hd, chunk + n - 1, H, h, C, FUSE)
            if BULK:
                falls_later = gate_row(GS, 2, chunk + tl.maximum(n, 1) - 1, H, h, C)
        q = _operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
        kind = q.dtype
        do = tl.trans(bulk(DO, t, left, H, h, part * BV, V, C, BV, BULK))
        if DECAY == HEAD:
            G, rise, fall = gates(G_, GS, GD, t, left, HD, hd, chunk + n, H, h, C, FUSE, BULK)
        if (not SPLIT) or DELTA:
            k = _operand(K_, KG, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
            dSd = dS.to(kind)
            dD = tl.dot(dSd, tl.trans(k), input_precision=PRECISION)
            if DECAY == HEAD:
                if BULK:
                    dD *= falls
                else:
                    dD *= fall
            if FUSE:
                a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                if DECAY == HEAD:
                    a *= fade(tl.trans(G), G, i >= j)
                else:
                    a = tl.where(i >= j, a, 0.0)
                a = a.to(kind)
            else:
                a = bulk_block(A, chunk + n, H, h, C, C, BULK)
            dD = tl.dot(do, a, dD, input_precision=PRECISION)
            if not SPLIT:
                _keep(HS, dSd, chunk + n, h, H, rows, columns, K, V)
        if DECAY == HEAD:
            dS *= whole
            if not FUSE:
                whole = later
            if BULK:
                falls = falls_later
        elif DECAY == CHANNEL:
            place = GS + ((chunk + n).to(tl.int64) * H + h) * (3 * K) + columns
            dS *= tl.load(place, mask=columns < K, other=0.0)[None, :]
        if DECAY != CHANNEL:
            factor = scale
            if DECAY == HEAD:
                factor = rise * scale
            if DELTA:  # turned within the tensor cores, exactly
                eye = tl.where(i == j, 1.0, 0.0).to(kind)
                do = tl.dot(do, eye, input_precision=PRECISION)
            do = (do * factor).to(kind)
        dS = tl.dot(do, q, dS, input_precision=PRECISION)
        if DELTA:
            p = bulk_block(P, chunk + n, H, h, C, C, BULK)
            F = tl.dot(dD.to(kind), p, dD, input_precision=PRECISION)
            if not SPLIT:
                put_t(OUT, F, t, left, H, h, part * BV, V, C, BV)
            beta = betas(BS, BD, chunk + n, H, h, C, BULK)
            if DECAY == HEAD:
                beta *= rise
            kw = k
            if DECAY == CHANNEL:
                kw = block(KW, chunk + n, H, h, 0, K, C, BK)
            dS = tl.dot((F * -beta).to(kind), kw, dS, input_precision=PRECISION)
        elif not SPLIT:
            put_t(OUT, dD, t, left, H, h, part * BV, V, C, BV)

    if SPLIT:
        _keep(LOCAL, dS, index, h, H, rows, columns, K, V)
    else:
        at, ok = _state_at(START, sequence, h, H, rows, columns, K, V)
        tl.store(at, dS, mask=ok & (rows[:, None] < tl.where(opens, V, 0)))


@kernel
def combine(
    LOCAL, LINK, INIT, FIRST, OUT,
    T, SIZE, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LOCAL_ROWS: tl.constexpr, LINK_ROWS: tl.constexpr, LINK_ROW: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state (BACK: its gradient) over the segments of one sequence, exactly.

    OUT gets the state before each segment (BACK: the gradient after it). A segment adds its LOCAL
    result to its transition applied to what came in: the matrix in LINK's rows from LINK_ROW on
    for the delta rule, else the factor LINK.
    """
    pid = tl.program_id(0)
    h = tl.program_id(1)
    blocks: tl.constexpr = (V + BV - 1) // BV
    sequence = pid // blocks
    part = pid % blocks
    if PACKED:
        low = tl.load(FIRST + sequence)
        count = tl.load(FIRST + sequence + 1) - low
    else:
        count = tl.cdiv(T, SIZE)
        low = sequence * count
    rows = part * BV + tl.arange(0, BV)
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
            S = S * factor[None, :] + local
        elif DECAY == HEAD:
            S = S * tl.load(LINK + base) + local
        else:
            S += local
