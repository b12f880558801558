"""What the recurrence's kernels share: where a segment lies, tile loads, decays, the inverse.

Legend: C rows of a chunk, i and j rows (queries) and columns (keys) inside it, G the log decay
summed from the start of the chunk, ``[C]`` per head or ``[C,BK]`` per channel.
"""

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel

NONE, HEAD, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# One compilation serves every length and head count.
kernel = partial(Kernel, sizes=("T", "SIZE", "H", "HQ", "HK", "HV", "HD", "HB"))
LOG2E = tl.constexpr(1.4426950408889634)
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
def bulk(
    X, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """:func:`tile`, or by the copy engine from X's descriptor, which sees no end but the last."""
    if BULK:
        return X.load([first.to(tl.int32), h * W + column])
    else:
        return tile(X, first, left, heads, h, column, W, C, BW)


@triton.jit
def bulk_block(
    X, chunk, H, h, W: tl.constexpr, C: tl.constexpr, BULK: tl.constexpr
):  # fmt: skip
    """All of :func:`block`, or by the copy engine from X's descriptor."""
    if BULK:
        return X.load([(chunk * H + h) * C, 0])
    else:
        return block(X, chunk, H, h, 0, W, C, W)


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
def bulk_put_t(
    X, x, first, left, heads, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """:func:`put_t`, or by the copy engine through X's descriptor."""
    if BULK:
        X.store([first.to(tl.int32), h * W + column], tl.trans(x.to(X.dtype)))
    else:
        put_t(X, x, first, left, heads, h, column, W, C, BW)


@triton.jit
def numbers(X, first, left, heads, h, C: tl.constexpr):
    """``[C]`` float32 of ``X [tokens,heads]`` from token ``first`` on, 0 outside."""
    r = tl.arange(0, C)
    return tl.load(X + first * heads + h + r * heads, mask=r < left, other=0.0).to(tl.float32)


@triton.jit
def block(
    X, chunk, H, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """``[C,BW]`` of ``X [chunks,H,C,W]``, which holds whole chunks (rows without a token are 0)."""
    c = column + tl.arange(0, BW)[None, :]
    at = X + ((chunk.to(tl.int64) * H + h) * C + tl.arange(0, C)[:, None]) * W + c
    if W % BW != 0:
        x = tl.load(at, mask=c < W, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def put_block(
    X, x, chunk, H, h, column, W: tl.constexpr, C: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Write ``x [C,BW]`` where :func:`block` reads."""
    c = column + tl.arange(0, BW)[None, :]
    at = X + ((chunk.to(tl.int64) * H + h) * C + tl.arange(0, C)[:, None]) * W + c
    tl.store(at, x.to(X.dtype.element_ty), mask=c < W)


@triton.jit
def gates(
    GS, GD, chunk, H, h, C: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """For a decay per head: a chunk's exp(G) and exp(G_end - G), each ``[1,C]``; GD describes GS to
    the copy engine."""
    row = (chunk * H + h) * 3
    if BULK:
        rise = GD.load([row + 1, 0])
        fall = GD.load([row + 2, 0])
    else:
        at = GS + row.to(tl.int64) * C + tl.arange(0, C)[None, :]
        rise = tl.load(at + C)
        fall = tl.load(at + 2 * C)
    return rise, fall


@triton.jit
def gate_row(GS, row, chunk, H, h, C: tl.constexpr):
    """G, exp(G) or exp(G_end - G) of a chunk, ``[1,C]``, asked for a step ahead: a loop's loads are
    moved ahead by the compiler only where they go into an operand of a product."""
    at = GS + (chunk.to(tl.int64) * H + h) * (3 * C) + row * C
    return tl.load(at + tl.arange(0, C))[None, :]


@triton.jit
def betas(BS, BD, chunk, H, h, C: tl.constexpr, BULK: tl.constexpr):
    """A chunk's beta ``[1,C]``; BD describes BS to the copy engine."""
    if BULK:
        return BD.load([chunk * H + h, 0])
    else:
        return tl.load(BS + (chunk.to(tl.int64) * H + h) * C + tl.arange(0, C)[None, :])


@triton.jit
def whole_gate(GS, left, chunk, H, h, C: tl.constexpr):
    """For a decay per head: a chunk's exp(G_end); anything for none (``left`` not above 0)."""
    at = GS + (chunk.to(tl.int64) * H + h) * (3 * C) + 2 * C - 1
    return tl.load(at, mask=left > 0, other=0.0)


@triton.jit
def gate_place(GS, chunk, H, h, K: tl.constexpr):
    """Where GS has a chunk's gates for a decay per channel: three rows of K, and the power of two
    that its SCALED scores lack (:mod:`prepare`)."""
    return GS + (chunk.to(tl.int64) * H + h) * (3 * K + 4)


@triton.jit
def halved(x):
    """x as two bfloat16: cut off, not rounded, which takes a third of the instructions, and the
    rest."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def power(x):
    """The power of two at or below a float32 x >= 0, and its inverse (1 below the smallest)."""
    bits = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x7E800000)
    bits = tl.where(bits == 0, 0x3F800000, bits)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def in_registers(x):
    """x of half precision, which the compiler cannot then read from shared memory instead."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
    )


@triton.jit
def lost(x):
    """What rounding x to bfloat16 loses, in bfloat16; by its bits, since a conversion whose result
    is read again takes five times as long."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return (x - rounded.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def narrowed(x, kind: tl.constexpr, FINE: tl.constexpr):
    """x as an operand of a product: in ``kind``, or FINE, rounded to the eleven bits that tf32
    keeps of float32 (the tensor cores would cut it off)."""
    if FINE:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(kind)


@triton.jit
def fade(G_row, G_col, keep):
    """``exp(G_row - G_col)`` where ``keep``, else 0; never above 1 where keep is causal. By a power
    of two, which is one instruction: exp() takes four, to be right where its result is denormal."""
    return tl.exp2(tl.where(keep, (G_row - G_col) * LOG2E, float("-inf")))


@triton.jit
def summed(g, C: tl.constexpr, EXACT: tl.constexpr):
    """The sums ``G_i = g_0 + .. + g_i`` over the rows of a log decay ``g [C,BK]``, by a product: in
    registers a sum over rows takes many more instructions. g goes in as two float16, 22 bits."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if EXACT:
        return tl.dot(tl.where(i >= j, 1.0, 0.0), g, input_precision="tf32x3")
    ones = tl.where(i >= j, 1.0, 0.0).to(tl.float16)
    g = tl.maximum(g, -30000.0)  # within float16; exp() of it is 0
    high = g.to(tl.float16)
    low = (g - high.to(tl.float32)).to(tl.float16)
    return tl.dot(ones, low, tl.dot(ones, high))


@triton.jit
def summed_back(x, kind: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """``x_i + .. + x_{C-1}`` over the rows of a gradient ``x [C,BK]``, which goes in as two of
    ``kind``."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    ones = tl.where(i <= j, 1.0, 0.0).to(kind)
    if EXACT:
        return tl.dot(ones, x, input_precision="tf32x3")
    high = x.to(kind)
    low = (x - high.to(tl.float32)).to(kind)
    return tl.dot(ones, low, tl.dot(ones, high))


@triton.jit
def reference(G, S, C: tl.constexpr, BK: tl.constexpr):
    """For every row of ``G [C,BK]``: row S - 1 of the block of 2 S rows that it lies in."""
    r = (tl.arange(0, C)[:, None] & -2 * S) + S - 1
    return tl.gather(G, tl.broadcast_to(r, [C, BK]), axis=0)


@triton.jit
def halves(S, C: tl.constexpr):
    """``[C,C]``: the pairs whose i lies in the second and j in the first half of one block of 2 S
    rows."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i > j) & (((i ^ j) & -S) == S)  # S is the highest bit in which they differ


@triton.jit
def _join(X, N, S: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """Join the inverses of blocks of S rows in pairs: that of ``[[A, 0], [L, B]]`` has
    ``-B^-1 L A^-1`` below its diagonal. L needs no cutting out, since X holds A^-1 and B^-1 alone:
    N stays where the tensor cores read it. float16 keeps as many bits as tf32, and moves half."""
    if EXACT:
        below = tl.dot(tl.dot(X, N, input_precision="tf32x3"), X, input_precision="tf32x3")
    else:
        half = X.to(tl.float16)
        below = tl.dot(tl.dot(half, N).to(tl.float16), half)
    apart = tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]
    return X - tl.where(apart // S == 1, below, 0.0)


@triton.jit
def inverse(N, C: tl.constexpr, EXACT: tl.constexpr):
    """``(I + N)^-1 - I`` of a strictly lower triangular ``N [C,C]``, joined from blocks of one row:
    without its ones it loses least when it is rounded."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    X = tl.where(i == j, 1.0, tl.where((i ^ j) == 1, -N, 0.0))
    if not EXACT:
        N = N.to(tl.float16)
    X = _join(X, N, 2, C, EXACT)
    X = _join(X, N, 4, C, EXACT)
    X = _join(X, N, 8, C, EXACT)
    X = _join(X, N, 16, C, EXACT)
    X = _join(X, N, 32, C, EXACT)
    return tl.where(i == j, 0.0, X)
