"""RALA: linear attention whose terms are weighed and whose output is gated, against low rank.

Source: Fan, Huang, He, "Breaking the Low-Rank Dilemma of Linear Attention", arXiv 2411.07635,
equations 4 to 8, and the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.mixers.parts.grid import GatedImageAttention, positive
from subquad.ops.backend import without_autocast
from subquad.ops.kernel_attention import bidirectional


class RALA(GatedImageAttention):
    """``w_ij = alpha_j phi(q_i) . phi(k_j) / sum_m alpha_m phi(q_i) . phi(k_m)``,
    ``phi = elu + 1``, ``alpha_j = T softmax_j(K^-0.5 mean_i(phi(q_i)) . phi(k_j))``.

    The numerator is of turned q and k, the denominator is not. Arguments as of
    :class:`~subquad.mixers.parts.grid.GatedImageAttention`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k = positive(q), positive(k)
        k = weights_of_keys(q, k)[..., None] * k
        turned = (self.place(q, grid), self.place(k, grid))
        return bidirectional(q, k, v, "divide", scale=1.0, turned=turned)


def weights_of_keys(q: Tensor, k: Tensor) -> Tensor:
    """alpha ``[B,T,H]``, of mean 1, from features ``[B,T,H,K]``."""
    with without_autocast(q.device.type):
        scores = torch.einsum("bhk,bthk->bth", q.mean(1), k) * q.shape[-1] ** -0.5
    return k.shape[1] * scores.softmax(1)
