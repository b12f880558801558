"""The forward kernel for Hopper: online softmax, each group of warps beside the other."""

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from subquad.ops.attention.triton.hopper.tiles import (
    LN2,
    LOG2E,
    SIZES,
    TILE,
    announced,
    barriers,
    copy_for_queries,
    masked_keys,
    queries_of,
    store_rows,
    tile_slots,
)
from subquad.ops.attention.triton.walk import band_of, steps
from subquad.ops.kernel import Kernel


@gluon.jit
def _softmax(s, top, total, scale):
    new = gl.maximum(top, gl.max(s, 1) * scale)
    # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    safe = gl.where(new == float("-inf"), 0.0, new)
    w = gl.exp2(s * scale - safe[:, None])
    shrink = gl.exp2(top - safe)
    return w, new, total * shrink + gl.sum(w, 1), shrink


@gluon.jit
def _attend(
    acc, top, total, w_left, q, k_s, v_s, k_full, v_full, k_free, v_free, m_local, p, begin, end,
    t, S, scale, ENTRY, PATTERN, TABLE, first, a, c, turn, skip,
    LAYOUT: gl.constexpr, OUT: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps ``first`` and on of the run ``a..c``, the t-th of all and those after it. The values
    of the step before t, whose weights are ``w_left``, are added meanwhile."""
    none = gl.zeros([64, BN], gl.float32, LAYOUT)
    n = steps(a, c, BN, TILE, KIND)
    for i in range(first, n):
        now = t + i - first
        at = now % STAGES
        was = (now - 1) % STAGES
        mbarrier.wait(k_full.index(at), now // STAGES & 1)
        s_next = warpgroup_mma(q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(was), (now - 1) // STAGES & 1)
        acc_next = warpgroup_mma(w_left, v_s.index(was), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_next])
        mbarrier.arrive(k_free.index(at), count=1)
        if MASKED:
            s = masked_keys(
                s, i, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE, a, c, turn, skip,
                LAYOUT, BN, KIND,
            )  # fmt: skip
        w, top, total, shrink = _softmax(s, top, total, scale)
        w_next = gl.convert_layout(w.to(w_left.dtype), w_left.type.layout)
        # The weights wait too, or the compiler would move the wait before them (the assembler still
        # does: docs/log.md, 2026-11-28).
        acc, w_left = warpgroup_mma_wait(0, deps=[acc_next, w_next])
        mbarrier.arrive(v_free.index(was), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    return acc, top, total, w_left, t + gl.maximum(n - first, 0)


@gluon.jit
def _forward_rows(
    W: gl.constexpr, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free,
    tile_s, tile_full, tile_free, O, LSE,
    LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
    tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    none = gl.zeros([64, BN], gl.float32, LAYOUT)
    m_local = W * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    q = q_s.index(W)
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
        acc = gl.zeros([64, D], gl.float32, OUT)
        top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, LAYOUT))
        fulls = steps(a, m, BN, TILE, KIND)
        mbarrier.wait(q_full.index(W), phase)
        if fulls + steps(c, d, BN, TILE, KIND) > 0:
            mbarrier.wait(k_full.index(t % STAGES), t // STAGES & 1)
            s = warpgroup_mma(q, k_s.index(t % STAGES).permute((1, 0)), none, use_acc=False)
            mbarrier.arrive(k_free.index(t % STAGES), count=1)
            if fulls == 0:
                s = masked_keys(
                    s, 0, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE, c, d, turn, skip,
                    LAYOUT, BN, KIND,
                )  # fmt: skip
            w, top, total, _ = _softmax(s, top, total, scale)
            w_left = gl.convert_layout(w.to(O.dtype.element_ty), LEFT)
            acc, top, total, w_left, t = _attend(
                acc, top, total, w_left, q, k_s, v_s, k_full, v_full, k_free, v_free,
                m_local, p, begin, end, t + 1, S, scale, ENTRY, PATTERN, TABLE,
                1, a, m, m - a, 0, LAYOUT, OUT, BN, KIND, False, STAGES,
            )  # fmt: skip
            acc, top, total, w_left, t = _attend(
                acc, top, total, w_left, q, k_s, v_s, k_full, v_full, k_free, v_free,
                m_local, p, begin, end, t, S, scale, ENTRY, PATTERN, TABLE,
                gl.where(fulls == 0, 1, 0), c, d, turn, skip, LAYOUT, OUT, BN, KIND, True, STAGES,
            )  # fmt: skip
            last = (t - 1) % STAGES
            mbarrier.arrive(q_free.index(W), count=1)
            mbarrier.wait(v_full.index(last), (t - 1) // STAGES & 1)
            acc = warpgroup_mma(w_left, v_s.index(last), acc)
            mbarrier.arrive(v_free.index(last), count=1)
        else:
            mbarrier.arrive(q_free.index(W), count=1)
        seen = total > 0
        some = gl.where(seen, total, 1.0)
        lse = gl.where(seen, (top + gl.log2(some)) * LN2, float("-inf"))
        at = token + m_local
        gl.store(LSE + (b.to(gl.int64) * T + at) * H + h, lse, mask=at < T)
        acc = acc * gl.convert_layout(1.0 / some, gl.SliceLayout(1, OUT))[:, None]
        store_rows(O, acc, b.to(gl.int64) * T, token + W * 64, T, H, h, D)
        n += 1
        tile = announced(n, tile_s, tile_full, tile_free)


@partial(Kernel, sizes=("tiles", *SIZES), jit=gluon.jit, length=3)
def hopper_forward(
    QT, KT, VT, O, LSE, TAKEN, LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 queries of one head. O ``[B,T,H,D]`` and LSE ``[B,T,H]`` are contiguous;
    TAKEN is 0."""
    scale = gl.maximum(scale, 1e-30) * LOG2E  # 0 times -inf would be NaN
    q_s = gl.allocate_shared_memory(QT.dtype, [2, 64, D], QT.layout)
    k_s = gl.allocate_shared_memory(KT.dtype, [STAGES, BN, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [STAGES, BN, D], VT.layout)
    q_full, q_free = barriers(2, 1), barriers(2, 1)
    k_full, k_free = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_free = barriers(STAGES, 1), barriers(STAGES, 2)
    tile_s, tile_full, tile_free = tile_slots()
    # Written out twice: a variable would make numbers of the constants.
    gl.warp_specialize(
        [
            (_forward_rows, (
                0, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free,
                tile_s, tile_full, tile_free, O, LSE,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (_forward_rows, (
                1, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free,
                tile_s, tile_full, tile_free, O, LSE,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (copy_for_queries, (
                QT, None, KT, VT, q_s, q_s, k_s, v_s, q_full, q_full, q_free, q_free,
                k_full, v_full, k_free, v_free, tile_s, tile_full, tile_free, TAKEN,
                LO, MID, HI, ENTRY, PLANE,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
