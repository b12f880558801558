"""What the kernels for Hopper share: barriers, copies of tiles to shared memory, the masks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from subquad.ops.attention.triton.walk import (
    band_runs,
    kept,
    listed_runs,
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
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    fence_async_shared()
    return bars


@gluon.jit
def tile_slots():
    """Where a program's next tiles are announced, two of them, with their barriers."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [2, 1], LAYOUT), barriers(2, 1), barriers(2, 2)


@gluon.jit
def announce(tile, n, tile_s, tile_full, tile_free):
    """Tell both groups the program's n-th tile, from the warp that copies."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(tile_free.index(n & 1), (n // 2 + 1) & 1)
    tile_s.index(n & 1).store(gl.full([1], tile, gl.int32, ONE))
    mbarrier.arrive(tile_full.index(n & 1), count=1)


@gluon.jit
def announced(n, tile_s, tile_full, tile_free):
    """The program's n-th tile, for a group of four warps."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(tile_full.index(n & 1), n // 2 & 1)
    tile = gl.max(tile_s.index(n & 1).load(ONE), 0)
    mbarrier.arrive(tile_free.index(n & 1), count=1)
    return tile


@gluon.jit
def fetch(DESC, row, column, full, to):
    mbarrier.expect(full, DESC.block_type.nbytes)
    tma.async_copy_global_to_shared(DESC, [row, column], full, to)


@gluon.jit
def fetch_halves(DESC, row, column, full, free, to, n):
    """The n-th tile, a half for each group, when that has left the one before."""
    for w in gl.static_range(2):
        mbarrier.wait(free.index(w), (n + 1) & 1)
        fetch(DESC, row + w * 64, column, full.index(w), to.index(w))


@gluon.jit
def keep_coming(
    AT, BT, a_s, b_s, a_full, b_full, a_free, b_free, LSE_T, DELTA_T, lse_s, delta_s, line,
    row, column, t, ENTRY, a, c, turn, skip,
    STEP: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both tensors' blocks of the run ``a..c``, the t-th and those after it, into their slots; with
    A's block, where LSE_T is given, what lse and delta hold of it in their row ``line``."""
    for i in range(steps(a, c, STEP, TILE, KIND)):
        start = start_of(ENTRY, i, a, c, turn, skip, STEP, TILE, TILE, KIND)
        slot = (t + i) % STAGES
        phase = ((t + i) // STAGES + 1) & 1
        mbarrier.wait(a_free.index(slot), phase)
        fetch(AT, row + start, column, a_full.index(slot), a_s.index(slot))
        if LSE_T is not None:
            fetch(LSE_T, line, start, a_full.index(slot), lse_s.index(slot))
            fetch(DELTA_T, line, start, a_full.index(slot), delta_s.index(slot))
        mbarrier.wait(b_free.index(slot), phase)
        fetch(BT, row + start, column, b_full.index(slot), b_s.index(slot))
    return t + steps(a, c, STEP, TILE, KIND)


@gluon.jit
def hold(x):
    """x, computed before any wait that follows. The assembler moves arithmetic behind a wait for
    products, which then wait for each other; it does not move an event for a profiler, here one
    that a rare value sets off, to no effect."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b; .reg .pred p;
        lop3.b32 a, $8, $9, $10, 0x96;
        lop3.b32 b, $11, $12, $13, 0x96;
        lop3.b32 a, a, $14, $15, 0x96;
        xor.b32 a, a, b;
        setp.eq.b32 p, a, 1;
        @p pmevent 1;
        mov.b32 $0, $8; mov.b32 $1, $9; mov.b32 $2, $10; mov.b32 $3, $11;
        mov.b32 $4, $12; mov.b32 $5, $13; mov.b32 $6, $14; mov.b32 $7, $15;
        }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=8,
    )


@gluon.jit
def apart(x, y, low, high, X: gl.constexpr, Y: gl.constexpr):
    """Whether X queries from position x on keep none of Y keys from y on."""
    return (x + X - 1 - y < low) | (x - y - (Y - 1) > high)


@gluon.jit
def queries_of(
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
def copy_for_queries(
    QT, DOT, KT, VT, q_s, do_s, k_s, v_s, q_full, do_full, q_free, do_free,
    k_full, v_full, k_free, v_free, tile_s, tile_full, tile_free, TAKEN,
    LO, MID, HI, ENTRY, PLANE,
    tiles, T, S, offset, rows, H, G, NB, NH, low, high,
    D: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    n = 0
    t = 0
    tile = gl.program_id(0)
    while tile < tiles:
        announce(tile, n, tile_s, tile_full, tile_free)
        b, h, token, a, m, c, d, turn, skip = queries_of(
            tile, LO, MID, HI, PLANE, T, S, H, rows, NB, NH, offset, low, high, BN, KIND
        )
        fetch_halves(QT, b * T + token, h * D, q_full, q_free, q_s, n)
        if DOT is not None:
            fetch_halves(DOT, b * T + token, h * D, do_full, do_free, do_s, n)
        t = keep_coming(
            KT, VT, k_s, v_s, k_full, v_full, k_free, v_free, None, None, k_s, v_s, 0,
            b * S, h // (H // G) * D, t,
            ENTRY, a, m, m - a, 0, BN, KIND, STAGES,
        )  # fmt: skip
        t = keep_coming(
            KT, VT, k_s, v_s, k_full, v_full, k_free, v_free, None, None, k_s, v_s, 0,
            b * S, h // (H // G) * D, t,
            ENTRY, c, d, turn, skip, BN, KIND, STAGES,
        )  # fmt: skip
        n += 1
        tile = gl.num_programs(0) + gl.atomic_add(TAKEN, 1, sem="relaxed")
    announce(tile, n, tile_s, tile_full, tile_free)


@gluon.jit
def masked_keys(
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
def store_rows(X, x, first, row, T, H, h, D: gl.constexpr):
    """64 rows ``row`` and on, those before T, of head h of X ``[.,T,H,D]``."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    to = (first + r) * H + h
    x = gl.convert_layout(x.to(X.dtype.element_ty), WIDE)
    gl.store(X + to[:, None] * D + d[None, :], x, mask=(r < T)[:, None])
