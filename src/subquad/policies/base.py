"""The contract of a policy: how a pretrained model attends to its past, without training.

Legend: B batch, T new tokens, S cached entries, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad import mask
from subquad.caches.kv import KVLayer
from subquad.ops.attention import attention


@dataclass(frozen=True)
class Site:
    """Where a policy works: one attention layer of the model.

    Attributes:
        index: of the layer; layers: how many the model has.
        heads, kv_heads, head_dim: H, G, K.
        window: the model's own sliding window here, None where it attends to everything.
    """

    index: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class Call:
    """One forward pass through one attention layer.

    Attributes:
        site: where.
        q, k, v: the new tokens, ``[B,T,H,K]``, ``[B,T,G,K]``, ``[B,T,G,V]``; rotated, unless the
            policy asks for late rotation.
        layer: the cache layer, which already holds k and v.
        scale: of the scores.
        real: bool ``[B, tokens seen]``, False at padding; None without padding.
        positions: int64 ``[B,T]`` of the new tokens, as the model counts them.
        rotate: ``rotate(x [B,S,*,K], positions [B,S]) -> x`` rotates with the model's own RoPE.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    layer: KVLayer
    scale: float
    real: Tensor | None
    positions: Tensor
    rotate: Callable[[Tensor, Tensor], Tensor]

    @property
    def first(self) -> bool:
        """Whether these tokens are the first that the layer sees."""
        return self.layer.seen == self.q.shape[1]

    def mask(self) -> mask.Mask:
        """Who may see whom in the model without any policy: causal, its own window, padding."""
        m = mask.causal()
        if self.site.window is not None:
            m = m & mask.window(self.site.window - 1, 0)
        if self.real is not None:
            m = m & mask.documents(torch.where(self.real, 0, -1))
        return m

    def dense(self) -> Tensor:
        """Attend to everything that the layer holds, ``[B,T,H,V]``: the model without a policy."""
        return attention(self.q, self.layer.keys, self.layer.values, self.mask(), scale=self.scale)


class Policy:
    """How the prompt and the generated tokens attend, and what the cache keeps.

    A subclass is a frozen dataclass of its budgets. It writes ``prefill``, ``decode``, ``layer``, or
    some of them; what it leaves alone stays as the model has it, and ``A() + B()`` joins a policy
    for the prompt with one for decoding.

    Class attributes:
        late_rope: the cache keeps keys before their rotation and the policy rotates them
            (``Call.rotate``), as renumbered positions need.
        batched: whether it takes more than one sequence at a time.
    """

    late_rope: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def check(self, sites: list[Site]) -> None:
        """Refuse, with a ValueError, a model that this policy cannot serve."""

    def layer(self, site: Site) -> KVLayer:
        """A fresh cache layer for ``site``; all keys and values by default."""
        return KVLayer()

    def prefill(self, call: Call) -> Tensor:
        """Attention of a prompt, or a further piece of one (T > 1): ``o [B,T,H,V]``."""
        return call.dense()

    def decode(self, call: Call) -> Tensor:
        """Attention of one token (T = 1): ``o [B,1,H,V]``."""
        return call.dense()

    @property
    def shapes_prefill(self) -> bool:
        return type(self).prefill is not Policy.prefill

    @property
    def shapes_decode(self) -> bool:
        return type(self).decode is not Policy.decode or type(self).layer is not Policy.layer

    def __add__(self, other: Policy) -> Policy:
        return Joined(self, other)


@dataclass(frozen=True)
class Joined(Policy):
    """``prompt`` shapes the prefill, ``answer`` the decoding and the cache.

    Raises:
        ValueError: where both claim the same phase, or they disagree on when keys are rotated.
    """

    prompt: Policy
    answer: Policy

    def __post_init__(self) -> None:
        a, b = type(self.prompt).__name__, type(self.answer).__name__
        if self.prompt.shapes_decode:
            raise ValueError(f"{a} + {b}: {a} shapes the decoding, so it must come alone or last")
        if self.answer.shapes_prefill:
            raise ValueError(f"{a} + {b}: {b} shapes the prefill, which {a} does already")
        if self.prompt.late_rope != self.answer.late_rope:
            raise ValueError(f"{a} + {b}: one rotates keys before the cache, the other after")

    @property
    def late_rope(self) -> bool:  # type: ignore[override]
        return self.answer.late_rope

    @property
    def batched(self) -> bool:  # type: ignore[override]
        return self.prompt.batched and self.answer.batched

    @property
    def shapes_prefill(self) -> bool:
        return True

    @property
    def shapes_decode(self) -> bool:
        return True

    def check(self, sites: list[Site]) -> None:
        self.prompt.check(sites)
        self.answer.check(sites)

    def layer(self, site: Site) -> KVLayer:
        return self.answer.layer(site)

    def prefill(self, call: Call) -> Tensor:
        return self.prompt.prefill(call)

    def decode(self, call: Call) -> Tensor:
        return self.answer.decode(call)
