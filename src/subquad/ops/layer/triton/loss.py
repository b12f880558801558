"""Kernels of the cross-entropy.

    y_i = lse_i - x_{i,label},   dx_ij = (exp(x_ij - lse_i) - [j = label]) dy_i

Logits are read in their own dtype and are never there in float32. Legend: n rows, V classes, BV
classes at once.
"""

from functools import partial

import triton.language as tl

from subquad.ops.kernel import Kernel

LOG2E = tl.constexpr(1.4426950408889634)


@partial(Kernel, sizes=["ignored"])
def losses_forward(X, LABELS, Y, LSE, ignored, V, sx, BV: tl.constexpr):
    row = tl.program_id(0)
    X += row.to(tl.int64) * sx
    j = tl.arange(0, BV)
    top = tl.full([BV], float("-inf"), tl.float32)
    total = tl.zeros([BV], tl.float32)
    for first in range(0, V, BV):
        x = tl.load(X + first + j, mask=first + j < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, x)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2((top - safe) * LOG2E) + tl.exp2((x - safe) * LOG2E)
        top = new
    most = tl.max(top, 0)
    safe = tl.where(most == float("-inf"), 0.0, most)
    lse = safe + tl.log(tl.sum(total * tl.exp2((top - safe) * LOG2E), 0))
    label = tl.load(LABELS + row)
    x = tl.load(X + label, mask=label != ignored, other=0.0).to(tl.float32)
    tl.store(Y + row, tl.where(label == ignored, 0.0, lse - x))
    tl.store(LSE + row, lse)


@partial(Kernel, sizes=["ignored"])
def losses_backward(DY, X, LABELS, LSE, DX, ignored, V, sx, BV: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * BV + tl.arange(0, BV)
    label, lse = tl.load(LABELS + row), tl.load(LSE + row)
    g = tl.where(label == ignored, 0.0, tl.load(DY + row))
    x = tl.load(X + row.to(tl.int64) * sx + j, mask=j < V, other=0.0).to(tl.float32)
    p = tl.exp2((x - lse) * LOG2E)
    dx = tl.where(label == ignored, 0.0, (p - tl.where(j == label, 1.0, 0.0)) * g)
    tl.store(DX + row.to(tl.int64) * V + j, dx.to(DX.dtype.element_ty), mask=j < V)
