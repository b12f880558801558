"""The kernel of dq for Hopper, by tiles of queries."""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from subquad.ops.attention.triton.hopper.tiles import (
    LOG2E,
    SIZES,
    TILE,
    announced,
    apart,
    barriers,
    copy_for_queries,
    hold,
    masked_keys,
    queries_of,
    store_rows,
    tile_slots,
)
from subquad.ops.attention.triton.walk import (
    band_of,
    padded,
    start_of,
    steps,
)
from subquad.ops.kernel import Kernel


@gluon.jit
def _add_full(
    dq, q, do, lse, delta, k_s, v_s, full, free, t, scale, a, c,
    LAYOUT: gl.constexpr, LEFT: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The keys of the run ``a..c``, which every query sees. What a step adds to dq is multiplied
    beside the next step's scores."""
    none = gl.zeros([64, BN], gl.float32, LAYOUT)
    ds_left = gl.zeros([64, BN], k_s.dtype, LEFT)
    n = steps(a, c, BN, TILE, KIND)
    for i in range(n):
        at = (t + i) % STAGES
        was = (t + gl.maximum(i - 1, 0)) % STAGES
        mbarrier.wait(full.index(at), (t + i) // STAGES & 1)
        s_next = warpgroup_mma(q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        dq_next = warpgroup_mma(ds_left, k_s.index(was), dq, is_async=True)
        dw_next = warpgroup_mma(
            do, v_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(2, deps=[s_next])
        w = hold(gl.exp2(s * scale - lse[:, None]))
        dq, dw, w = warpgroup_mma_wait(0, deps=[dq_next, dw_next, w])
        if i > 0:
            mbarrier.arrive(free.index(was), count=1)
        ds = w * (dw - delta[:, None])
        ds_left = gl.convert_layout(ds.to(k_s.dtype), LEFT)
    if n > 0:
        last = (t + n - 1) % STAGES
        dq = warpgroup_mma(ds_left, k_s.index(last), dq)
        mbarrier.arrive(free.index(last), count=1)
    return dq, t + n


@gluon.jit
def _add_partial(
    dq, q, do, lse, delta, k_s, v_s, full, free, m_local, p, begin, end, x, low, high,
    t, S, scale, ENTRY, PATTERN, TABLE, a, c, turn, skip,
    LAYOUT: gl.constexpr, LEFT: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The keys of the run ``a..c``, of which not every query sees all."""
    none = gl.zeros([64, BN], gl.float32, LAYOUT)
    for i in range(steps(a, c, BN, TILE, KIND)):
        at = (t + i) % STAGES
        mbarrier.wait(full.index(at), (t + i) // STAGES & 1)
        start = start_of(ENTRY, i, a, c, turn, skip, BN, TILE, TILE, KIND)
        if apart(x, start, low, high, 64, BN) == 0:
            s_next = warpgroup_mma(
                q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            dw_next = warpgroup_mma(
                do, v_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(1, deps=[s_next])
            s = masked_keys(
                s * scale - lse[:, None], i, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE,
                a, c, turn, skip, LAYOUT, BN, KIND,
            )  # fmt: skip
            w = hold(gl.exp2(s))
            dw, w = warpgroup_mma_wait(0, deps=[dw_next, w])
            ds = w * (dw - delta[:, None])
            ds_left = gl.convert_layout(ds.to(k_s.dtype), LEFT)
            dq = warpgroup_mma(ds_left, k_s.index(at), dq)
        mbarrier.arrive(free.index(at), count=1)
    return dq, t + steps(a, c, BN, TILE, KIND)


@gluon.jit
def _dq_rows(
    W: gl.constexpr, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
    full, free, tile_s, tile_full, tile_free, LSE2, DELTA, DQ,
    LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
    tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    HELD: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    m_local = W * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    n = 0
    t = 0
    tile = announced(n, tile_s, tile_full, tile_free)
    while tile < tiles:
        phase = n & 1
        b, h, token, a, m, c, d, turn, skip = queries_of(
            tile, LO, MID, HI, PLANE, T, S, H, rows, NB, NH, offset, low, high, BN, KIND
        )
        p = token + m_local + offset
        begin, end = band_of(p, low, high, S)
        at = (b.to(gl.int64) * H + h) * padded(T) + token + m_local
        lse = gl.load(LSE2 + at)
        delta = gl.load(DELTA + at)
        dq = gl.zeros([64, D], gl.float32, OUT)
        mbarrier.wait(q_full.index(W), phase)
        q = q_s.index(W).load(HELD)
        mbarrier.arrive(q_free.index(W), count=1)
        mbarrier.wait(do_full.index(W), phase)
        do = do_s.index(W).load(HELD)
        mbarrier.arrive(do_free.index(W), count=1)
        dq, t = _add_full(
            dq, q, do, lse, delta, k_s, v_s, full, free, t, scale * LOG2E, a, m,
            LAYOUT, LEFT, BN, KIND, STAGES,
        )  # fmt: skip
        dq, t = _add_partial(
            dq, q, do, lse, delta, k_s, v_s, full, free, m_local, p, begin, end,
            token + W * 64 + offset, low, high, t, S, scale * LOG2E, ENTRY, PATTERN, TABLE,
            c, d, turn, skip, LAYOUT, LEFT, BN, KIND, STAGES,
        )  # fmt: skip
        store_rows(DQ, dq * scale, b.to(gl.int64) * T, token + W * 64, T, H, h, D)
        n += 1
        tile = announced(n, tile_s, tile_full, tile_free)


@partial(Kernel, sizes=("tiles", *SIZES), jit=gluon.jit)
def hopper_grad_q(
    QT, DOT, KT, VT, LSE2, DELTA, DQ, TAKEN, LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, in tiles of 128 queries of one head. DQ ``[B,T,H,D]`` is contiguous; TAKEN is 0."""
    q_s = gl.allocate_shared_memory(QT.dtype, [2, 64, D], QT.layout)
    do_s = gl.allocate_shared_memory(DOT.dtype, [2, 64, D], DOT.layout)
    k_s = gl.allocate_shared_memory(KT.dtype, [STAGES, BN, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [STAGES, BN, D], VT.layout)
    q_full, q_free = barriers(2, 1), barriers(2, 1)
    do_full, do_free = barriers(2, 1), barriers(2, 1)
    full, free = barriers(STAGES, 2), barriers(STAGES, 2)
    tile_s, tile_full, tile_free = tile_slots()
    gl.warp_specialize(
        [
            (_dq_rows, (
                0, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                full, free, tile_s, tile_full, tile_free, LSE2, DELTA, DQ,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (_dq_rows, (
                1, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                full, free, tile_s, tile_full, tile_free, LSE2, DELTA, DQ,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (copy_for_queries, (
                QT, DOT, KT, VT, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                full, full, free, free, tile_s, tile_full, tile_free, TAKEN,
                LO, MID, HI, ENTRY, PLANE,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
