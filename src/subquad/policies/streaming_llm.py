"""StreamingLLM: the first tokens, which soak up attention, and a window of the last ones.

Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim, s sinks, w window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad import mask
from subquad.caches.ring import RingLayer
from subquad.ops import checks
from subquad.ops.attention import attention, merge
from subquad.ops.attention.token import token
from subquad.policies.base import Call, Policy, Site


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Every token attends to the first ``sinks`` and the last ``window`` tokens, itself included.

    Nothing else stays in memory. With positions of the cache, the sinks stand right before the
    window however far away they were: query t is rotated to min(t, s + w - 1) for them. (Window
    keys keep their distance, so a whole prompt is the merge of two attentions.)

    Attributes:
        sinks: s, may be 0; window: w.
        position: "cache" counts places inside the cache (any length of stream), "absolute" keeps
            the true ones (the A-shape of DuoAttention and MInference).
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("cache", "absolute")

    sinks: int = 4
    window: int = 1020
    position: str = "cache"

    def __post_init__(self) -> None:
        checks.positive("sinks", self.sinks, zero=True)
        checks.positive("window", self.window)
        checks.one_of("position", self.position, self.POSITIONS)

    @property
    def late_rope(self) -> bool:  # type: ignore[override]
        return self.position == "cache"

    def layer(self, site: Site) -> RingLayer:
        if site.window is not None and site.window <= self.window:
            return RingLayer(0, site.window)  # as trained: without sinks, and no longer
        return RingLayer(self.sinks, self.window)

    def repeats(self, site: Site) -> bool:
        return True

    def settle(self, call: Call) -> None:
        assert isinstance(call.layer, RingLayer)
        call.layer.settle()

    def prefill(self, call: Call) -> Tensor:
        assert isinstance(call.layer, RingLayer)
        sizes = call.layer.sinks, call.layer.window
        return call.unpadded(lambda alone: self._prefill(alone, *sizes))

    def _prefill(self, call: Call, s: int, w: int) -> Tensor:
        """The layer holds the sinks, the window before the new tokens, and these."""
        k, v = call.layer.keys, call.layer.values
        T, S = call.q.shape[1], k.shape[1]
        near, far = mask.causal() & mask.window(w - 1), mask.causal() & mask.sinks(s)
        if call.tally is not None:
            call.count((near | far).area(T, S) * call.site.heads * call.q.shape[0])
        if not self.late_rope:
            return attention(call.q, k, v, near | far, scale=call.scale)
        # Places in what is held: right for differences in the window, small in an endless stream.
        place = torch.arange(S, device=k.device).expand(k.shape[0], S)
        turned, own = call.rotate(k, place), place[:, S - T :]
        q = call.rotate(call.q, own)
        if s == 0:
            return attention(q, turned, v, near, scale=call.scale)
        before = call.layer.seen - T
        t = torch.arange(before, before + T, device=k.device).expand(k.shape[0], T)
        q_far = call.rotate(call.q, t.clamp_max(s + w - 1))
        beyond = attention(
            q_far, turned[:, :s], v[:, :s], far & ~near, scale=call.scale, offset=S - T,
            return_lse=True,
        )  # fmt: skip
        o, _ = merge([attention(q, turned, v, near, scale=call.scale, return_lse=True), beyond])
        return o

    def decode(self, call: Call) -> Tensor:
        layer = call.layer
        assert isinstance(layer, RingLayer)
        lengths = [min(n, layer.slots) for n in layer.lengths()]
        call.count(sum(lengths) * call.site.heads)
        k, v, clock, _ = layer.held()
        q, seen = call.q, layer.lengths()
        if self.late_rope:
            rope = call.rope(layer.slots) if min(seen) == max(seen) else None
            if rope is not None:
                last, ring = 0 if clock is not None else seen[0] - 1, (layer.sinks, layer.window)
                return token(q, k, v, clock, last, scale=call.scale, rope=rope, ring=ring)
            counted = layer.counted(k.device)
            gone = (counted - layer.slots).clamp_min(0)
            slot = torch.arange(k.shape[1], device=k.device)
            place = torch.where(slot < layer.sinks, slot, layer.token_at(slot) - gone)
            k = call.rotate(k, place.clamp_min(0))
            q = call.rotate(q, counted - 1 - gone)
        if min(lengths) == max(lengths):
            return token(q, k, v, clock, scale=call.scale)
        rows = [
            attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], scale=call.scale)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(rows)
