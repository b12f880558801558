"""The kernel of dk and dv for Hopper, by tiles of keys."""

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
    announce,
    announced,
    apart,
    barriers,
    fetch_halves,
    hold,
    keep_coming,
    store_rows,
    tile_slots,
)
from subquad.ops.attention.triton.walk import (
    band_of,
    band_runs,
    kept,
    listed_runs,
    plane_of,
    start_of,
    steps,
)
from subquad.ops.kernel import Kernel


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
    QT, DOT, KT, VT, LSE_T, DELTA_T, q_s, do_s, k_s, v_s, lse_s, delta_s,
    k_full, v_full, k_free, v_free, full, free, tile_s, tile_full, tile_free, TAKEN,
    LO, MID, HI, ROW, PLANE,
    tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    n = 0
    t = 0
    tile = gl.program_id(0)
    while tile < tiles:
        announce(tile, n, tile_s, tile_full, tile_free)
        b, g, block = _keys_of(tile, S, G)
        fetch_halves(KT, b * S + block * TILE, g * D, k_full, k_free, k_s, n)
        fetch_halves(VT, b * S + block * TILE, g * D, v_full, v_free, v_s, n)
        for j in range(H // G):
            h = g * (H // G) + j
            a, m, c, d, turn, skip = _runs_of_keys(
                LO, MID, HI, PLANE, b, h, block, S, T, H, NB, NH, offset, low, high, BM, KIND
            )
            t = keep_coming(
                QT, DOT, q_s, do_s, full, full, free, free, LSE_T, DELTA_T, lse_s, delta_s,
                b * H + h, b * T, h * D, t, ROW, a, m, m - a, 0, BM, KIND, STAGES,
            )  # fmt: skip
            t = keep_coming(
                QT, DOT, q_s, do_s, full, full, free, free, LSE_T, DELTA_T, lse_s, delta_s,
                b * H + h, b * T, h * D, t, ROW, c, d, turn, skip, BM, KIND, STAGES,
            )  # fmt: skip
        n += 1
        tile = gl.num_programs(0) + gl.atomic_add(TAKEN, 1, sem="relaxed")
    announce(tile, n, tile_s, tile_full, tile_free)


@gluon.jit
def _add_full(
    dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, free, t, scale, a, c,
    LAYOUT: gl.constexpr, LEFT: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of the run ``a..c``, which see every key; keys are rows, queries columns. What a
    step adds to dk is multiplied beside the next step's scores."""
    none = gl.zeros([64, BM], gl.float32, LAYOUT)
    ds_left = gl.zeros([64, BM], k.dtype, LEFT)
    n = steps(a, c, BM, TILE, KIND)
    for i in range(n):
        at = (t + i) % STAGES
        was = (t + gl.maximum(i - 1, 0)) % STAGES
        mbarrier.wait(full.index(at), (t + i) // STAGES & 1)
        dk_next = warpgroup_mma(ds_left, q_s.index(was), dk, is_async=True)
        s_next = warpgroup_mma(k, q_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        dw_next = warpgroup_mma(
            v, do_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
        )
        dk, s = warpgroup_mma_wait(1, deps=[dk_next, s_next])
        if i > 0:
            mbarrier.arrive(free.index(was), count=1)
        w = gl.exp2(s * scale - lse_s.index(at).load(LAYOUT))
        w_left = gl.convert_layout(w.to(k.dtype), LEFT)
        dv_next = warpgroup_mma(w_left, do_s.index(at), dv, is_async=True)
        dw = warpgroup_mma_wait(1, deps=[dw_next])
        ds = w * (dw - delta_s.index(at).load(LAYOUT))
        ds_next = gl.convert_layout(hold(ds).to(k.dtype), LEFT)
        dv, ds_left = warpgroup_mma_wait(0, deps=[dv_next, ds_next])
    if n > 0:
        last = (t + n - 1) % STAGES
        dk = warpgroup_mma(ds_left, q_s.index(last), dk)
        mbarrier.arrive(free.index(last), count=1)
    return dk, dv, t + n


@gluon.jit
def _add_partial(
    dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, free, key, begin, end, y, low, high,
    t, T, S, offset, scale, ROW, PATTERN, TABLE, a, c, turn, skip,
    W: gl.constexpr, LAYOUT: gl.constexpr, LEFT: gl.constexpr, BM: gl.constexpr,
    KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of the run ``a..c``, of which not all see every key."""
    none = gl.zeros([64, BM], gl.float32, LAYOUT)
    for i in range(steps(a, c, BM, TILE, KIND)):
        at = (t + i) % STAGES
        mbarrier.wait(full.index(at), (t + i) // STAGES & 1)
        start = start_of(ROW, i, a, c, turn, skip, BM, TILE, TILE, KIND)
        if apart(start + offset, y, low, high, BM, 64) == 0:
            s_next = warpgroup_mma(
                k, q_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            dw_next = warpgroup_mma(
                v, do_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(1, deps=[s_next])
            token = start + gl.arange(0, BM, layout=gl.SliceLayout(0, LAYOUT))
            keep = kept(
                (token % TILE)[None, :], (token + offset)[None, :], (key % TILE)[:, None],
                key[:, None], S, token[None, :], begin[:, None], end[:, None],
                PATTERN, TABLE, a + i // (TILE // BM), W * 64, 64, TILE, KIND,
            )  # fmt: skip
            s = gl.where(keep, s * scale - lse_s.index(at).load(LAYOUT), float("-inf"))
            w = gl.exp2(s)
            w_left = gl.convert_layout(w.to(k.dtype), LEFT)
            dv_next = warpgroup_mma(w_left, do_s.index(at), dv, is_async=True)
            dw = warpgroup_mma_wait(1, deps=[dw_next])
            ds = w * (dw - delta_s.index(at).load(LAYOUT))
            ds_left = gl.convert_layout(ds.to(k.dtype), LEFT)
            dk_next = warpgroup_mma(ds_left, q_s.index(at), dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv_next, dk_next])
        mbarrier.arrive(free.index(at), count=1)
    return dk, dv, t + steps(a, c, BM, TILE, KIND)


@gluon.jit
def _dkv_rows(
    W: gl.constexpr, q_s, do_s, k_s, v_s, lse_s, delta_s, k_full, v_full, k_free, v_free,
    full, free, tile_s, tile_full, tile_free, DK, DV,
    LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
    tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    k = k_s.index(W)
    v = v_s.index(W)
    n = 0
    t = 0
    tile = announced(n, tile_s, tile_full, tile_free)
    while tile < tiles:
        phase = n & 1
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
            dk, dv, t = _add_full(
                dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, free, t, scale * LOG2E, a, m,
                LAYOUT, LEFT, BM, KIND, STAGES,
            )  # fmt: skip
            dk, dv, t = _add_partial(
                dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, free, key, begin, end,
                row, low, high, t, T, S, offset, scale * LOG2E, ROW, PATTERN, TABLE,
                c, d, turn, skip, W, LAYOUT, LEFT, BM, KIND, STAGES,
            )  # fmt: skip
        mbarrier.arrive(k_free.index(W), count=1)
        mbarrier.arrive(v_free.index(W), count=1)
        store_rows(DK, dk * scale, b.to(gl.int64) * S, row, S, G, g, D)
        store_rows(DV, dv, b.to(gl.int64) * S, row, S, G, g, D)
        n += 1
        tile = announced(n, tile_s, tile_full, tile_free)


@partial(Kernel, sizes=("tiles", *SIZES), jit=gluon.jit, length=2)
def hopper_grad_kv(
    QT, DOT, KT, VT, LSE_T, DELTA_T, DK, DV, TAKEN, LO, MID, HI, ROW, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, H, G, NB, NH, low, high,
    D: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv, in tiles of 128 keys of one head of keys. DK and DV ``[B,S,G,D]`` are
    contiguous; TAKEN is 0."""
    k_s = gl.allocate_shared_memory(KT.dtype, [2, 64, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [2, 64, D], VT.layout)
    q_s = gl.allocate_shared_memory(QT.dtype, [STAGES, BM, D], QT.layout)
    do_s = gl.allocate_shared_memory(DOT.dtype, [STAGES, BM, D], DOT.layout)
    k_full, k_free = barriers(2, 1), barriers(2, 1)
    v_full, v_free = barriers(2, 1), barriers(2, 1)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], LSE_T.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], DELTA_T.layout)
    full, free = barriers(STAGES, 4), barriers(STAGES, 2)
    tile_s, tile_full, tile_free = tile_slots()
    gl.warp_specialize(
        [
            (_dkv_rows, (
                0, q_s, do_s, k_s, v_s, lse_s, delta_s, k_full, v_full, k_free, v_free,
                full, free, tile_s, tile_full, tile_free, DK, DV,
                LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
            (_dkv_rows, (
                1, q_s, do_s, k_s, v_s, lse_s, delta_s, k_full, v_full, k_free, v_free,
                full, free, tile_s, tile_full, tile_free, DK, DV,
                LO, MID, HI, ROW, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
            (_copy_for_keys, (
                QT, DOT, KT, VT, LSE_T, DELTA_T, q_s, do_s, k_s, v_s, lse_s, delta_s,
                k_full, v_full, k_free, v_free, full, free, tile_s, tile_full, tile_free, TAKEN,
                LO, MID, HI, ROW, PLANE,
                tiles, T, S, offset, H, G, NB, NH, low, high, D, BM, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
