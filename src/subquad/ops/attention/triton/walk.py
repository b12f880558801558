"""What the attention kernels share: where rows of queries and blocks of keys lie, what is masked.

Legend: m rows of a program (BM of them: queries times the heads that share their list), n keys of
one step (BN), K and V head dims (BK and BV padded to powers of two).
"""

import triton
import triton.language as tl

BOUND, CAUSAL, INTERVAL, BITS, BAND = (tl.constexpr(x) for x in range(5))


@triton.jit
def queries(row, m, first, shift, T, BQ: tl.constexpr, HG: tl.constexpr):
    """The token of each row m of the BQ queries of kernel row ``row``, and whether it exists."""
    token = (first + row) * BQ + m // HG - shift
    return token, (m < BQ * HG) & (token >= 0) & (token < T)


@triton.jit
def padded(T):
    """The length of a row of ``lse`` and ``delta``: whole tiles, filled up as without keys."""
    return tl.cdiv(T, 128) * 128


@triton.jit
def plane_of(PLANE, b, h, H, NB, NH):
    """The distinct plane of batch row b and query head h."""
    return tl.load(PLANE + (b % NB) * NH + h * NH // H)


@triton.jit
def listed_runs(LO, MID, HI, own, part, PARTS: tl.constexpr):
    """What one of PARTS equal shares of list ``own`` walks: the full entries ``a..b``, then the
    others ``c..d``, without a gap (see ``band_runs``)."""
    lo, hi = tl.load(LO + own), tl.load(HI + own)
    each = tl.cdiv(hi - lo, PARTS)
    a = tl.minimum(lo + part * each, hi)
    d = tl.minimum(a + each, hi)
    b = tl.minimum(tl.maximum(tl.load(MID + own), a), d)
    return a, b, b, d, d - b, 0


@triton.jit
def band_runs(first, last, low, high, end, part, PARTS: tl.constexpr, STEP: tl.constexpr):
    """The steps of STEP places y (up to ``end``) that ``low <= x - y <= high`` keeps of any x in
    ``first..last``: steps ``a..b`` keep all, steps ``c..d`` some, of which those from the
    ``turn``-th on lie ``skip`` steps further on (behind the full ones)."""
    some = tl.maximum(first - high, 0) // STEP
    stop = tl.maximum(tl.cdiv(tl.minimum(last - low + 1, end), STEP), some)
    each = tl.cdiv(stop - some, PARTS)
    full = tl.cdiv(tl.maximum(last - high, 0), STEP)
    fulls = tl.minimum(first - low + 1, end) // STEP
    some = tl.minimum(some + part * each, stop)
    stop = tl.minimum(some + each, stop)
    full = tl.minimum(tl.maximum(full, some), stop)
    fulls = tl.minimum(tl.maximum(fulls, full), stop)
    skip = fulls - full
    return full, fulls, some, stop - skip, full - some, skip


@triton.jit
def band_of(x, low, high, end):
    """From where to where ``low <= x - y <= high`` keeps the places y before ``end``."""
    return x - high, tl.minimum(x - low + 1, end)


@triton.jit
def start_of(
    ENTRY, i, a, c, turn, skip,
    STEP: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Where step i of the run ``a..c`` begins. Loops ask one step ahead, so that the copy of the
    next block need not wait for the list; if they ask two ahead, the compiler copies none ahead."""
    if KIND == BAND:
        return (a + i + tl.where(i >= turn, skip, 0)) * STEP
    elif SIZE % STEP == 0:
        e = a + i // (SIZE // STEP)
        return tl.load(ENTRY + e, mask=e < c, other=0) * UNIT + i % (SIZE // STEP) * STEP
    else:
        return 0


@triton.jit
def steps(a, c, STEP: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr):
    if KIND == BAND:
        return c - a
    elif SIZE % STEP == 0:
        return (c - a) * (SIZE // STEP)
    else:
        return tl.cdiv((c - a) * SIZE, STEP)


@triton.jit
def keys(
    ENTRY, i, a, c, BN: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Step i of the run ``a..c``: its keys counted from its start ``[BN]``, which of them exist,
    the entry, and the first key's place in it. Blocks smaller than a step are gathered, several a
    step."""
    n = tl.arange(0, BN)
    if KIND == BAND:
        return n, n >= 0, 0, 0
    elif SIZE % BN == 0:
        return n, n >= 0, a + i // (SIZE // BN), (i % (SIZE // BN)) * BN
    else:
        f = i * BN + n
        e = a + f // SIZE
        there = e < c
        key = tl.load(ENTRY + e, mask=there, other=0) * UNIT + f % SIZE
        return key.to(tl.int64), there, a, 0


@triton.jit
def kept(
    m_local, p, n_local, key, S, y, begin, end, PATTERN, TABLE, e, place,
    STEP: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Which pairs of queries and keys the mask keeps; ``m_local`` (the query's row of the tile),
    ``p`` (its key position), ``n_local`` and ``key`` broadcast to the shape of the scores. So do,
    for a band, ``y`` (the places of the step) and ``band_of`` the program's own. The STEP keys
    begin at ``place`` of their tile."""
    if KIND == BAND:
        return (y >= begin) & (y < end)
    elif KIND == BOUND:
        return key < S
    elif KIND == CAUSAL:
        return (key <= p) & (key < S)
    elif KIND == INTERVAL:
        at = TABLE + (tl.load(PATTERN + e) * SIZE + m_local) * 2
        return (n_local >= tl.load(at)) & (n_local < tl.load(at + 1))
    else:
        # A word holds 32 keys of a row: a step's few words are loaded once, not for every pair.
        words = TABLE + (tl.load(PATTERN + e) * SIZE + m_local) * (SIZE // 32) + place // 32
        word = tl.load(words)
        for j in tl.static_range(1, STEP // 32):
            word = tl.where((n_local - place) // 32 == j, tl.load(words + j), word)
        return (word >> n_local % 32) & 1 != 0


@triton.jit
def rows_of(X, at, there, stride, D: tl.constexpr, BD: tl.constexpr, BOUNDED: tl.constexpr):
    """``[len(at), BD]`` of X, rows ``at``, 0 outside."""
    d = tl.arange(0, BD)
    where = X + at[:, None] * stride + d[None, :]
    if BOUNDED and D < BD:
        return tl.load(where, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(where, mask=there[:, None], other=0.0)
    elif D < BD:
        return tl.load(where, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def block_of(
    X, TILES, row, column, at, there, stride,
    D: tl.constexpr, BD: tl.constexpr, BOUNDED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """``[len(at), BD]`` of X, rows ``at`` on from X's own first: by the copy engine from the tensor
    descriptor TILES, where those rows begin at ``(row, column)``, or else by pointers."""
    if BULK:
        return TILES.load([row, column])
    else:
        return rows_of(X, at, there, stride, D, BD, BOUNDED)
