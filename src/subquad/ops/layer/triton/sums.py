"""A kernel that adds up what programs have left of a gradient, always in the same order."""

from functools import partial

import triton.language as tl
from torch import Tensor

from subquad.ops.kernel import Kernel
from subquad.ops.sizes import cdiv

ROWS, COLUMNS = 128, 32


@partial(Kernel, sizes=["P"])
def add_up(PARTS, OUT, P, M, BP: tl.constexpr, BM: tl.constexpr):
    """OUT ``[M]``, the sum of the rows of PARTS ``[P,M]``."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.arange(0, BP)
    total = tl.zeros([BP, BM], tl.float32)
    for first in range(0, P, BP):
        at = PARTS + tl.cast(first + p, tl.int64)[:, None] * M + m[None, :]
        total += tl.load(at, mask=(first + p < P)[:, None] & (m < M)[None, :], other=0.0)
    tl.store(OUT + m, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=m < M)


def total(parts: Tensor, out: Tensor) -> Tensor:
    """``out``, into which the sum of ``parts [P,...]`` over the first axis goes."""
    M = out.numel()
    add_up.launch(
        (cdiv(M, COLUMNS),), (parts, out), parts.shape[0], M, BP=ROWS, BM=COLUMNS, num_warps=8
    )
    return out
