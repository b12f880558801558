"""The kernels for Hopper, their work divided among warps.

Two groups of four warps compute, each for 64 rows of a tile of 128 queries (or keys), and one warp
keeps the blocks that they meet coming. A group's products run beside its own exponentials, and
beside the other group's. A program takes tile after tile, so that the blocks of the next are on
their way while the last is written. The walk over lists or a band is that of the portable kernels
(``walk``); what these take: whole tiles, one head a tile, one width of 64 or 128 for q, k and v.

Legend: D the width; BN keys and BM queries of a step; t steps (of all tiles) so far, which say
whose turn a slot of the ring of STAGES blocks is; ``*_s`` blocks in shared memory, ``*_full`` and
``*_free`` their barriers.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from subquad.ops.attention.triton.configs import config, processors
from subquad.ops.attention.triton.index import arguments
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

BAND = gl.constexpr(4)
TILE = gl.constexpr(128)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
SIZES = ["T", "S", "offset", "rows", "H", "G", "NB", "NH", "low", "high"]


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    fence_async_shared()
    return bars


@gluon.jit
def _fetch(DESC, row, column, full, to):
    mbarrier.expect(full, DESC.block_type.nbytes)
    tma.async_copy_global_to_shared(DESC, [row, column], full, to)


@gluon.jit
def _fetch_halves(DESC, row, column, full, free, to, n):
    """The n-th tile, a half for each group, when that has left the one before."""
    for w in gl.static_range(2):
        mbarrier.wait(free.index(w), (n + 1) & 1)
        _fetch(DESC, row + w * 64, column, full.index(w), to.index(w))


@gluon.jit
def _keep_coming(
    AT, BT, a_s, b_s, a_full, b_full, a_free, b_free, row, column, t, ENTRY, a, c, turn, skip,
    STEP: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both tensors' blocks of the run ``a..c``, the t-th and those after it, into their slots."""
    for i in range(steps(a, c, STEP, TILE, KIND)):
        start = row + start_of(ENTRY, i, a, c, turn, skip, STEP, TILE, TILE, KIND)
        slot = (t + i) % STAGES
        phase = ((t + i) // STAGES + 1) & 1
        mbarrier.wait(a_free.index(slot), phase)
        _fetch(AT, start, column, a_full.index(slot), a_s.index(slot))
        mbarrier.wait(b_free.index(slot), phase)
        _fetch(BT, start, column, b_full.index(slot), b_s.index(slot))
    return t + steps(a, c, STEP, TILE, KIND)


@gluon.jit
def _queries_of(
    tile, LO, MID, HI, PLANE, T, S, H, rows, NB, NH, offset, low, high,
    BN: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The tile's batch row, head and first token, and the runs of keys that it walks."""
    count = gl.cdiv(T, TILE)
    b = tile // count // H
    h = tile // count % H
    token = (count - 1 - tile % count) * TILE  # the longest lists first
    if KIND == BAND:
        x = token + offset
        a, m, c, d, turn, skip = band_runs(x, x + TILE - 1, low, high, S, 0, 1, BN)
    else:
        own = plane_of(PLANE, b, h, H, NB, NH) * rows + token // TILE
        a, m, c, d, turn, skip = listed_runs(LO, MID, HI, own, 0, 1)
    return b, h, token, a, m, c, d, turn, skip


@gluon.jit
def _copy_for_queries(
    QT, DOT, KT, VT, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
    k_full, v_full, k_free, v_free, LO, MID, HI, ENTRY, PLANE,
    tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    t = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n = tile // gl.num_programs(0)
        b, h, token, a, m, c, d, turn, skip = _queries_of(
            tile, LO, MID, HI, PLANE, T, S, H, rows, NB, NH, offset, low, high, BN, KIND
        )
        _fetch_halves(QT, b * T + token, h * D, q_full, q_free, q_s, n)
        if DOT is not None:
            _fetch_halves(DOT, b * T + token, h * D, do_full, do_free, do_s, n)
        t = _keep_coming(
            KT, VT, k_s, v_s, k_full, v_full, k_free, v_free, b * S, h // (H // G) * D, t,
            ENTRY, a, m, m - a, 0, BN, KIND, STAGES,
        )  # fmt: skip
        t = _keep_coming(
            KT, VT, k_s, v_s, k_full, v_full, k_free, v_free, b * S, h // (H // G) * D, t,
            ENTRY, c, d, turn, skip, BN, KIND, STAGES,
        )  # fmt: skip


@gluon.jit
def _masked_keys(
    s, i, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE, c, d, turn, skip,
    LAYOUT: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The scores of step i of the run ``c..d`` with what the mask hides at -inf."""
    start = start_of(ENTRY, i, c, d, turn, skip, BN, TILE, TILE, KIND)
    key = (start + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT)))[None, :]
    keep = kept(
        m_local[:, None], p[:, None], key % TILE, key, S, key, begin[:, None], end[:, None],
        PATTERN, TABLE, c + i // (TILE // BN), start % TILE, BN, TILE, KIND,
    )  # fmt: skip
    return gl.where(keep, s, float("-inf"))


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
            s = _masked_keys(
                s, i, m_local, p, begin, end, S, ENTRY, PATTERN, TABLE, a, c, turn, skip,
                LAYOUT, BN, KIND,
            )  # fmt: skip
        w, top, total, shrink = _softmax(s, top, total, scale)
        w_next = gl.convert_layout(w.to(w_left.dtype), w_left.type.layout)
        # The weights wait too, or the compiler would move the wait before them.
        acc, w_left = warpgroup_mma_wait(0, deps=[acc_next, w_next])
        mbarrier.arrive(v_free.index(was), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    return acc, top, total, w_left, t + gl.maximum(n - first, 0)


@gluon.jit
def _forward_rows(
    W: gl.constexpr, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free, O, LSE,
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
    t = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        phase = tile // gl.num_programs(0) & 1
        b, h, token, a, m, c, d, turn, skip = _queries_of(
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
                s = _masked_keys(
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
        _store(O, acc, b.to(gl.int64) * T, token + W * 64, T, H, h, D)


@gluon.jit
def _store(X, x, first, row, T, H, h, D: gl.constexpr):
    """64 rows ``row`` and on, those before T, of head h of X ``[.,T,H,D]``."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    to = (first + r) * H + h
    x = gl.convert_layout(x.to(X.dtype.element_ty), WIDE)
    gl.store(X + to[:, None] * D + d[None, :], x, mask=(r < T)[:, None])


@gluon.jit(do_not_specialize=["tiles", *SIZES])
def hopper_forward(
    QT, KT, VT, O, LSE, LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE,
    scale, tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 queries of one head. O ``[B,T,H,D]`` and LSE ``[B,T,H]`` are contiguous."""
    scale = gl.maximum(scale, 1e-30) * LOG2E  # 0 times -inf would be NaN
    q_s = gl.allocate_shared_memory(QT.dtype, [2, 64, D], QT.layout)
    k_s = gl.allocate_shared_memory(KT.dtype, [STAGES, BN, D], KT.layout)
    v_s = gl.allocate_shared_memory(VT.dtype, [STAGES, BN, D], VT.layout)
    q_full, q_free = _barriers(2, 1), _barriers(2, 1)
    k_full, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    # Written out twice: a variable would make numbers of the constants.
    gl.warp_specialize(
        [
            (_forward_rows, (
                0, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free, O, LSE,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (_forward_rows, (
                1, q_s, k_s, v_s, q_full, q_free, k_full, v_full, k_free, v_free, O, LSE,
                LO, MID, HI, ENTRY, PATTERN, TABLE, PLANE, scale,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
            (_copy_for_queries, (
                QT, None, KT, VT, q_s, q_s, k_s, v_s, q_full, q_full, q_free, q_free,
                k_full, v_full, k_free, v_free, LO, MID, HI, ENTRY, PLANE,
                tiles, T, S, offset, rows, H, G, NB, NH, low, high, D, BN, KIND, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
            s = _masked_keys(
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
        b, h, token, a, m, c, d, turn, skip = _queries_of(
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
        _store(DQ, dq * scale, b.to(gl.int64) * T, token + W * 64, T, H, h, D)


@gluon.jit(do_not_specialize=["tiles", *SIZES])
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
    q_full, q_free = _barriers(2, 1), _barriers(2, 1)
    do_full, do_free = _barriers(2, 1), _barriers(2, 1)
    k_full, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
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
            (_copy_for_queries, (
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
        _fetch_halves(KT, b * S + block * TILE, g * D, k_full, k_free, k_s, n)
        _fetch_halves(VT, b * S + block * TILE, g * D, v_full, v_free, v_s, n)
        for j in range(H // G):
            h = g * (H // G) + j
            a, m, c, d, turn, skip = _runs_of_keys(
                LO, MID, HI, PLANE, b, h, block, S, T, H, NB, NH, offset, low, high, BM, KIND
            )
            t = _keep_coming(
                QT, DOT, q_s, do_s, q_full, do_full, q_free, do_free, b * T, h * D, t,
                ROW, a, m, m - a, 0, BM, KIND, STAGES,
            )  # fmt: skip
            t = _keep_coming(
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
        _store(DK, dk * scale, b.to(gl.int64) * S, row, S, G, g, D)
        _store(DV, dv, b.to(gl.int64) * S, row, S, G, g, D)


@gluon.jit(do_not_specialize=["tiles", *SIZES])
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
    k_full, k_free = _barriers(2, 1), _barriers(2, 1)
    v_full, v_free = _barriers(2, 1), _barriers(2, 1)
    q_full, q_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    do_full, do_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
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


def forward(launch, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> None:
    """o ``[B,T,H,D]`` and lse ``[B,T,H]``, filled."""
    found = config("hopper_forward", 128, launch.K, q.dtype.itemsize)
    grid, tiles = _tiled(launch, launch.T, launch.H, found)
    hopper_forward[grid](
        _tiles(q, 64), _tiles(k, found["step"]), _tiles(v, found["step"]), o, lse,
        *arguments(launch.index.lists), launch.index.table, launch.index.plane,
        scale, tiles, *_sizes(launch, launch.index.rows), D=launch.K, BN=found["step"],
        KIND=launch.index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def grad_q(launch, q, k, v, do, lse2: Tensor, delta: Tensor, dq: Tensor, scale: float) -> None:
    """dq ``[B,T,H,D]``, filled."""
    found = config("hopper_grad_q", 128, launch.K, q.dtype.itemsize)
    grid, tiles = _tiled(launch, launch.T, launch.H, found)
    hopper_grad_q[grid](
        _tiles(q, 64), _tiles(do, 64), _tiles(k, found["step"]), _tiles(v, found["step"]),
        lse2, delta, dq, *arguments(launch.index.lists), launch.index.table, launch.index.plane,
        scale, tiles, *_sizes(launch, launch.index.rows), D=launch.K, BN=found["step"],
        KIND=launch.index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def grad_kv(
    launch, turned, q, k, v, do, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> None:
    """dk and dv ``[B,S,G,D]``, filled; ``turned`` are the lists by blocks of keys."""
    found = config("hopper_grad_kv", 128, launch.K, q.dtype.itemsize)
    grid, tiles = _tiled(launch, launch.S, launch.G, found)
    hopper_grad_kv[grid](
        _tiles(q, found["step"]), _tiles(do, found["step"]), _tiles(k, 64), _tiles(v, 64),
        lse2, delta, dk, dv, *arguments(turned), launch.index.table, launch.index.plane,
        scale, tiles, *_sizes(launch), D=launch.K, BM=found["step"],
        KIND=launch.index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def _tiled(launch, tokens: int, heads: int, found: Mapping[str, int]) -> tuple[tuple[int], int]:
    """The grid, and how many tiles it takes: all at once or, under a band (``loop``), a program to
    a multiprocessor, tile after tile. Lists of unequal lengths would leave some waiting."""
    tiles = triton.cdiv(tokens, 128) * heads * launch.B
    loop = found.get("loop") and launch.index.lists is None
    most = processors(launch.index.plane.device.index) if loop else tiles
    return (min(tiles, most),), tiles


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """x as ``[B * tokens, heads * D]`` in tiles of one head, for the copy engine."""
    flat = x.view(-1, x.shape[2] * x.shape[3])
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, x.shape[3]], kind)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, x.shape[3]], layout)


def _sizes(launch, *rows: int) -> tuple[int, ...]:
    """The arguments from T to high."""
    index = launch.index
    return (
        launch.T, launch.S, launch.offset, *rows, launch.H, launch.G, *index.shape, *index.bounds
    )  # fmt: skip
