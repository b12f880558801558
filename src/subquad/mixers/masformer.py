"""MASFormer: full attention in a few layers, short spans in all others.

Source: Zhang et al., "Efficient Long-Range Transformers: You Need to Attend More, but Not
Necessarily at Every Layer", arXiv 2310.12442.

Legend: T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax
from subquad.ops import checks

PLACEMENTS = ("bottom", "top", "interleaved")
SHORT = ("block", "window")


def full_layers(layers: int, full: int, placement: str | Sequence[int] = "bottom") -> set[int]:
    """Which ``full`` of ``layers`` layers attend to everything.

    Args:
        placement: "bottom" (the first), "top" (the last), "interleaved" (every
            ``layers // full``-th, from the first on), or the layers' numbers themselves.
    """
    if not isinstance(placement, str):
        chosen = set(placement)
        if not chosen <= set(range(layers)):
            raise ValueError(f"placement must hold layers in 0..{layers - 1}, got {placement}")
        return chosen
    checks.one_of("placement", placement, PLACEMENTS)
    checks.positive("full", full, zero=True)
    full = min(full, layers)
    if placement == "interleaved":
        return {n * (layers // full) for n in range(full)}
    return set(range(full) if placement == "bottom" else range(layers - full, layers))


class MASFormer(Softmax):
    """Softmax over everything in the layers chosen, else over a token's own and previous blocks.

    No parameter differs from softmax attention: a pretrained model changes its masks only.

    Args:
        full: l, how many layers attend to everything; a third of them where None.
        placement: which, see :func:`full_layers`.
        short: of the others: "block", or "window" for the last ``block`` tokens before each
            (``i - j <= block``).
        block: b, tokens in a block.
        previous: p, blocks before a token's own that it sees; 0 for its own alone.
        layer: this layer's number; layers: L, of the model.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")

    def __init__(
        self,
        *,
        dim: int,
        full: int | None = None,
        placement: str | Sequence[int] = "bottom",
        short: str = "block",
        block: int = 1024,
        previous: int = 1,
        layer: int = 0,
        layers: int = 1,
        **options: Any,
    ) -> None:
        checks.one_of("short", short, SHORT)
        checks.positive("block", block)
        checks.positive("previous", previous, zero=True)
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to block, got {sorted(options)}")
        full = layers // 3 if full is None else full
        self.spans_all = layer in full_layers(layers, full, placement)
        kept = block + 1 if short == "window" else (previous + 1) * block
        super().__init__(dim=dim, window=None if self.spans_all else kept, **options)
        self.short, self.block, self.previous = short, block, previous

    @property
    def _blocked(self) -> bool:
        return not self.spans_all and self.short == "block"

    def visible(self, span: Span) -> Mask:
        return span.placed(self._blocks()) if self._blocked else span.mask()

    def _blocks(self) -> Mask:
        return masks.causal() & masks.block_band(0, self.previous, self.block)

    def pairs(self, T: int) -> int:
        return self._blocks().area(T, T) if self._blocked else super().pairs(T)
