"""PowerAttention: blocks at the distances 1, 2, 4, 8, ... beside a window and sinks.

Source: Chen et al., "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse
Attention", arXiv 2503.03588, section 3 and Algorithm 1.

Legend: T tokens, D distance in blocks of a query and a key.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax
from subquad.ops import checks


def pattern(tokens: int, block: int, window: int) -> Mask:
    """``j <= p`` and (``D < window``, or D is a power of two, or ``j < block``), as far as
    ``tokens`` tokens need it."""
    blocks = -(-tokens // block)
    powers = [2**e for e in range(blocks.bit_length()) if window <= 2**e < blocks]
    kept = [masks.block_band(0, window - 1, block), masks.sinks(block)]
    kept += [masks.block_band(power, power, block) for power in powers]
    return masks.causal() & reduce(or_, kept)


class PowerAttention(Softmax):
    """Softmax over O(log T) blocks that reach every earlier token within log2(T / block) layers.

    Args:
        block: S, tokens in a block, and the sinks.
        window: W, blocks of the window, the token's own included.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "sinks")

    def __init__(self, *, dim: int, block: int = 256, window: int = 5, **options: Any) -> None:
        super().__init__(dim=dim, **options)
        checks.positive("block", block)
        checks.positive("window", window)
        self.block, self.near = block, window

    def visible(self, span: Span) -> Mask:
        return span.placed(pattern(span.length, self.block, self.near))

    def pairs(self, T: int) -> int:
        return pattern(T, self.block, self.near).area(T, T)
