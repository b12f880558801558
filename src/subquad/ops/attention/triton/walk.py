"""What the attention kernels share: where rows of queries and blocks of keys lie, what is masked.

Legend: m rows of a program (BM of them: queries times the heads that share their list), n keys of
one step (BN), K and V head dims (BK and BV padded to powers of two).
"""

import triton
import triton.language as tl

BOUND, CAUSAL, INTERVAL, BYTES = (tl.constexpr(x) for x in range(4))


@triton.jit
def queries(row, m, first, shift, T, BQ: tl.constexpr, HG: tl.constexpr):
    """The token of each row m of the BQ queries of kernel row ``row``, and whether it exists."""
    token = (first + row) * BQ + m // HG - shift
    return token, (m < BQ * HG) & (token >= 0) & (token < T)


@triton.jit
def plane_of(PLANE, b, h, H, NB, NH):
    """The distinct plane of batch row b and query head h."""
    return tl.load(PLANE + (b % NB) * NH + h * NH // H)


@triton.jit
def share(lo, mid, hi, part, PARTS: tl.constexpr):
    """Entries ``a..c`` of one of PARTS equal shares of ``lo..hi``, full ones up to ``b``."""
    each = tl.cdiv(hi - lo, PARTS)
    a = tl.minimum(lo + part * each, hi)
    c = tl.minimum(a + each, hi)
    return a, tl.minimum(tl.maximum(mid, a), c), c


@triton.jit
def keys(ENTRY, i, a, c, BN: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Step i over the entries ``a..c``: the first key and the others counted from it ``[BN]``,
    which of them exist, the entry, and the first key's place in it. Blocks smaller than a step are
    gathered, several a step."""
    n = tl.arange(0, BN)
    if SIZE % BN == 0:
        e = a + i // (SIZE // BN)
        place = (i % (SIZE // BN)) * BN
        return tl.load(ENTRY + e) * UNIT + place, n, n >= 0, e, place
    else:
        f = i * BN + n
        e = a + f // SIZE
        there = e < c
        key = tl.load(ENTRY + e, mask=there, other=0) * UNIT + f % SIZE
        return 0, key.to(tl.int64), there, a, 0


@triton.jit
def steps(a, c, BN: tl.constexpr, SIZE: tl.constexpr):
    if SIZE % BN == 0:
        return (c - a) * (SIZE // BN)
    else:
        return tl.cdiv((c - a) * SIZE, BN)


@triton.jit
def kept(
    m_local, p, n_local, key, S, PATTERN, TABLE, e, SIZE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Which pairs of queries and keys the mask keeps; ``m_local`` (the query's row of the tile),
    ``p`` (its key position), ``n_local`` and ``key`` broadcast to the shape of the scores."""
    if KIND == BOUND:
        return key < S
    elif KIND == CAUSAL:
        return key <= p
    elif KIND == INTERVAL:
        at = TABLE + (tl.load(PATTERN + e) * SIZE + m_local) * 2
        return (n_local >= tl.load(at)) & (n_local < tl.load(at + 1))
    else:
        pattern = tl.load(PATTERN + e).to(tl.int64)
        return tl.load(TABLE + (pattern * SIZE + m_local) * SIZE + n_local) != 0


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
