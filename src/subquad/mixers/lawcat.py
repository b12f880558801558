"""LAWCAT: gated, normalised linear attention behind a short convolution of queries and keys.

Source: Liu, Kundu et al., "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with
Convolution across Tokens for Long Context Modeling", arXiv 2509.18467.

Legend: B batch, T tokens, H query heads, G key/value heads, K head dim, F features of a half,
w window.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.decay import widen
from subquad.mixers.parts.head_map import AUTHORS, HeadMap
from subquad.mixers.parts.past import Span
from subquad.mixers.parts.recurrent import flops_of_weights, low_rank
from subquad.mixers.softmax import Softmax, ramp
from subquad.ops import checks
from subquad.ops.kernel_attention import window_sums
from subquad.ops.layout import repeat_heads
from subquad.ops.recurrence import cost, recurrence


class LAWCAT(Softmax):
    """``S_t = diag(exp(g_t)) S_{t-1} + phi(k_t) [v_t; 1]^T``, ``[u; n] = S_t^T phi(q_t)``,
    ``o_t = u / n``, q and k convolved over 4 tokens and not rotated.

    The projections are those of the softmax layer it replaces, whose weights it loads by name.

    Args:
        feature_map: a key of ``parts.head_map.MAPS``, whose width must be K.
        tied: whether q and k share one feature map.
        gate_rank: of the gate's projection; None for full rank.
        gate_normalizer: divides the log gate.
        clamp_min: floor of the log gate; None for none.
        conv_size: taps of the convolutions; conv_activation: after them; conv_shared: one for
            both q and k.
        window: w, the last rotated keys read by softmax beside (not instead of) the linear part,
            their share gamma learned; 0 for none.
        eps: added to the denominator.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``sinks``. The rotation
            serves the window.
    """

    WITHOUT = ("causal", "sinks")
    FOREIGN: ClassVar[Mapping[str, str]] = {
        **AUTHORS,
        "q_conv1d.weight": "q_conv.weight",
        "k_conv1d.weight": "k_conv.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        feature_map: str = "softmax_dim",
        tied: bool = True,
        gate_rank: int | None = 16,
        gate_normalizer: float = 16.0,
        clamp_min: float | None = None,
        conv_size: int = 4,
        conv_activation: str = "identity",
        conv_shared: bool = False,
        window: int = 0,
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        if "sinks" in options:
            raise ValueError(f"sinks are no option beside a state, got {options['sinks']}")
        super().__init__(dim=dim, **options)
        checks.positive("window", window, zero=True)
        if not gate_normalizer > 0:
            raise ValueError(f"gate_normalizer must be positive, got {gate_normalizer}")
        if clamp_min is not None and not clamp_min < 0:
            raise ValueError(f"clamp_min must be negative or None, got {clamp_min}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        self.past = ()
        self.near = window
        self.gate_normalizer, self.clamp_min, self.eps = gate_normalizer, clamp_min, eps
        H, K, width = self.heads, self.head_dim, self.heads * self.head_dim
        self.gk_proj = (
            nn.Linear(dim, self.kv_heads * K)
            if gate_rank is None
            else low_rank(dim, gate_rank, self.kv_heads * K, bias=True)
        )
        for layer in self.gk_proj.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.006)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.q_conv = ShortConv(width, conv_size, activation=conv_activation)
        if not conv_shared:
            self._modules["k_conv"] = ShortConv(width, conv_size, activation=conv_activation)
        for conv in (self.q_conv, self.k_conv):
            nn.init.constant_(conv.weight, 0.001)
            nn.init.ones_(conv.weight[..., -1])
        halves = 1 if feature_map in ("elu", "relu") else 2
        self.feature_map_q = HeadMap(H, K, K // halves, kind=feature_map)
        if not tied:
            self._modules["feature_map_k"] = HeadMap(H, K, K // halves, kind=feature_map)
        omega = torch.full((1, H, 1, 1), -2.1972)
        self.window_factors = nn.Parameter(omega) if window else None

    # A module under two names would be saved under two, which transformers refuses.
    @property
    def k_conv(self) -> Any:
        return self._modules.get("k_conv", self.q_conv)

    @property
    def feature_map_k(self) -> Any:
        return self._modules.get("feature_map_k", self.feature_map_q)

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        v = context.zero_padding(self.v_proj(x)).unflatten(-1, (self.kv_heads, -1))
        sums, state = self._linear(x, v, context)
        every: Mapping[str, Tensor] = state
        if self.near:
            exact, span = self._window(x, v, context)
            sums = sums + exact
            every = ChainMap(state, span.state())  # type: ignore[arg-type]
        return (sums[..., :-1] / (sums[..., -1:] + self.eps)).to(x.dtype), every

    def _linear(self, x: Tensor, v: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """``[u; n] [B,T,H,V+1]`` and the new state, of v ``[B,T,G,V]``."""
        H, state = self.heads, {}
        q = self._normed(self.q_proj(x), H, self.q_norm)
        k = repeat_heads(self._normed(self.k_proj(x), self.kv_heads, self.k_norm), H)
        rows = []
        for name, t in (("q_conv", q), ("k_conv", k)):
            t = context.zero_padding(t.flatten(-2))
            conv: ShortConv = self.get_submodule(name)  # type: ignore[assignment]
            y, state[name] = conv(t, context.past(name), context.cu_seqlens)
            rows.append(y.unflatten(-1, (H, -1)))
        phi_q, phi_k = self.feature_map_q(rows[0]), self.feature_map_k(rows[1])
        gate = widen(self.gk_proj(x)).unflatten(-1, (self.kv_heads, -1))
        decay = F.logsigmoid(repeat_heads(gate, H)) / self.gate_normalizer
        if self.clamp_min is not None:
            decay = decay.clamp_min(self.clamp_min)
        sums, state["S"] = recurrence(
            phi_q,
            context.zero_padding(phi_k),
            F.pad(v.to(phi_q.dtype), (0, 1), value=1.0),
            decay=context.zero_padding(decay.to(phi_q.dtype)),
            state=context.past("S"),
            cu_seqlens=context.cu_seqlens,
        )
        return sums, state

    def _window(self, x: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Span]:
        """gamma times the unnormalised softmax over the last w rotated keys."""
        assert self.window_factors is not None
        q = self._place(self.q_proj(x), self.heads, self.q_norm, context)
        k = self._place(self.k_proj(x), self.kv_heads, self.k_norm, context)
        span = Span(context, {"k": k, "v": v}, window=self.near)
        exact = window_sums(
            span.rows(q), span["k"], span["v"], self.near, scale=self.scale,
            starts=span.starts, cu_seqlens=span.cu_seqlens,
            seen=None if context.state is None else context.seen,
        )  # fmt: skip
        gamma = torch.sigmoid(self.window_factors.flatten().to(exact.dtype))
        return span.tokens(exact) * gamma[:, None], span

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """The attention weights ``[B,H,T,T]``: quadratic, for short texts.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        x = context.zero_padding(x)
        values = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        values = values.expand(len(x), -1, self.kv_heads, -1)
        sums, _ = self._linear(x, values, context)
        if self.near:
            sums = sums + self._window(x, values, context)[0]
        return (sums[..., :-1] / (sums[..., -1:] + self.eps)).transpose(1, 2)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        width = self.heads * self.head_dim
        tails = (self.q_conv.size + self.k_conv.size - 2) * width
        near = min(T, self.near) * 2 * self.kv_heads * self.head_dim
        state = cost.state_bytes(H=self.heads, K=self.head_dim, V=self.head_dim + 1)
        return (tails + near) * dtype.itemsize + state

    def flops(self, T: int) -> int:
        K, H = self.head_dim, self.heads
        maps = self.feature_map_q.weight.numel() + self.feature_map_k.weight.numel()
        linear = cost.flops(B=1, T=T, H=H, K=K, V=K + 1)
        near = 4 * ramp(T, self.near) * H * K if self.near else 0
        return flops_of_weights(self, T) + 2 * T * maps + linear + near
