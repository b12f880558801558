"""Generalized neighborhood attention: neighbors that share a window, so that tiles are full.

Source: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at
the Speed of Light", arXiv 2504.16922.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subquad.mixers.neighborhood import NeighborhoodAttention


class GNA(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` where ``stride`` consecutive queries on an axis share the
    window of one of them: the centre one, or the last one on a causal axis.

    A stride of 1 is neighborhood attention, one of ``window`` is blocked attention. A text has no
    end yet, so the last group's window is that of its leader to come; the end of a ``grid`` is
    known, and there the last group is led by its last member.

    Args:
        stride: s of each axis, 1..window.
        **options: of :class:`NeighborhoodAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        window: int | Sequence[int] = (8, 8),
        stride: int | Sequence[int] = 4,
        **options: Any,
    ) -> None:
        super().__init__(dim=dim, window=window, **options)
        self.stride = self._spread(stride)
        self._least_grid()
        if self.relative_bias is not None and set(self.stride) != {1}:
            raise ValueError(f"relative_bias takes a stride of 1, got {self.stride}")
