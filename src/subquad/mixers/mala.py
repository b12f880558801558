"""MALA: linear attention that hears how long a query is.

Source: Fan, Huang, Ai, He, "Rectifying Magnitude Neglect in Linear Attention", arXiv 2507.00698,
equations 5 to 8, with the scores' factor ``K^-0.5 / T`` of the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from subquad.mixers.parts.grid import GatedImageAttention, positive
from subquad.ops.kernel_attention import bidirectional


class MALA(GatedImageAttention):
    """``w_ij = (1 + 1/z_i) s_ij - z_i / T``, ``s_ij = K^-0.5 phi(q_i) . phi(k_j) / T``,
    ``z_i = sum_j s_ij``, ``phi = elu + 1``.

    A row of weights sums to 1 (before q and k turn) and grows sharper with the query's length; a
    weight may be negative. Arguments as of
    :class:`~subquad.mixers.parts.grid.GatedImageAttention`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k = positive(q), positive(k)
        turned = (self.place(q, grid), self.place(k, grid))
        return bidirectional(q, k, v, "magnitude", turned=turned)
