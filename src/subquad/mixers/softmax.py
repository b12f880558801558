"""Softmax attention: grouped heads, rotary positions, optionally a window and sinks.

Sources: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2; grouped heads:
Ainslie et al., arXiv 2305.13245; window: Beltagy et al., arXiv 2004.05150; sinks: Xiao et al.,
arXiv 2309.17453.

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.past import Span
from subquad.mixers.parts.rotary import LAYOUTS, rope_frequencies, rotate
from subquad.ops import checks
from subquad.ops.attention import reference as definition


class Softmax(Mixer):
    """``o_t = sum_i softmax_i(scale q_t . k_i) v_i`` over the visible i <= t.

    A system that is softmax over other keys overrides :meth:`visible` and :meth:`pairs`.

    Args:
        dim: C, the model's width.
        heads: H.
        kv_heads: G, a divisor of H; consecutive query heads share one. H where None.
        head_dim: K; C / H where None.
        rope_theta: base of the rotary frequencies; None rotates nothing (NoPE).
        rope_dim: features of a head that are rotated, the first ones; K where None.
        rope_factor: divides the positions, so that a text this many times as long as those of the
            training turns no further (position interpolation, Chen et al., arXiv 2306.15595).
        rope_layout: "half" (feature j turns with j + rope_dim/2) or "interleaved".
        qk_norm: a root mean square norm of q and k per head, before the rotation.
        causal: whether a token sees none after it; else it sees the past and all of the call.
        window: keys that a token sees, its own included; None for all. Then the state keeps that
            many tokens.
        sinks: the first tokens of a sequence, which stay visible beside the window.
        scale: of the scores; K^-0.5 where None.
        bias: whether q, k and v have one; out_bias: whether the output has.
        norm_eps: of the q and k norms.
    """

    past: tuple[str, ...] = ("k", "v", "pad")

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        rope_dim: int | None = None,
        rope_factor: float = 1.0,
        rope_layout: str = "half",
        qk_norm: bool = False,
        causal: bool = True,
        window: int | None = None,
        sinks: int = 0,
        scale: float | None = None,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        kv_heads = heads if kv_heads is None else kv_heads
        checks.divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None:
            checks.divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        checks.positive("head_dim", head_dim)
        checks.positive("sinks", sinks, zero=True)
        if window is not None:
            checks.positive("window", window)
            self.past = ()  # what left the window cannot come back
        elif sinks:
            raise ValueError(f"sinks need a window beside them, got sinks={sinks}, window=None")
        if not causal and "causal" in self.WITHOUT:
            raise ValueError(f"causal must be True for {type(self).__name__}, got {causal}")
        if not causal and window is not None:
            raise ValueError(f"window must be None where causal is False, got {window}")
        self.causal = causal
        rope_dim = head_dim if rope_dim is None else rope_dim
        if rope_theta is not None and (rope_dim % 2 or not 0 < rope_dim <= head_dim):
            raise ValueError(f"rope_dim must be even and in 2..{head_dim}, got {rope_dim}")
        if not rope_factor >= 1:
            raise ValueError(f"rope_factor must be at least 1, got {rope_factor}")
        checks.one_of("rope_layout", rope_layout, LAYOUTS)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_theta, self.rope_dim, self.rope_layout = rope_theta, rope_dim, rope_layout
        self.rope_factor = rope_factor
        self.window, self.sinks = window, sinks
        self.scale = head_dim**-0.5 if scale is None else scale

        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=out_bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        o, state = self.heads_out(x, context)
        return self.o_proj(o.flatten(-2)), state

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What each head reads, ``o [B,T,H,V]`` before ``o_proj``, and the new state's tensors."""
        q, k, v = self.qkv(x, context)
        span = Span(context, {"k": k, "v": v}, window=self.window, sinks=self.sinks)
        o = span.attention(span.rows(q), span["k"], span["v"], self.visible(span), self.scale)
        return span.tokens(o), span.state()

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return type(self) is Softmax and self.causal and not self.sinks

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """The attention weights ``[B,H,T,T]`` by their definition: quadratic, for short texts.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        q, k, v = self.qkv(x, context)
        span = Span(context, {"k": k, "v": v})
        return definition.weights(q, k, self.visible(span), self.scale, 0)[0]

    @staticmethod
    def whole(context: Context) -> None:
        """Refuse what :meth:`weights` is not defined for."""
        if context.state is not None or context.cu_seqlens is not None:
            raise ValueError("weights are those of whole texts: got a state or packed sequences")

    @property
    def splits(self) -> bool:
        own = type(self)  # the keys that others choose may be anywhere
        return own.mix is Softmax.mix and own.heads_out is Softmax.heads_out

    def visible(self, span: Span) -> Mask:
        """Who sees whom among the tokens of ``span``."""
        if self.causal:
            return span.mask()
        if span.pad is None:
            return masks.full()
        return masks.documents(torch.where(span.pad, -1, 0))

    def qkv(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B,T,H,K]``, k and v ``[B,T,G,K]``, normed and rotated."""
        q, k, v = self._unplaced(x, context)
        return self._rotated(q, context), self._rotated(k, context), v

    def _unplaced(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`qkv`, not rotated."""
        x = context.zero_padding(x)
        q = self._normed(self.q_proj(x), self.heads, self.q_norm)
        k = self._normed(self.k_proj(x), self.kv_heads, self.k_norm)
        return q, k, self.v_proj(x).unflatten(-1, (self.kv_heads, -1))

    def _place(self, x: Tensor, heads: int, norm: nn.Module | None, context: Context) -> Tensor:
        return self._rotated(self._normed(x, heads, norm), context)

    def _normed(self, x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        x = x.unflatten(-1, (heads, -1))
        return x if norm is None else norm(x)

    def _rotated(self, x: Tensor, context: Context) -> Tensor:
        if self.rope_theta is None:
            return x
        return rotate(x, context.positions, self._frequencies(x), layout=self.rope_layout)

    def _frequencies(self, x: Tensor) -> Tensor:
        assert self.rope_theta is not None
        wide = x.dtype == torch.float64
        turns = rope_frequencies(self.rope_dim, self.rope_theta, device=x.device, wide=wide)
        return turns / self.rope_factor

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        kept = T if self.window is None else min(T, self.window + self.sinks)
        return kept * 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def flops(self, T: int) -> int:
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * T * projections + 4 * self.pairs(T) * self.heads * self.head_dim

    def pairs(self, T: int) -> int:
        """(query, key) pairs of one head over T tokens."""
        if not self.causal:
            return T * T
        window = T if self.window is None else self.window
        return ramp(T, window) + ramp(max(T - window, 0), self.sinks)


def ramp(n: int, top: int) -> int:
    """``sum_(t=1..n) min(t, top)``: keys that n tokens see of the last ``top``."""
    rising = min(n, top)
    return rising * (rising + 1) // 2 + (n - rising) * top
