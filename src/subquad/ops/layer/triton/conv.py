"""Kernels of the short convolution: a program walks through a chunk of one sequence, row by row.

    z_t = b + sum_j w_j x_{t-SIZE+1+j},   y_t = act(z_t)
    dz_t = dy_t act'(z_t),   dx_s = sum_j w_j dz_{s+SIZE-1-j},   dw_j = sum_t dz_t x_{t-SIZE+1+j}

The last SIZE - 1 rows stay in registers, so that a chunk reads each row once; those beside a chunk
are read again. z is computed again in the backward pass.

Legend: B batch, T tokens, D channels, N sequences, L tokens of a chunk, R rows asked for at once,
BD channels of a program.
"""

# mypy: disable-error-code="assignment"
# (tuples grow)

from functools import partial

import triton
import triton.language as tl

from subquad.ops.kernel import Kernel
from subquad.ops.layer.triton.activation import activate, with_slope

SIZES = ["T", "L", "N", "chunks", "blocks"]  # none costs a compilation


@triton.jit
def _chunk(c, CU, T, L, N, chunks):
    """Sequence n, its first token and its end, and the first token of this program's chunk.

    Packed, sequence n has the chunks from ``cu_n // L + n`` on; there are more than it needs.
    """
    if CU is None:
        return c // chunks, 0, T, c % chunks * L
    else:
        n, last = 0, N - 1
        while n < last:
            middle = (n + last + 1) // 2
            ours = tl.load(CU + middle) // L + middle <= c
            n = tl.where(ours, middle, n)
            last = tl.where(ours, last, middle - 1)
        first, end = tl.cast(tl.load(CU + n), tl.int32), tl.cast(tl.load(CU + n + 1), tl.int32)
        return n, first, end, first + (c - first // L - n) * L


@triton.jit
def _parameters(block, WEIGHT, BIAS, D, SIZE: tl.constexpr, BD: tl.constexpr):
    """The channels, their weights (SIZE rows) and their bias."""
    d = block * BD + tl.arange(0, BD)
    w = ()
    for j in tl.static_range(SIZE):
        w = w + (tl.load(WEIGHT + d * SIZE + j, mask=d < D, other=0.0).to(tl.float32),)
    if BIAS is None:
        b = tl.zeros([BD], tl.float32)
    else:
        b = tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    return d, w, b


@triton.jit
def _there(d, D, row):
    """Where channels d of a row are, which may not be one."""
    return d < tl.where(row, D, 0)


@triton.jit
def _before(X, PAST, n, first, start, d, D, sxt, SIZE: tl.constexpr):
    """The SIZE - 1 rows before a chunk: of its sequence, else of its past, else zeros."""
    rows = ()
    for j in tl.static_range(SIZE - 1):
        s = start - SIZE + 1 + j
        x = tl.load(X + s * sxt + d, mask=_there(d, D, s >= first), other=0.0)
        x = x.to(tl.float32)
        if PAST is not None:
            at = tl.cast(n * (SIZE - 1) + s - first + SIZE - 1, tl.int64)
            past = tl.load(PAST + at * D + d, mask=_there(d, D, s < first), other=0.0)
            x = tl.where(s < first, past.to(tl.float32), x)
        rows = rows + (x,)
    return rows


@triton.jit
def _ask(X, t, stop, step, d, D, R: tl.constexpr):
    """Rows t to t + R of X, as they are, zeros from stop on."""
    rows = ()
    for r in tl.static_range(R):
        there = _there(d, D, t + r < stop)
        rows = rows + (tl.load(X + (t + r) * step + d, mask=there, other=0.0),)
    return rows


@partial(Kernel, sizes=SIZES)
def conv_forward(
    X, WEIGHT, BIAS, PAST, CU, Y, T, L, N, chunks, blocks, D, sxb, sxt,
    SIZE: tl.constexpr, ACT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) // blocks
    n, first, end, start = _chunk(c, CU, T, L, N, chunks)
    d, w, b = _parameters(tl.program_id(0) % blocks, WEIGHT, BIAS, D, SIZE, BD)
    sxt = tl.cast(sxt, tl.int64)
    if CU is None:
        X += tl.cast(n, tl.int64) * sxb
        Y += tl.cast(n, tl.int64) * T * D
    window = _before(X, PAST, n, first, start, d, D, sxt, SIZE)
    stop = tl.minimum(start + L, end)
    ahead = _ask(X, start, stop, sxt, d, D, R)
    for t in range(start, stop, R):
        rows = window
        for r in tl.static_range(R):
            rows = rows + (ahead[r].to(tl.float32),)
        ahead = _ask(X, t + R, stop, sxt, d, D, R)
        for r in tl.static_range(R):
            z = b
            for j in tl.static_range(SIZE):
                z += w[j] * rows[r + j]
            y = activate(z, ACT).to(Y.dtype.element_ty)
            tl.store(Y + (t + r) * tl.cast(D, tl.int64) + d, y, mask=_there(d, D, t + r < stop))
        window = rows[R:]


@partial(Kernel, sizes=SIZES, length=2)
def conv_backward(
    DY, X, WEIGHT, BIAS, PAST, CU, DX, DPAST, DW, DB,
    T, L, N, chunks, blocks, D, sxb, sxt, syb, syt,
    SIZE: tl.constexpr, ACT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """DW ``[chunks,D,SIZE]`` and DB ``[chunks,D]``: what each chunk adds to the gradients."""
    c = tl.program_id(0) // blocks
    n, first, end, start = _chunk(c, CU, T, L, N, chunks)
    d, w, b = _parameters(tl.program_id(0) % blocks, WEIGHT, BIAS, D, SIZE, BD)
    sxt, syt = tl.cast(sxt, tl.int64), tl.cast(syt, tl.int64)
    if CU is None:
        X += tl.cast(n, tl.int64) * sxb
        DY += tl.cast(n, tl.int64) * syb
        DX += tl.cast(n, tl.int64) * T * D
    window = _before(X, PAST, n, first, start, d, D, sxt, SIZE)
    stop = tl.minimum(start + L, end)
    seen = tl.minimum(stop + SIZE - 1, end)  # the last rows of dx need what follows them
    zero = tl.zeros([BD], tl.float32)
    after, dw, db = (), (), zero
    for _ in tl.static_range(SIZE - 1):
        after = after + (zero,)
    for _ in tl.static_range(SIZE):
        dw = dw + (zero,)
    ahead, given = _ask(X, start, seen, sxt, d, D, R), _ask(DY, start, seen, syt, d, D, R)
    for t in range(start, stop + SIZE - 1, R):
        rows, grads, dy = window, after, given
        for r in tl.static_range(R):
            rows = rows + (ahead[r].to(tl.float32),)
        ahead, given = _ask(X, t + R, seen, sxt, d, D, R), _ask(DY, t + R, seen, syt, d, D, R)
        for r in tl.static_range(R):
            z = b
            for j in tl.static_range(SIZE):
                z += w[j] * rows[r + j]
            dz = dy[r].to(tl.float32) * with_slope(z, ACT)[1]
            grads = grads + (dz,)
            own = tl.where(t + r < stop, dz, 0.0)
            more = ()
            for j in tl.static_range(SIZE):
                more = more + (dw[j] + own * rows[r + j],)
            dw = more
            db += own
            dx = zero
            for j in tl.static_range(SIZE):
                dx += w[j] * grads[r + SIZE - 1 - j]
            s = t + r - SIZE + 1
            at = DX + s * tl.cast(D, tl.int64) + d
            tl.store(at, dx.to(DX.dtype.element_ty), mask=_there(d, D, (s >= start) & (s < stop)))
            if DPAST is not None:
                at = tl.cast(n * (SIZE - 1) + s - first + SIZE - 1, tl.int64)
                mine = _there(d, D, (start == first) & (s < first))
                tl.store(DPAST + at * D + d, dx.to(DPAST.dtype.element_ty), mask=mine)
        window, after = rows[R:], grads[R:]
    DW += (tl.cast(c, tl.int64) * D + d) * SIZE
    for j in tl.static_range(SIZE):
        tl.store(DW + j, dw[j], mask=d < D)
    if DB is not None:
        tl.store(DB + tl.cast(c, tl.int64) * D + d, db, mask=d < D)
