"""Hedgehog: linear attention whose learned feature maps copy softmax's weights.

Source: Zhang, Bhatia, Kumbong, Re, "The Hedgehog & the Porcupine: Expressive Linear Attentions with
Softmax Mimicry", arXiv 2402.04347, section 4.

Legend: B batch, T tokens, H query heads, G key/value heads, K head dim, F features of a half.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.head_map import AUTHORS, HeadMap
from subquad.mixers.softmax import Softmax
from subquad.ops.layout import repeat_heads
from subquad.ops.recurrence import cost, linear_attention


class Hedgehog(Softmax):
    """``o_i = sum_j a_ij v_j``, ``a_ij = phi(q_i) . phi(k_j) / sum_j' phi(q_i) . phi(k_j')``.

    Queries, keys and values are those of the softmax layer it replaces, whose weights it loads by
    name; ``feature_map_q`` and ``feature_map_k`` are new. From scratch they train like any weight.

    Args:
        feature_map: phi, a key of ``parts.head_map.MAPS``: "softmax_dim" (stable), "exp" (the
            paper's formula, which overflows where x is large) or "exp_dim"; "fla", "elu" and
            "relu" to compare with.
        features: F; K where None.
        feature_bias: whether phi's linear layer has a bias; feature_init: its weights at first.
        causal: whether a token sees those up to itself, or all. Then the state adds up what
            earlier calls saw, and every token of a call sees all of it.
        eps: added to the denominator.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window``, ``sinks``
            and ``scale``.
    """

    WITHOUT = ("window", "sinks", "scale")
    FOREIGN: ClassVar[Mapping[str, str]] = AUTHORS

    def __init__(
        self,
        *,
        dim: int,
        feature_map: str = "softmax_dim",
        features: int | None = None,
        feature_bias: bool = True,
        feature_init: str = "identity",
        causal: bool = True,
        eps: float = 1e-12,
        **options: Any,
    ) -> None:
        if options.keys() & set(self.WITHOUT):
            raise ValueError(
                f"window and sinks give way to the state, scale to the maps, got {sorted(options)}"
            )
        super().__init__(dim=dim, **options)
        self.past = ()
        given: dict[str, Any] = {"kind": feature_map, "init": feature_init, "bias": feature_bias}
        self.feature_map_q = HeadMap(self.heads, self.head_dim, features, **given)
        self.feature_map_k = copy.deepcopy(self.feature_map_q)
        self.causal, self.eps = causal, eps

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        q, k, v = self.qkv(x, context)
        past = None if context.state is None else (context.state["S"], context.state["z"])
        o, (S, z) = self._read(q, k, context.zero_padding(v), context, past)
        return o.to(v.dtype), {"S": S, "z": z}

    def _read(self, q: Tensor, k: Tensor, v: Tensor, context: Context, past=None):
        phi_q, phi_k = self.features(q, k)
        return linear_attention(
            phi_q, context.zero_padding(phi_k), v.to(phi_q.dtype),
            causal=self.causal, eps=self.eps, state=past, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi(q) and phi(k), ``[B,T,H,F']``; k is repeated to the query heads first."""
        return self.feature_map_q(q), self.feature_map_k(repeat_heads(k, self.heads))

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """The attention weights ``[B,H,T,T]``: quadratic, for short texts.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        q, k, _ = self.qkv(x, context)
        values = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        o, _ = self._read(q, k, values.expand(len(x), -1, 1, -1), context)
        return o.transpose(1, 2)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return cost.state_bytes(H=self.heads, K=self.feature_map_k.width, V=self.head_dim + 1)

    def flops(self, T: int) -> int:
        K, H, width = self.head_dim, self.heads, self.feature_map_k.width
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        maps = sum(m.weight.numel() for m in (self.feature_map_q, self.feature_map_k))
        if self.causal:
            mixing = cost.flops(B=1, T=T, H=H, K=width, V=K + 1)
        else:
            mixing = 4 * T * H * width * (K + 1)
        return 2 * T * (projections + maps) + mixing
