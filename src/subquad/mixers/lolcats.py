"""LoLCATs: softmax over the recent tokens, a learned feature map for all before them.

Source: Zhang, Arora et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models",
arXiv 2410.10254, sections 3.1 and 3.2.

Legend: B batch, T tokens, S tokens with those kept, H query heads, G key/value heads, K head dim,
F features of a half of the map, w window.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.head_map import AUTHORS, HeadMap
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.backend import without_autocast
from subquad.ops.kernel_attention import How, Near, cost, mixed_attention
from subquad.ops.kernel_attention.reference import mixed_weights
from subquad.ops.layout import repeat_heads


class LoLCATs(Softmax):
    """``o_i = sum_j (a_ij + b_ij) v_j / sum_j (a_ij + b_ij)``, ``a_ij = gamma_h exp(s_ij - m_i)``
    over the window, ``b_ij = phi(q_i) . phi(k_j)`` before it.

    Queries, keys and values are those of the softmax layer it replaces, whose weights it loads by
    name; ``feature_map_q``, ``feature_map_k`` and ``window_factors`` are new.

    Args:
        window: w.
        layout: "terraced" (a token's own block of w tokens and the one before) or "sliding" (the
            last w tokens).
        features: F; K / 2 where None.
        feature_map: a key of ``parts.head_map.MAPS``; feature_init: of its weights.
        gamma: of every head at first, learned through a sigmoid.
        affine: weigh the linear part by ``1 - gamma_h``.
        map_rotary: whether the maps see queries and keys rotated, as the authors have it. Then what
            they learn holds for the places of the texts they learned on; without, they know no
            place, and the window keeps the keys as they were too.
        decode: "parallel" (whatever is read on from a state sees what it would see in one piece)
            or "sliding" (after a terraced prefill, the last w tokens, as the authors decode).
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "sinks")
    FOREIGN: ClassVar[Mapping[str, str]] = AUTHORS

    def __init__(
        self,
        *,
        dim: int,
        window: int = 64,
        layout: str = "terraced",
        features: int | None = None,
        feature_map: str = "softmax_dim",
        feature_init: str = "kaiming",
        gamma: float = 0.1,
        affine: bool = False,
        map_rotary: bool = True,
        decode: str = "parallel",
        **options: Any,
    ) -> None:
        if "sinks" in options:
            raise ValueError(f"sinks are no option beside a state, got {options['sinks']}")
        super().__init__(dim=dim, **options)
        self.past = ()  # what left the window cannot come back
        self.near = Near(window, layout)
        checks.one_of("decode", decode, ("parallel", "sliding"))
        if not 0 < gamma < 1:
            raise ValueError(f"gamma must lie between 0 and 1, got {gamma}")
        features = max(1, self.head_dim // 2) if features is None else features
        given: dict[str, Any] = {"kind": feature_map, "init": feature_init}
        self.feature_map_q = HeadMap(self.heads, self.head_dim, features, **given)
        self.feature_map_k = copy.deepcopy(self.feature_map_q)  # alike at first, as the authors'
        omega = torch.tensor(gamma / (1 - gamma)).log()
        self.window_factors = nn.Parameter(omega.repeat(self.heads).view(1, -1, 1, 1))
        self.affine, self.decode = affine, decode
        self.map_rotary = map_rotary or self.rope_theta is None

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        slides = self.decode == "sliding"
        if slides and self.near.terraced and context.cu_seqlens is not None:
            raise ValueError("decode='sliding' takes no packed sequences, got cu_seqlens")
        q, k, v, mapped_q, mapped_k = self._inputs(x, context)
        near = self.near if context.state is None or not slides else Near(self.near.window)
        kept = {"k": k, "v": v} if self.map_rotary else {"k": k, "v": v, "unrotated": mapped_k}
        span = Span(context, kept, window=near.window if slides else near.reach)
        q, k, v = span.rows(q), span["k"], span["v"]
        far = k.shape[1] - (near.window if span.cu_seqlens is None else 0)
        mapped_k = span["k" if self.map_rotary else "unrotated"][:, : max(far, 0)]
        phi_q, phi_k, weight = self.features(span.rows(mapped_q), mapped_k)
        past = None if context.state is None else (context.state["S"], context.state["z"])
        o, after = mixed_attention(
            q, k, v, phi_q, phi_k, near=near, scale=self.scale, weight=weight, state=past,
            starts=span.starts, seen=None if past is None else context.seen,
            cu_seqlens=span.cu_seqlens,
        )  # fmt: skip
        if slides and near.terraced:
            after = _slid(phi_k, v, context.seen_after, near.window)
        own = {"S": after[0], "z": after[1]}
        return span.tokens(o), ChainMap(own, span.state())  # type: ignore[arg-type]

    def _inputs(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        """q, k, v, and q and k as the maps see them."""
        if self.map_rotary:
            q, k, v = self.qkv(x, context)
            return q, k, v, q, k
        q, k, v = self._unplaced(x, context)
        return self._rotated(q, context), self._rotated(k, context), v, q, k

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q) ``[B,T,H,2F]``, phi(k) ``[B,S,H,2F]`` and gamma ``[H]``; k is repeated first.
        q and k are rotated or not, as ``map_rotary`` says."""
        gamma = self.window_factors.flatten().to(torch.promote_types(q.dtype, torch.float32))
        phi_q = self.feature_map_q(q)
        if self.affine:
            phi_q = phi_q * torch.sigmoid(-gamma)[:, None]
        return phi_q, self.feature_map_k(repeat_heads(k, self.heads)), torch.sigmoid(gamma)

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """The attention weights ``[B,H,T,T]`` by their definition: quadratic, for short texts.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        q, k, _, mapped_q, mapped_k = self._inputs(x, context)
        starts = Span(context, {"k": k}).starts
        phi_q, phi_k, weight = self.features(mapped_q, mapped_k)
        how = How(self.near, self.scale, weight, starts=starts)
        return mixed_weights(q, k, phi_q, phi_k, how)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        slides = self.decode == "sliding"
        kept = min(T, self.near.window if slides else self.near.reach)
        each = 2 if self.map_rotary else 3
        near = kept * each * self.kv_heads * self.head_dim * dtype.itemsize
        width = self.feature_map_k.width
        return near + cost.state_bytes(H=self.heads, F=width, V=self.head_dim)

    def flops(self, T: int) -> int:
        K, H, width = self.head_dim, self.heads, self.feature_map_k.width
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        maps = sum(m.weight.numel() for m in (self.feature_map_q, self.feature_map_k))
        mixing = cost.flops(T=T, H=H, K=K, V=K, F=width, near=self.near)
        return 2 * T * (projections + maps) + mixing


def _slid(phi_k: Tensor, v: Tensor, seen: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The state after a first call whose last ``window`` tokens alone stay exact."""
    far, S = phi_k.shape[1], v.shape[1]
    column = torch.arange(far, device=v.device)
    phi_k = phi_k.masked_fill((column < S - seen[:, None])[..., None, None], 0)
    v = repeat_heads(v[:, :far], phi_k.shape[2]).to(phi_k.dtype)
    with without_autocast(v.device.type):
        return torch.einsum("bjhf,bjhv->bhfv", phi_k, v), phi_k.sum(1)
