"""What the recurrence's kernels share: where a segment lies, tile loads, decays, the inverse.

Legend: C rows of a chunk, i and j rows (queries) and columns (keys) inside it, G the log decay
summed from the start of the chunk, ``[C]`` per head or ``[C,BK]`` per channel.
"""

import triton
import triton.language as tl

NONE, HEAD, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# One compilation serves every length and head count.
SIZES = ("T", "SIZE", "H", "HQ", "HK", "HV", "HD", "HB")
COLUMNS = tl.constexpr(6)  # of the table of segments: what :func:`segment` returns


@triton.jit
def segment(TABLE, index, T, SIZE, C: tl.constexpr, PACKED: tl.constexpr):
    """Segment ``index``: first token, end, its sequence, whether it opens the sequence, whether it
    closes it, and the number of its first chunk among all chunks."""
    if PACKED:
        row = TABLE + index * COLUMNS
        first = tl.load(row).to(tl.int64)
        end = tl.load(row + 1).to(tl.int64)
        sequence = tl.load(row + 2)
        opens = tl.load(row + 3) != 0
        closes = tl.load(row + 4) != 0
        chunk = tl.load(row + 5)
    else:
        parts = tl.cdiv(T, SIZE)
        sequence = index // parts
        part = index % parts
        first = sequence.to(tl.int64) * T + part * SIZE
        end = tl.minimum(first + SIZE, (sequence.to(tl.int64) + 1) * T)
        opens = part == 0
        closes = part == parts - 1
        chunk = sequence * tl.cdiv(T, C) + part * (SIZE // C)
    return first, end, sequence, opens, closes, chunk


@triton.jit
def _place(
    X, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of BW columns (BW divides ``column``) of C tokens; ROWS is their axis."""
    r = tl.expand_dims(tl.arange(0, C), 1 - ROWS)
    c = column + tl.expand_dims(tl.arange(0, BW), ROWS)
    ok = r < left
    if W % BW != 0:
        ok = ok & (c < W)
    return X + (first * heads + h) * W + r * (heads * W) + c, ok


@triton.jit
def tile(X, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr):
    """``[C,BW]`` of ``X [tokens,heads,W]`` from token ``first`` and ``column`` on, 0 outside."""
    at, ok = _place(X, first, left, heads, h, column, W, C, BW, 0)
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def tile_t(X, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr):
    """The transposed :func:`tile`, ``[BW,C]``."""
    at, ok = _place(X, first, left, heads, h, column, W, C, BW, 1)
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def put(X, x, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr):
    """Write ``x [C,BW]`` where :func:`tile` reads."""
    at, ok = _place(X, first, left, heads, h, column, W, C, BW, 0)
    tl.store(at, x.to(X.dtype.element_ty), mask=ok)


@triton.jit
def put_t(X, x, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr):
    """Write ``x [BW,C]`` where :func:`tile_t` reads."""
    at, ok = _place(X, first, left, heads, h, column, W, C, BW, 1)
    tl.store(at, x.to(X.dtype.element_ty), mask=ok)


@triton.jit
def numbers(X, first, left, heads, h, C: tl.constexpr):
    """``[C]`` float32 of ``X [tokens,heads]`` from token ``first`` on, 0 outside."""
    r = tl.arange(0, C)
    return tl.load(X + first * heads + h + r * heads, mask=r < left, other=0.0).to(tl.float32)


@triton.jit
def fade(G_row, G_col, keep):
    """``exp(G_row - G_col)`` where ``keep``, else 0; never above 1 where keep is causal."""
    return tl.exp(tl.where(keep, G_row - G_col, float("-inf")))


@triton.jit
def reference(G, S, C: tl.constexpr, BK: tl.constexpr):
    """For every row of ``G [C,BK]``: row S - 1 of the block of 2 S rows that it lies in."""
    r = tl.arange(0, C)[:, None] // (2 * S) * (2 * S) + S - 1
    return tl.gather(G, tl.broadcast_to(r, [C, BK]), axis=0)


@triton.jit
def halves(S, C: tl.constexpr, QUERY: tl.constexpr):
    """``[C,C]``: the pairs whose query lies in the second and key in the first half of one block
    of 2 S rows; QUERY is the axis of the queries."""
    query = tl.expand_dims(tl.arange(0, C), 1 - QUERY)
    key = tl.expand_dims(tl.arange(0, C), QUERY)
    return (query // (2 * S) == key // (2 * S)) & (query % (2 * S) >= S) & (key % (2 * S) < S)


@triton.jit
def inverse(N, SCRATCH, C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + N)^-1`` of a strictly lower triangular ``N [C,C]``.

    First the diagonal blocks of 16, row by row in float32 and all at once, in the compact form
    ``X[c,r]``: column c at row r of its block. There a sum over the rows stays within few threads,
    which makes it ten times faster than on the square; memory (SCRATCH, C 16 floats) turns one
    form into the other. Then blocks are joined in pairs: the inverse of ``[[A, 0], [L, B]]`` has
    ``-B^-1 L A^-1`` below its diagonal.
    """
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    same = (i // 16) == (j // 16)
    tl.store(SCRATCH + i * 16 + j % 16, N, mask=same)
    tl.debug_barrier()
    r = tl.arange(0, 16)[None, :]
    X = tl.where(i % 16 == r, 1.0, 0.0)
    for row in tl.static_range(1, 16):
        n = tl.load(SCRATCH + (i // 16 * 16 + row) * 16 + r)
        x = tl.sum(n * X, axis=1)
        X = tl.where(r == row, X - x[:, None], X)
    tl.debug_barrier()
    tl.store(SCRATCH + i * 16 + r, X)
    tl.debug_barrier()
    X = tl.load(SCRATCH + j * 16 + i % 16, mask=same, other=0.0)
    if C >= 32:
        L = tl.where(halves(16, C, 0), N, 0.0)
        X -= tl.dot(tl.dot(X, L, input_precision=PRECISION), X, input_precision=PRECISION)
    if C >= 64:
        L = tl.where(halves(32, C, 0), N, 0.0)
        X -= tl.dot(tl.dot(X, L, input_precision=PRECISION), X, input_precision=PRECISION)
    return X
