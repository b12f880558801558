"""The passes over time: the state carried through the chunks of a segment, and its gradient.

The state stands transposed, ``[BV,K]`` in float32 registers: a program owns BV of its value
columns. Products then take the state and the new values as their left operand, from registers.
Per chunk, with A, P, QG, KG and KW of :mod:`prepare` (D = v without the delta rule):

    U = beta (v - KW S)       D = U + P U         o = QG S + A D     S <- exp(G_end) S + KG^T D
    dD = A^T do + KG dS       F = dD + P^T dD     dS <- exp(G_end) dS + QG^T do - KW^T beta F

For a decay per head QG, KG and KW are q and k, and the factors are put on what they meet. What goes
without the delta rule and without a decay per channel has passes of its own (:mod:`states`).
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    NONE,
    betas,
    bulk,
    bulk_block,
    bulk_put_t,
    gates,
    halved,
    kernel,
    power,
    segment,
    whole_gate,
)
from subquad.ops.recurrence.triton.state import (
    added,
    each,
    fading,
    identity,
    keep,
    met,
    moved,
    no_tiles,
    opening,
    operand,
    picked,
    product,
    put_state,
    scale_of,
)


@triton.jit
def _written(S, factor, D, fall, Dd, rest, k, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a chunk that writes D; ``rest`` is what D's rounding to Dd left, or None."""
    if DECAY != NONE:
        S = product(S, factor)
    if DECAY == HEAD:
        Dd = (D * fall).to(Dd.dtype)
    S = added(S, Dd, k, PRECISION)
    if rest is not None:
        S = added(S, rest, k, PRECISION)
    return S


