"""The backward kernels for Hopper: dq by tiles of queries, dk and dv by tiles of keys."""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from subquad.ops.attention.triton.hopper.tiles import (
    BAND,
    LOG2E,
    SIZES,
    TILE,
    barriers,
    copy_for_queries,
    fetch_halves,
    keep_coming,
    masked_keys,
    queries_of,
    store_rows,
)
from subquad.ops.attention.triton.walk import (
    band_of,
    band_runs,
    kept,
    listed_runs,
    padded,
    plane_of,
    start_of,
    steps,
)
from subquad.ops.kernel import Kernel


@gluon.jit
def _add_to_dq(
    dq, q, do, lse, delta, k_s, v_s, k_full, v_full, k_free, v_free, m_local, p, begin, end,
    t, S, scale, ENTRY, PATTERN, TABLE, a, c, turn, skip,
    LAYOUT: gl.constexpr, LEFT: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    none = gl.zeros([64, BN], gl.float32, LAYOUT)
    for i in range(steps(a, c, BN, TILE, KIND)):
        at = (t + i) % STAGES
        phase = (t + i) // STAGES & 1
        mbarrier.wait(k_full.index(at), phase)
        s_next = warpgroup_mma(q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(at), phase)
        dw_next = warpgroup_mma(
            do, v_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=[s_next])
        s = s * scale - lse[:, None]
        if MASKED:
            s = masked_keys(
                s, i, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE, a, c, turn, skip,
                LAYOUT, BN, KIND,
            )  # fmt: skip
        w = gl.exp2(s)
        dw, w = warpgroup_mma_wait(0, deps=[dw_next, w])
        mbarrier.arrive(v_free.index(at), count=1)
        ds = w * (dw - delta[:, None])
        ds_left = gl.convert_layout(ds.to(k_s.dtype), LEFT)
        dq = warpgroup_mma(ds_left, k_s.index(at), dq)
        mbarrier.arrive(k_free.index(at), count=1)
    return dq, t + steps(a, c, BN, TILE, KIND)


@gluon.jit
def _dq_rows(
    W: gl.constexpr, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
    k_full, v_full, k_free, v_free, LSE2, DELTA, DQ,
    LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
    tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    m_local = W * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    q = q_s.index(W)
    do = do_s.index(W)
    t = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        phase = tile // gl.num_programs(0) & 1
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
        mbarrier.wait(do_full.index(W), phase)
        dq, t = _add_to_dq(
            dq, q, do, lse, delta, k_s, v_s, k_full, v_full, k_free, v_free,
            m_local, p, begin, end, t, S, scale * LOG2E, ENTRY, PATTERN, TABLE, a, m, m - a, 0,
            LAYOUT, LEFT, BN, KIND, False, STAGES,
        )  # fmt: skip
        dq, t = _add_to_dq(
            dq, q, do, lse, delta, k_s, v_s, k_full, v_full, k_free, v_free,
            m_local, p, begin, end, t, S, scale * LOG2E, ENTRY, PATTERN, TABLE, c, d, turn, skip,
            LAYOUT, LEFT, BN, KIND, True, STAGES,
        )  # fmt: skip
        mbarrier.arrive(q_free.index(W), count=1)
        mbarrier.arrive(do_free.index(W), count=1)
        store_rows(DQ, dq * scale, b.to(gl.int64) * T, token + W * 64, T, H, h, D)


@partial(Kernel, sizes=("tiles", *SIZES), jit=gluon.jit)
def hopper_grad_q(
    QT, DOT, KT, VT, LSE2, DELTA, DQ, LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, in tiles of 128 queries of one head. DQ ``[B,T,H,D]`` is contiguous."""
    q_s = gl.allocate_shared_memory(QT.dtype, [2, 64, D], QT.layout)
    do_s = gl.allocate_shared_memory(DOT.dtype, [2, 64, D], DOT.layout)
    k_s = gl.allocate_shared_memory(KT.dtype, [STAGES, BN, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [STAGES, BN, D], VT.layout)
    q_full, q_free = barriers(2, 1), barriers(2, 1)
    do_full, do_free = barriers(2, 1), barriers(2, 1)
    k_full, k_free = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_free = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_dq_rows, (
                0, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                k_full, v_full, k_free, v_free, LSE2, DELTA, DQ,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (_dq_rows, (
                1, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                k_full, v_full, k_free, v_free, LSE2, DELTA, DQ,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (copy_for_queries, (
                QT, DOT, KT, VT, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
                k_full, v_full, k_free, v_free, LO, MID, HI, ENTRY, PLANE,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _keys_of(tile, S, G):
    """The tile's batch row, head of keys and block."""
    blocks = gl.cdiv(S, TILE)
    return tile // blocks // G, tile // blocks % G, tile % blocks


@gluon.jit
def _runs_of_keys(
    LO, MID, HI, PLANE, b, h, block, S, T, H, NB, NH, offset, low, high,
    BM: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The runs of queries of head h that a block of keys walks."""
    if KIND == BAND:
        y = block * TILE - offset
        return band_runs(y, y + TILE - 1, -high, -low, T, 0, 1, BM)
    else:
        own = plane_of(PLANE, b, h, H, NB, NH) * gl.cdiv(S, TILE) + block
        return listed_runs(LO, MID, HI, own, 0, 1)


@gluon.jit
def _copy_for_keys(
    QT, DOT, KT, VT, q_s, do_s, k_s, v_s, k_full, v_full, k_free, v_free,
    q_full, do_full, q_free, do_free, LO, MID, HI, ROW, PLANE,
    tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    t = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n = tile // gl.num_programs(0)
        b, g, block = _keys_of(tile, S, G)
        fetch_halves(KT, b * S + block * TILE, g * D, k_full, k_free, k_s, n)
        fetch_halves(VT, b * S + block * TILE, g * D, v_full, v_free, v_s, n)
        for j in range(H // G):
            h = g * (H // G) + j
            a, m, c, d, turn, skip = _runs_of_keys(
                LO, MID, HI, PLANE, b, h, block, S, T, H, NB, NH, offset, low, high, BM, KIND
            )
            t = keep_coming(
                QT, DOT, q_s, do_s, q_full, do_full, q_free, do_free, b * T, h * D, t,
                ROW, a, m, m - a, 0, BM, KIND, STAGES,
            )  # fmt: skip
            t = keep_coming(
                QT, DOT, q_s, do_s, q_full, do_full, q_free, do_free, b * T, h * D, t,
                ROW, c, d, turn, skip, BM, KIND, STAGES,
            )  # fmt: skip


@gluon.jit
def _add_to_dkv(
    dk, dv, k, v, q_s, do_s, q_full, do_full, q_free, do_free, key, begin, end, LSE2, DELTA,
    t, T, S, offset, scale, ROW, PATTERN, TABLE, a, c, turn, skip,
    W: gl.constexpr, LAYOUT: gl.constexpr, LEFT: gl.constexpr, BM: gl.constexpr,
    KIND: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of the run ``a..c`` added to dk and dv; keys are rows, queries columns."""
    none = gl.zeros([64, BM], gl.float32, LAYOUT)
    for i in range(steps(a, c, BM, TILE, KIND)):
        at = (t + i) % STAGES
        phase = (t + i) // STAGES & 1
        start = start_of(ROW, i, a, c, turn, skip, BM, TILE, TILE, KIND)
        token = start + gl.arange(0, BM, layout=gl.SliceLayout(0, LAYOUT))
        lse = gl.load(LSE2 + token)
        mbarrier.wait(q_full.index(at), phase)
        s_next = warpgroup_mma(k, q_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(at), phase)
        dw_next = warpgroup_mma(
            v, do_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=[s_next])
        delta = gl.load(DELTA + token)
        s = s * scale - lse[None, :]
        if MASKED:
            keep = kept(
                (token % TILE)[None, :], (token + offset)[None, :], (key % TILE)[:, None],
                key[:, None], S, token[None, :], begin[:, None], end[:, None],
                PATTERN, TABLE, a + i // (TILE // BM), W * 64, 64, TILE, KIND,
            )  # fmt: skip
            s = gl.where(keep, s, float("-inf"))
        w = gl.exp2(s)
        w_left = gl.convert_layout(w.to(k.dtype), LEFT)
        dv_next = warpgroup_mma(w_left, do_s.index(at), dv, is_async=True)
        dw = warpgroup_mma_wait(1, deps=[dw_next])
        ds = w * (dw - delta[None, :])
        ds_left = gl.convert_layout(ds.to(k.dtype), LEFT)
        dk_next = warpgroup_mma(ds_left, q_s.index(at), dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, deps=[dv_next, dk_next])
        mbarrier.arrive(q_free.index(at), count=1)
        mbarrier.arrive(do_free.index(at), count=1)
    return dk, dv, t + steps(a, c, BM, TILE, KIND)


@gluon.jit
def _dkv_rows(
    W: gl.constexpr, q_s, do_s, k_s, v_s, k_full, v_full, k_free, v_free,
    q_full, do_full, q_free, do_free, LSE2, DELTA, DK, DV,
    LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
    tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    k = k_s.index(W)
    v = v_s.index(W)
    t = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        phase = tile // gl.num_programs(0) & 1
        b, g, block = _keys_of(tile, S, G)
        row = block * TILE + W * 64
        key = row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        begin, end = band_of(key - offset, -high, -low, T)
        dk = gl.zeros([64, D], gl.float32, OUT)
        dv = gl.zeros([64, D], gl.float32, OUT)
        mbarrier.wait(k_full.index(W), phase)
        mbarrier.wait(v_full.index(W), phase)
        for j in range(H // G):
            h = g * (H // G) + j
            a, m, c, d, turn, skip = _runs_of_keys(
                LO, MID, HI, PLANE, b, h, block, S, T, H, NB, NH, offset, low, high, BM, KIND
            )
            first = (b.to(gl.int64) * H + h) * padded(T)
            dk, dv, t = _add_to_dkv(
                dk, dv, k, v, q_s, do_s, q_full, do_full, q_free, do_free, key, begin, end,
                LSE2 + first, DELTA + first, t, T, S, offset, scale * LOG2E, ROW, PATTERN, TABLE,
                a, m, m - a, 0, W, LAYOUT, LEFT, BM, KIND, False, STAGES,
            )  # fmt: skip
            dk, dv, t = _add_to_dkv(
                dk, dv, k, v, q_s, do_s, q_full, do_full, q_free, do_free, key, begin, end,
                LSE2 + first, DELTA + first, t, T, S, offset, scale * LOG2E, ROW, PATTERN, TABLE,
                c, d, turn, skip, W, LAYOUT, LEFT, BM, KIND, True, STAGES,
            )  # fmt: skip
        mbarrier.arrive(k_free.index(W), count=1)
        mbarrier.arrive(v_free.index(W), count=1)
        store_rows(DK, dk * scale, b.to(gl.int64) * S, row, S, G, g, D)
        store_rows(DV, dv, b.to(gl.int64) * S, row, S, G, g, D)


@partial(Kernel, sizes=("tiles", *SIZES), jit=gluon.jit)
def hopper_grad_kv(
    QT, DOT, KT, VT, LSE2, DELTA, DK, DV, LO, MID, HI, ROW, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv, in tiles of 128 keys of one head of keys. DK and DV ``[B,S,G,D]`` are
    contiguous."""
    k_s = gl.allocate_shared_memory(KT.dtype, [2, 64, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [2, 64, D], VT.layout)
    q_s = gl.allocate_shared_memory(QT.dtype, [STAGES, BM, D], QT.layout)
    do_s = gl.allocate_shared_memory(DOT.dtype, [STAGES, BM, D], DOT.layout)
    k_full, k_free = barriers(2, 1), barriers(2, 1)
    v_full, v_free = barriers(2, 1), barriers(2, 1)
    q_full, q_free = barriers(STAGES, 1), barriers(STAGES, 2)
    do_full, do_free = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_dkv_rows, (
                0, q_s, do_s, k_s, v_s, k_full, v_full, k_free, v_free,
                q_full, do_full, q_free, do_free, LSE2, DELTA, DK, DV,
                LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
            (_dkv_rows, (
                1, q_s, do_s, k_s, v_s, k_full, v_full, k_free, v_free,
                q_full, do_full, q_free, do_free, LSE2, DELTA, DK, DV,
                LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
            (_copy_for_keys, (
                QT, DOT, KT, VT, q_s, do_s, k_s, v_s, k_full, v_full, k_free, v_free,
                q_full, do_full, q_free, do_free, LO, MID, HI, ROW, PLANE,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
