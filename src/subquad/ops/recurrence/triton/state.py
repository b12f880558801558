"""The state of the passes over time in a program's registers, in tiles of key channels.

It stands transposed, float32 ``[BV,BK]`` each: a program owns BV of its value columns. One tile
holds up to 128 key channels. A state of 256 channels takes half of all registers, and with two
tiles only one has its operand of half precision beside it at a time.
"""

import triton
import triton.language as tl

from subquad.ops.recurrence.triton.parts import CHANNEL, block, bulk, gate_place


@triton.jit
def no_tiles():
    """To add tiles to."""
    return ()


@triton.jit
def state_at(X, index, h, H, rows, columns, K: tl.constexpr, V: tl.constexpr):
    """Pointers and mask of ``X [index,H,K,V]`` as the transposed ``[rows of V, columns of K]``."""
    at = X + ((index.to(tl.int64) * H + h) * K + columns[None, :]) * V + rows[:, None]
    return at, (columns[None, :] < K) & (rows[:, None] < V)


@triton.jit
def opening(
    INIT, index, h, H, rows, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    HAS_INIT: tl.constexpr,
):  # fmt: skip
    """The tiles of ``INIT [index,H,K,V]``, or of zeros."""
    S = no_tiles()
    for column in tl.static_range(0, K, BK):
        if HAS_INIT:
            at, ok = state_at(INIT, index, h, H, rows, column + tl.arange(0, BK), K, V)
            S += (tl.load(at, mask=ok, other=0.0),)
        else:
            S += (tl.zeros([rows.shape[0], BK], tl.float32),)
    return S


@triton.jit
def identity(rows, K: tl.constexpr, BK: tl.constexpr):
    """The tiles of a transition over no token; 0 where ``rows`` are not channels."""
    S = no_tiles()
    for column in tl.static_range(0, K, BK):
        S += (tl.where(column + tl.arange(0, BK)[None, :] == rows[:, None], 1.0, 0.0),)
    return S


@triton.jit
def put_state(X, S, index, h, H, rows, below, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Write the tiles to ``X [index,H,K,V]``: the rows under ``below``."""
    for x in tl.static_range((K + BK - 1) // BK):
        at, ok = state_at(X, index, h, H, rows, x * BK + tl.arange(0, BK), K, V)
        tl.store(at, S[x], mask=ok & (rows[:, None] < below))


@triton.jit
def keep(
    HS, S, chunk, h, H, row, column, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Write a tile, its values from ``row`` and channels from ``column`` on, to
    ``HS [chunks,H,V,K]``."""
    if BULK:
        HS.store([(chunk * H + h) * V + row, column], S)
    else:
        rows = row + tl.arange(0, BV)[:, None]
        columns = column + tl.arange(0, BK)[None, :]
        at = HS + (chunk.to(tl.int64) * H + h) * (V * K) + rows * K + columns
        tl.store(at, S, mask=(rows < V) & (columns < K))


@triton.jit
def operand(
    X, GATED, t, left, heads, hx, chunk, H, h,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """q or k of a chunk, in tiles ``[C,BK]``: what prepare gated, or X itself."""
    found = no_tiles()
    for column in tl.static_range(0, K, BK):
        if DECAY == CHANNEL:
            if BULK:
                found += (GATED.load([(chunk * H + h) * C, column]),)
            else:
                found += (block(GATED, chunk, H, h, column, K, C, BK),)
        else:
            found += (bulk(X, t, left, heads, hx, column, K, C, BK, BULK),)
    return found


@triton.jit
def fading(GS, left, chunk, H, h, K: tl.constexpr, BK: tl.constexpr):
    """For a decay per channel: what each tile is multiplied with over a chunk, exp(G_end)
    ``[1,BK]``; anything for none (``left`` not above 0). To be asked for a step ahead, as
    :func:`parts.gate_row`."""
    found = no_tiles()
    for column in tl.static_range(0, K, BK):
        columns = column + tl.arange(0, BK)[None, :]
        at = gate_place(GS, chunk, H, h, K) + columns
        found += (tl.load(at, mask=columns < tl.where(left > 0, K, 0), other=0.0),)
    return found


@triton.jit
def fades(GS, chunk, H, h, K: tl.constexpr, BK: tl.constexpr):
    """:func:`fading`, asked for where it is read: several tiles leave no registers to wait in."""
    found = no_tiles()
    for column in tl.static_range(0, K, BK):
        columns = column + tl.arange(0, BK)
        place = gate_place(GS, chunk, H, h, K) + columns
        found += (tl.load(place, mask=columns < K, other=0.0)[None, :],)
    return found


@triton.jit
def scale_of(GS, left, chunk, H, h, K: tl.constexpr):
    """The power of two that a chunk's SCALED scores lack, asked for as :func:`fading`."""
    return tl.load(gate_place(GS, chunk, H, h, K) + 3 * K, mask=left > 0, other=0.0)


@triton.jit
def met(
    S, GATED, x, chunk, H, h, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x and the tiles times those of GATED, each brought where it is read: less is held at once
    than by :func:`operand`."""
    for n in tl.static_range(len(S)):
        g = block(GATED, chunk, H, h, n * BK, K, C, BK)
        x = tl.dot(S[n].to(g.dtype), tl.trans(g), x, input_precision=PRECISION)
    return x


@triton.jit
def moved(
    S, GS, KG, D, rest, chunk, H, h, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles after a chunk that writes D and its ``rest``; the factors and KG brought as in
    :func:`met`."""
    found = no_tiles()
    for n in tl.static_range(len(S)):
        g = block(KG, chunk, H, h, n * BK, K, C, BK)
        columns = n * BK + tl.arange(0, BK)[None, :]
        s = S[n] * tl.load(gate_place(GS, chunk, H, h, K) + columns, mask=columns < K, other=0.0)
        s = tl.dot(D, g, s, input_precision=PRECISION)
        found += (tl.dot(rest, g, s, input_precision=PRECISION),)
    return found


@triton.jit
def each(x, tiles: tl.constexpr):
    """x for every tile."""
    found = no_tiles()
    for _ in tl.static_range(tiles):
        found += (x,)
    return found


@triton.jit
def picked(S, x):
    """Tile x, which need not be a constant."""
    found = S[0]
    for y in tl.static_range(1, len(S)):
        found = tl.where(x == y, S[y], found)
    return found


@triton.jit
def product(A, B):
    """Tile by tile."""
    found = no_tiles()
    for x in tl.static_range(len(A)):
        found += (A[x] * B[x],)
    return found


@triton.jit
def added(S, D, k, PRECISION: tl.constexpr):
    """The tiles and D times those of k."""
    found = no_tiles()
    for x in tl.static_range(len(S)):
        found += (tl.dot(D, k[x], S[x], input_precision=PRECISION),)
    return found
