"""LongLoRA's shifted sparse attention (S2): groups in training, full attention afterwards.

Source: Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
arXiv 2309.12307, section 3.2; the groups are those of the authors' flash-attention path.

Legend: B batch, T tokens, H query heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.base import Context
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.layout import repeat_heads

VARIANTS = ("shift", "wrap", "none")
INFERENCE = ("full", "s2")


class LongLoRA(Softmax):
    """Causal softmax inside groups while training; half of the heads have theirs moved by half a
    group, so that neighbors exchange. Full attention in ``eval()``.

    Args:
        group: tokens in a group, even; None for a share ``ratio`` of the text's (made even).
        ratio: see ``group``.
        variant: "shift"; "none" moves no heads (the ablation); "wrap" rolls the heads around the
            text's end, so that its first half group sees its last (the paper's pseudo code, it
            leaks the future: ablations only, without padding, packing or a past).
        inference: "full", or "s2" to keep the groups in ``eval()`` too.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        group: int | None = None,
        ratio: float = 0.25,
        variant: str = "shift",
        inference: str = "full",
        **options: Any,
    ) -> None:
        super().__init__(dim=dim, heads=heads, **options)
        if self.window is not None:
            raise ValueError(f"window must be None beside groups, got {self.window}")
        checks.one_of("variant", variant, VARIANTS)
        checks.one_of("inference", inference, INFERENCE)
        if heads % 2:
            raise ValueError(f"heads must be even, half of them shift, got {heads}")
        if group is not None and (group < 2 or group % 2):
            raise ValueError(f"group must be even and positive, got {group}")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in 0..1, got {ratio}")
        self.group, self.ratio, self.variant, self.inference = group, ratio, variant, inference

    @property
    def sparse(self) -> bool:
        """Whether attention is in groups now."""
        return self.training or self.inference == "s2"

    def groups(self, tokens: int) -> int:
        """Tokens in a group of a text of ``tokens``."""
        return self.group or 2 * max(1, -int(-tokens * self.ratio // 2))

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not (self.sparse and self.variant == "wrap"):
            return super().heads_out(x, context)
        if context.state or context.padding is not None or context.cu_seqlens is not None:
            raise ValueError("variant 'wrap' takes no state, padding or cu_seqlens")
        q, k, v = self.qkv(x, context)
        o = self._wrapped(q, repeat_heads(k, self.heads), repeat_heads(v, self.heads))
        return o, Span(context, {"k": k, "v": v}).state()

    def _wrapped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, h = q.shape[1], self.heads // 2
        group = self.groups(T)
        if T % group:
            raise ValueError(f"variant 'wrap' needs T to be a multiple of {group}, got T={T}")

        def roll(t: Tensor, by: int) -> Tensor:
            return torch.cat([t[:, :, :h], t[:, :, h:].roll(by, 1)], 2)

        q, k, v = (roll(t, -(group // 2)) for t in (q, k, v))
        return roll(attention(q, k, v, self._grouped(group), scale=self.scale), group // 2)

    def visible(self, span: Span) -> Mask:
        return span.placed(self._part(span["k"].shape[1])) if self.sparse else span.mask()

    def _part(self, tokens: int) -> Mask:
        group = self.groups(tokens)
        if self.variant == "none":
            return self._grouped(group)
        return masks.per_head([self._grouped(group), self._grouped(group, group // 2)])

    @staticmethod
    def _grouped(group: int, shift: int = 0) -> Mask:
        return masks.causal() & masks.block_band(0, 0, group, shift=shift)

    def pairs(self, T: int) -> int:
        if not self.sparse:
            return super().pairs(T)
        part = self._part(T)
        return part.area(T, T) // part.planes[1]