@partial(kernel, length=2)
def scan(
    Q, K_, V_, A, AL, P, BS, BD, QG, KG, KW, GS, GD, INIT, TABLE,
    O, D_, HS, FINAL, LOCAL, TOTAL,
    scale, T, SIZE, H, HQ, HK, HV,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    OUTPUT: tl.constexpr, KEEP: tl.constexpr, END: tl.constexpr, SPLIT: tl.constexpr,
    FINE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one head, BV columns of the state.

    FINE lets the scores and D enter o as two bfloat16 each, their rounding as the second, and
    where no decay fades what the state has lost the state and what is written to it, too. The delta
    rule with a decay per channel lets them enter o as one float16 each beside a power of two
    (SCALED), which leaves shared memory for a third chunk.

    OUTPUT writes o; KEEP the state before every chunk (HS) and, for the delta rule, D; END the
    state after the last segment of a sequence. SPLIT starts every segment from zero (HAS_INIT then
    says whether a state will come in) and writes its own final state to LOCAL, for the delta rule
    beside its transition (further columns, from the identity), else beside its decay (TOTAL).
    """
    FINER: tl.constexpr = FINE and DECAY == NONE
    SCALED: tl.constexpr = OUTPUT and FINE and DELTA and DECAY == CHANNEL
    blocks: tl.constexpr = (V + BV - 1) // BV
    links: tl.constexpr = (K + BV - 1) // BV if SPLIT and DELTA else 0
    tiles: tl.constexpr = (K + BK - 1) // BK
    EARLY: tl.constexpr = tiles > 1
    # Three operands of a wide state leave neither registers nor shared memory to wait in.
    LEAN: tl.constexpr = SCALED and EARLY
    # Asked for after the reading, P is not waited for before; beside the outputs it takes longer.
    LATE: tl.constexpr = KEEP and tiles > 1
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // (blocks + links)
    part = pid % (blocks + links)
    first, end, sequence, opens, closes, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = part * BV + tl.arange(0, BV)
    hq, hk, hv = h * HQ // H, h * HK // H, h * HV // H

    if SPLIT and DELTA:
        S = identity(rows - blocks * BV, K, BK)
    else:
        S = opening(INIT, index, h, H, rows, K, V, BK, HAS_INIT and not SPLIT)
    gains: tl.constexpr = BK if DECAY == CHANNEL else 1
    total = no_tiles()
    for _ in tl.static_range(tiles):
        total += (tl.full([1, gains], 1.0, tl.float32),)

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
    if DECAY == HEAD:
        whole = whole_gate(GS, chunks, chunk, H, h, C)
    if DECAY == CHANNEL and not LEAN:
        whole = fading(GS, chunks, chunk, H, h, K, BK)
    if SCALED:
        size_a = scale_of(GS, chunks, chunk, H, h, K)
    for n in range(chunks):
        t = first + n * C
        left = end - t
        if DECAY == HEAD:  # a step ahead, since it is read when all else waits
            later = whole_gate(GS, left - C, chunk + n + 1, H, h, C)
        if DECAY == CHANNEL and not LEAN:
            later = fading(GS, chunks - n - 1, chunk + n + 1, H, h, K, BK)
        if SCALED:
            later_a = scale_of(GS, chunks - n - 1, chunk + n + 1, H, h, K)
        if not LEAN:
            k = operand(K_, KG, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
        # A transition's columns carry no values.
        values = part < blocks
        v = bulk(
            V_, tl.where(values, t, 1 << 30), tl.where(values, left, 0), HV, hv, part * BV,
            V, C, BV, BULK,
        )  # fmt: skip
        kind = v.dtype
        v = tl.trans(v)
        fall = None
        if DECAY == HEAD:
            rise, fall = gates(GS, GD, chunk + n, H, h, C, BULK)
        if DELTA:
            beta = betas(BS, BD, chunk + n, H, h, C, BULK)
            if not LATE:
                p = tl.trans(bulk_block(P, chunk + n, H, h, C, C, BULK))
            if DECAY != CHANNEL:
                kw = k
            elif not LEAN:
                kw = operand(K_, KW, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
        if OUTPUT and EARLY and not LEAN:
            q = operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
        read = tl.zeros([BV, C], tl.float32)
        o = tl.zeros([BV, C], tl.float32)
        if LEAN:
            read = met(S, KW, read, chunk + n, H, h, K, C, BK, PRECISION)
        for x in tl.static_range(-1 if LEAN else tiles - 1, -1, -1):
            if FINER:
                Sd, Sl = halved(S[x])
            else:
                Sd = S[x].to(kind)
            if KEEP:
                keep(HS, Sd, chunk + n, h, H, part * BV, x * BK, K, V, BV, BK, BULK)
            if DELTA:
                read = tl.dot(Sd, tl.trans(kw[x]), read, input_precision=PRECISION)
                if FINER:
                    read = tl.dot(Sl, tl.trans(kw[x]), read)
            if OUTPUT and EARLY:
                o = tl.dot(Sd, tl.trans(q[x]), o, input_precision=PRECISION)
                if FINER:
                    o = tl.dot(Sl, tl.trans(q[x]), o)
        if DELTA:
            if LATE:
                p = tl.trans(bulk_block(P, chunk + n, H, h, C, C, BULK))
            if DECAY == HEAD:
                read *= rise
            # Turns v within the tensor cores, exactly. A difference, no accumulator: what goes
            # into operands that way is read steps ahead.
            eye = tl.where(i == j, 1.0, 0.0).to(kind)
            D = (tl.dot(v, eye, input_precision=PRECISION) - read) * beta
            D = tl.dot(D.to(kind), p, D, input_precision=PRECISION)
            if KEEP:
                bulk_put_t(D_, D, t, left, H, h, part * BV, V, C, BV, BULK)
            if FINE:
                Dd, Dl = halved(D)
            else:
                Dd = D.to(kind)
        else:
            D = v
            Dd = v
        rest = Dl if FINE and DELTA and DECAY != HEAD else None
        factor = None
        if DECAY == HEAD:
            factor = each(whole, tiles)
        if DECAY == CHANNEL and not LEAN:
            factor = whole
        if DECAY != NONE and not LEAN:
            total = product(total, factor)
            whole = later
        if not EARLY:  # fewer values live at once than with the outputs first
            S = _written(S, factor, D, fall, Dd, rest, k, DECAY, PRECISION)
        if OUTPUT:
            if not EARLY:
                q = operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
                o = tl.dot(Sd, tl.trans(q[0]), input_precision=PRECISION)
                if FINER:
                    o = tl.dot(Sl, tl.trans(q[0]), o)
            if DECAY == HEAD:
                o *= rise * scale
            elif DECAY != CHANNEL:
                o *= scale
            if not SCALED:
                a = tl.trans(bulk_block(A, chunk + n, H, h, C, C, BULK))
                if FINE:
                    al = tl.trans(bulk_block(AL, chunk + n, H, h, C, C, BULK))
            if SCALED:
                size, inverse_size = power(tl.max(tl.abs(D), axis=1))
                a = tl.trans(bulk_block(AL, chunk + n, H, h, C, C, BULK))
                inner = tl.dot((D * inverse_size[:, None]).to(tl.float16), a)
                inner *= (size * size_a)[:, None]
                if LEAN:
                    o = met(S, QG, inner, chunk + n, H, h, K, C, BK, PRECISION)
                else:
                    o += inner
                size_a = later_a
            else:
                o = tl.dot(Dd, a, o, input_precision=PRECISION)
                if FINE:
                    o = tl.dot(Dd, al, o)
                    if DELTA:
                        o = tl.dot(Dl, a, o)
            bulk_put_t(O, o, t, left, H, h, part * BV, V, C, BV, BULK and EARLY)
        if LEAN:
            S = moved(S, GS, KG, Dd, rest, chunk + n, H, h, K, C, BK, PRECISION)
        elif EARLY:
            S = _written(S, factor, D, fall, Dd, rest, k, DECAY, PRECISION)

    if SPLIT:
        to = TOTAL + (index.to(tl.int64) * H + h) * (K if DECAY == CHANNEL else 1)
        for x in tl.static_range(tiles):
            columns = x * BK + tl.arange(0, BK)[None, :]
            at = LOCAL + (index.to(tl.int64) * H + h) * ((blocks + links) * BV * K)
            tl.store(at + rows[:, None] * K + columns, S[x], mask=columns < K)
            if (not DELTA) and (x == 0 or DECAY == CHANNEL):
                columns = x * BK + tl.arange(0, gains)[None, :]
                tl.store(to + columns, total[x], mask=columns < tl.where(part == 0, K, 0))
    if END:
        put_state(FINAL, S, sequence, h, H, rows, tl.where(closes, V, 0), K, V, BK)


@triton.jit
def _carried(
    after, s, LINK, y, K: tl.constexpr, BK: tl.constexpr, BACK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each tile of ``after`` with s, tile y of the state before, times the transition LINK."""
    found = no_tiles()
    r = y * BK + tl.arange(0, BK)
    for x in tl.static_range(len(after)):
        columns = x * BK + tl.arange(0, BK)
        place = r[:, None] * K + columns[None, :]
        if BACK:
            place = columns[None, :] * K + r[:, None]
        ok = (r[:, None] < K) & (columns[None, :] < K)
        link = tl.load(LINK + place, mask=ok, other=0.0)
        found += (tl.dot(s, link, after[x], input_precision=PRECISION),)
    return found


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
    for the delta rule, else LINK's factor of every channel.
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
    tiles: tl.constexpr = (K + BK - 1) // BK
    S = opening(INIT, sequence, h, H, rows, K, V, BK, HAS_INIT)
    for n in range(count):
        index = low + n
        if BACK:
            index = low + count - 1 - n
        put_state(OUT, S, index, h, H, rows, V, K, V, BK)
        base = index.to(tl.int64) * H + h
        after = no_tiles()
        for x in tl.static_range(tiles):
            columns = x * BK + tl.arange(0, BK)
            at = LOCAL + base * (LOCAL_ROWS * K) + rows[:, None] * K + columns[None, :]
            ok = (rows[:, None] < V) & (columns[None, :] < K)
            s = tl.load(at, mask=ok, other=0.0)
            if not DELTA:
                factor = tl.load(LINK + base * K + columns, mask=columns < K, other=0.0)
                s += S[x] * factor[None, :]
            after += (s,)
        if DELTA:
            source = LINK + base * (LINK_ROWS * K) + LINK_ROW * K
            for y in range(tiles):  # written out, it takes four times as long to compile
                after = _carried(after, picked(S, y), source, y, K, BK, BACK, PRECISION)
        S = after
