"""The gradient of :mod:`scan`'s state, carried back through the chunks of a segment."""

from functools import partial

import triton.language as tl

from subquad.ops.recurrence.triton.parts import (
    CHANNEL,
    HEAD,
    betas,
    bulk,
    bulk_block,
    bulk_put_t,
    gate_row,
    gates,
    kernel,
    segment,
    whole_gate,
)
from subquad.ops.recurrence.triton.state import (
    added,
    each,
    fades,
    fading,
    keep,
    opening,
    operand,
    product,
    put_state,
)


@partial(kernel, length=2)
def scan_back(
    Q, K_, DO, A, P, BS, BD, QG, KG, KW, GS, GD, INIT, TABLE, OUT, HS, START, LOCAL,
    scale, T, SIZE, H, HQ, HK,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr, HAS_INIT: tl.constexpr,
    SPLIT: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's gradient from a segment's end to its start.

    INIT is the gradient at the end of each segment. Writes HS, the gradient after every chunk;
    OUT, that is F for the delta rule and dv else; START, the gradient at the start of a sequence.
    SPLIT starts every segment from zero and writes only its result, to LOCAL.
    """
    # Three gated operands of three chunks leave no room to store by the copy engine.
    STORE: tl.constexpr = BULK and not (DELTA and DECAY == CHANNEL)
    blocks: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    h = tl.program_id(1)
    index = pid // blocks
    part = pid % blocks
    first, end, sequence, opens, _, chunk = segment(TABLE, index, T, SIZE, C, PACKED)
    rows = part * BV + tl.arange(0, BV)
    hq, hk = h * HQ // H, h * HK // H

    dS = opening(INIT, index, h, H, rows, K, V, BK, HAS_INIT)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    chunks = tl.cdiv(end - first, C).to(tl.int32)
    if SPLIT:  # nothing comes before the first segment
        chunks = tl.where(opens, 0, chunks)
    whole = 1.0
    if DECAY == HEAD:
        n = tl.maximum(chunks - 1, 0)
        whole = whole_gate(GS, chunks, chunk + n, H, h, C)
        if BULK:
            falls = gate_row(GS, 2, chunk + n, H, h, C)
    if DECAY == CHANNEL and tiles == 1:
        whole = fading(GS, chunks, chunk + tl.maximum(chunks, 1) - 1, H, h, K, BK)
    for m in range(chunks):
        n = chunks - 1 - m
        t = first + n * C
        left = end - t
        if DECAY == HEAD:
            later = whole_gate(GS, n, chunk + n - 1, H, h, C)
            if BULK:
                falls_later = gate_row(GS, 2, chunk + tl.maximum(n, 1) - 1, H, h, C)
        if DECAY == CHANNEL and tiles == 1:
            later = fading(GS, n, chunk + n - 1, H, h, K, BK)
        if DECAY == CHANNEL and tiles == 1:
            q = operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
        do = tl.trans(bulk(DO, t, left, H, h, part * BV, V, C, BV, BULK))
        kind = do.dtype
        if DECAY == HEAD:
            rise, fall = gates(GS, GD, chunk + n, H, h, C, BULK)
        if (not SPLIT) or DELTA:
            k = operand(K_, KG, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
            dD = tl.zeros([BV, C], tl.float32)
            for x in tl.static_range(tiles - 1, -1, -1):  # as in scan
                dSd = dS[x].to(kind)
                dD = tl.dot(dSd, tl.trans(k[x]), dD, input_precision=PRECISION)
                if not SPLIT:
                    keep(HS, dSd, chunk + n, h, H, part * BV, x * BK, K, V, BV, BK, STORE)
            if DECAY == HEAD:
                if BULK:
                    dD *= falls
                else:
                    dD *= fall
            a = bulk_block(A, chunk + n, H, h, C, C, BULK)
            dD = tl.dot(do, a, dD, input_precision=PRECISION)
        if DECAY != CHANNEL:
            factor = scale
            if DECAY == HEAD:
                factor = rise * scale
            if DELTA:  # turned within the tensor cores, exactly
                eye = tl.where(i == j, 1.0, 0.0).to(kind)
                do = tl.dot(do, eye, input_precision=PRECISION)
            do = (do * factor).to(kind)
        if DELTA:
            p = bulk_block(P, chunk + n, H, h, C, C, BULK)
            F = tl.dot(dD.to(kind), p, dD, input_precision=PRECISION)
            if not SPLIT:
                bulk_put_t(OUT, F, t, left, H, h, part * BV, V, C, BV, STORE)
            beta = betas(BS, BD, chunk + n, H, h, C, BULK)
            if DECAY == HEAD:
                beta *= rise
            back = (F * -beta).to(kind)
            kw = k
            if DECAY == CHANNEL:
                kw = operand(K_, KW, t, left, HK, hk, chunk + n, H, h, K, C, BK, DECAY, BULK)
        elif not SPLIT:
            bulk_put_t(OUT, dD, t, left, H, h, part * BV, V, C, BV, STORE)
        if DECAY != CHANNEL or tiles > 1:  # asked for last, it is waited for last
            q = operand(Q, QG, t, left, HQ, hq, chunk + n, H, h, K, C, BK, DECAY, BULK)
        if DECAY == HEAD:
            dS = product(dS, each(whole, tiles))
        if DECAY == CHANNEL and tiles == 1:
            dS = product(dS, whole)
            whole = later
        if DECAY == CHANNEL and tiles > 1:
            dS = product(dS, fades(GS, chunk + n, H, h, K, BK))
        dS = added(dS, do, q, PRECISION)
        if DELTA:
            dS = added(dS, back, kw, PRECISION)
        if DECAY == HEAD:
            whole = later
            if BULK:
                falls = falls_later

    if SPLIT:
        for x in tl.static_range(tiles):
            keep(LOCAL, dS[x], index, h, H, part * BV, x * BK, K, V, BV, BK, False)
    else:
        put_state(START, dS, sequence, h, H, rows, tl.where(opens, V, 0), K, V, BK)
