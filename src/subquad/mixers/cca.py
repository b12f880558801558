"""Core context aware attention: distant groups as one core token each, a window of all the rest.

Source: Chen et al., "Core Context Aware Transformers for Long Context Language Modeling",
arXiv 2412.12465 (the ICML version).

Legend: N rows, T tokens, S tokens at hand, H query heads, G key/value heads, K head dim, M cores,
g tokens in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.base import Context
from subquad.mixers.parts.past import Span, compact
from subquad.mixers.parts.rotary import rotate
from subquad.mixers.parts.summary import extend, run
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.attention import attention, merge
from subquad.ops.backend import without_autocast

CORE_ROPE = ("pooled", "rotated")


class CCA(Softmax):
    """One softmax over the core tokens of distant groups and all tokens since.

    Token i (from 1) sees ``J = floor((i - local) / group)`` cores, at least 0, and the tokens after
    the ``J group``-th. The core of a group is ``sum_j a_j (k_j, v_j)``, a the softmax of the scores
    of the group's last query (averaged over the heads that share a key head) with its keys. No
    parameter is added, and group and local may change between calls without a state.

    Args:
        group: g.
        local: s, least number of tokens seen one by one.
        core_rope: "pooled" pools the rotated keys; "rotated" pools them unrotated and rotates the
            sum to the group's last position.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")
    past = ()

    def __init__(
        self,
        *,
        dim: int,
        group: int = 16,
        local: int = 1024,
        core_rope: str = "pooled",
        **options: Any,
    ) -> None:
        checks.positive("group", group)
        checks.positive("local", local)
        checks.one_of("core_rope", core_rope, CORE_ROPE)
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to local, got {sorted(options)}")
        super().__init__(dim=dim, **options)
        self.group, self.local, self.core_rope = group, local, core_rope

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        q, k, v = self.qkv(x, context)
        span = Span(context, {"k": k, "v": v}, rows=True)
        q = span.rows(q)
        total = self._total(span, context, q.shape[1])
        cores = self._cores(q, span, context, total)
        o = self._attend(q, span, cores, total, context)
        kept = self._kept(total) if span.pad is None else self.local + self.group
        state = {"k": span["k"], "v": span["v"]}
        state |= {} if span.pad is None else {"pad": span.pad}
        state = {name: compact(t[:, max(t.shape[1] - kept, 0) :]) for name, t in state.items()}
        state["core_k"], state["core_v"] = cores
        return span.tokens(o), state

    def _total(self, span: Span, context: Context, T: int) -> int:
        """Tokens that the longest row has seen. Where no row is padded the state's shape tells."""
        past = context.past("core_k")
        if past is None:
            return span["k"].shape[1]
        if span.pad is not None:
            return int(context.seen_after.max())
        return past.shape[1] * self.group + (span["k"].shape[1] - T) % self.group + T

    def _kept(self, total: int) -> int:
        """Tokens that the token after ``total`` of them sees one by one."""
        return total - max(0, (total + 1 - self.local) // self.group) * self.group

    def _cores(self, q: Tensor, span: Span, context: Context, total: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N,M,G,K]`` of the cores, those of the groups now complete included."""
        g, (T, S) = self.group, (q.shape[1], span["k"].shape[1])
        before: int | Tensor = (total - T) // g
        start: int | Tensor = S - total
        first: int | Tensor = T - total
        index, count, most = None, total // g - (total - T) // g, total // g
        if span.pad is not None:
            seen = context.seen_after
            before, start, first = context.seen // g, S - seen, T - seen
            count = int((seen // g - before).max())
            index = before[:, None] + torch.arange(count, device=q.device)
            index = torch.where(index < seen[:, None] // g, index, -1)
            most = int(seen.max()) // g
        k, v = (
            run(span[name], start + before * g, count * g).unflatten(1, (count, g))
            for name in ("k", "v")
        )
        ends = run(q, first + before * g + g - 1, count, g)
        new = self._pool(ends.unflatten(2, (self.kv_heads, -1)).mean(3), k, v)
        past = (context.past("core_k"), context.past("core_v"))
        core_k, core_v = (extend(old, t, index, most) for old, t in zip(past, new))
        return core_k, core_v

    def _pool(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q ``[N,R,G,K]``, k and v ``[N,R,g,G,K]``: the cores ``[N,R,G,K]``."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q.device.type):
            scores = self.scale * torch.einsum("nrhk,nrjhk->nrjh", q.to(wide), k.to(wide))
        share = scores.softmax(2)[..., None]
        if self.core_rope == "rotated" and self.rope_theta is not None:
            turn = torch.arange(self.group - 1, -1, -1, device=k.device)[None]
            k = rotate(
                k.flatten(0, 1), turn, self._frequencies(k), layout=self.rope_layout
            ).view_as(k)
        core_k, core_v = ((share * t.to(wide)).sum(2).to(t.dtype) for t in (k, v))
        return core_k, core_v

    def _attend(
        self,
        q: Tensor,
        span: Span,
        cores: tuple[Tensor, Tensor],
        total: int,
        context: Context,
    ) -> Tensor:
        T, S = q.shape[1], span["k"].shape[1]
        near, far, offset = self._near(), self._far(), total - T
        if span.pad is not None:  # else only whole groups are forgotten: the bands lie as they did
            near = masks.placed(near, S - context.seen_after)
            starts = T - context.seen_after
            far, offset = masks.placed(far, starts, torch.zeros_like(starts)), 0
        parts = [attention(q, span["k"], span["v"], near, scale=self.scale, return_lse=True)]
        if cores[0].shape[1]:
            part = attention(q, *cores, far, scale=self.scale, offset=offset, return_lse=True)
            parts.append(part)
        return merge(parts)[0]

    def _near(self) -> Mask:
        """The tokens from ``J group`` on, counted from 0."""
        band = masks.block_band(None, 0, self.group, shift=1 - self.local, key_shift=0)
        return masks.causal() & band

    def _far(self) -> Mask:
        """The cores before J."""
        return masks.block_band(1, None, self.group, 1, shift=1 - self.local, key_shift=0)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        kept = self._kept(T) + T // self.group
        return kept * 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def pairs(self, T: int) -> int:
        cores = T // self.group
        return self._near().area(T, T) + (self._far().area(T, cores, 0) if cores else 0)
