"""Local linear attention (LLA): at every query, a weighted ridge regression of values on keys.

Source: Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
Attention For Test-Time Regression", arXiv 2510.01450 (ICLR 2026).

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.parallax import Probed
from subquad.ops import checks
from subquad.ops.probe import STEPS, cost, local_linear

LEAST = 1e-4  # of a learned ridge


class LLA(Probed):
    """``o_t`` is the intercept of the locally linear fit of the values around ``q_t``, where
    softmax attention is the locally constant one.

    Args:
        dim: C.
        heads: H.
        causal: whether a token sees only those before it and itself.
        ridge: at the start; one is learned a head, ``softplus(.) + 1e-4``. Large: softmax
            attention; small: more of the slope, and of the noise.
        steps: of conjugate gradients; ``min(K, 16)`` where None.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``sinks`` and ``out_bias``;
            ``scale`` is the inverse of the kernel's bandwidth.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        causal: bool = True,
        ridge: float = 1.0,
        steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim=dim, heads=heads, causal=causal, **options)
        if not LEAST < ridge < math.inf:
            raise ValueError(f"ridge must be finite and above {LEAST}, got {ridge}")
        self.steps = min(self.head_dim, STEPS) if steps is None else steps
        checks.positive("steps", self.steps)
        # The inverse of softplus, written so that it does not overflow.
        raw = ridge - LEAST + math.log(-math.expm1(LEAST - ridge))
        self.ridge = nn.Parameter(torch.full((heads,), raw))
        self.ridge._no_weight_decay = True  # type: ignore[attr-defined]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, places: Mapping[str, Any]
    ) -> Tensor:
        wide = torch.promote_types(self.ridge.dtype, torch.float32)
        ridge = F.softplus(self.ridge.to(wide)) + LEAST
        return local_linear(q, k, v, ridge=ridge, steps=self.steps, **places)

    def flops(self, T: int) -> int:
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        K, area = self.head_dim, self.pairs(T) * self.heads
        attend = cost.local_linear_flops(area=area, K=K, V=K, steps=self.steps)
        return 2 * T * projections + attend
