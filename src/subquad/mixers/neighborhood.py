"""Neighborhood attention: every token sees the nearest ones of its line, image or volume.

Source: Hassani et al., "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention
at the Threadblock Level", arXiv 2403.04690; the operator: arXiv 2204.07143 and 2209.15001.

Legend: B batch, T tokens, C dim, H heads, G key/value heads, K head dim, M registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.past import Span
from subquad.ops import checks
from subquad.ops.attention import attention, merge
from subquad.ops.attention.neighborhood import neighborhood
from subquad.ops.attention.windows import biased_neighborhood


class NeighborhoodAttention(Mixer):
    """Softmax over ``window`` keys on each axis, centred, pushed inward at the ends.

    The window's length is the grid's rank. With ``grid=`` the tokens are a line, an image or a
    volume, row-major. Without one they are a line: where it is causal, a text, which may be packed,
    padded and continued.

    Args:
        window: w of each axis, at least 2.
        dilation: d of each axis: keys that far apart.
        causal: of each axis: the token itself and those before it.
        heads: H; kv_heads: G, a divisor of H, H where None; head_dim: K, C / H where None.
        registers: M, learned tokens that every token sees beside its neighbors, as keys and values
            of the same projections.
        relative_bias: a learned bias by the distance on each axis, as NAT and DiNAT have; for odd
            windows that are not causal, and without registers or grouped heads. Its windows are
            gathered, not computed in tiles.
        scale: of the scores; K^-0.5 where None.
        bias: of the projections.
    """

    stride: tuple[int, ...]

    def __init__(
        self,
        *,
        dim: int,
        window: int | Sequence[int] = (7, 7),
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        registers: int = 0,
        relative_bias: bool = False,
        scale: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        checks.positive("registers", registers, zero=True)
        kv_heads = heads if kv_heads is None else kv_heads
        checks.divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None:
            checks.divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        self.window = (window,) if isinstance(window, int) else tuple(window)
        self.dilation, self.axes_causal = self._spread(dilation), self._spread(causal)
        self.stride = self._spread(1)
        self.causal = all(self.axes_causal)
        self._least_grid()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=bias)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, dim)) if registers else None
        self.relative_bias = None
        if relative_bias:
            if any(self.axes_causal) or registers or kv_heads != heads:
                raise ValueError("relative_bias takes no causal axes, registers or kv_heads")
            shape = heads, *(2 * w - 1 for w in self.window)
            self.relative_bias = nn.Parameter(0.02 * torch.randn(shape))

    def _spread(self, value):
        return (value,) * len(self.window) if isinstance(value, (int, bool)) else tuple(value)

    def _least_grid(self) -> None:
        """Raise where the windows, strides and dilations fit no grid at all."""
        for d in self.dilation:
            checks.positive("dilation", d)
        grid = [w * d for w, d in zip(self.window, self.dilation)]
        masks.neighborhood(grid, self.window, self.stride, self.dilation, self.axes_causal)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' ``qkv``, ``proj`` and ``rpb`` under our names."""
        out: dict[str, Tensor] = {}
        for name, t in weights.items():
            layer, _, kind = name.partition(".")
            if layer == "qkv":
                out |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", t.chunk(3))}
            else:
                name = {"proj": f"o_proj.{kind}", "rpb": "relative_bias"}.get(layer, name)
                out[name] = t
        return out

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k, v = self._keys(x)
        if context.grid is None and self.causal and len(self.window) == 1:
            o, state = self._text(q, k, v, context)
        else:
            o, state = self._grid(q, k, v, context), {}
        return self.o_proj(o.flatten(-2)), state

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (self.kv_heads, -1)) for p in (self.k_proj, self.v_proj))
        return k, v

    def _extra(self, rows: int) -> tuple[Tensor, Tensor] | None:
        if self.registers is None:
            return None
        k, v = self._keys(self.registers.expand(rows, -1, -1))
        return k, v

    def _grid(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if context.state or context.padding is not None or context.cu_seqlens is not None:
            raise ValueError("a grid takes no state, padding or cu_seqlens: its ends are known")
        grid = (q.shape[1],) if context.grid is None else tuple(context.grid)
        if len(grid) != len(self.window):
            raise ValueError(f"grid must have {len(self.window)} axes as window has, got {grid}")
        q, k, v = (t.unflatten(1, grid) for t in (q, k, v))
        if self.relative_bias is not None:
            return biased_neighborhood(
                q,
                k,
                v,
                self.relative_bias,
                self.window,
                dilation=self.dilation,
                scale=self.scale,
            ).flatten(1, -3)
        o = neighborhood(
            q,
            k,
            v,
            self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.axes_causal,
            extra=self._extra(len(q)),
            scale=self.scale,
        )
        assert isinstance(o, Tensor)
        return o.flatten(1, -3)

    def _text(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        span = Span(context, {"k": k, "v": v}, window=self._kept)
        rows, mask = span.rows(q), self._visible(span)
        o, lse = attention(
            rows, span["k"], span["v"], mask,
            scale=self.scale, cu_seqlens=span.cu_seqlens, return_lse=True,
        )  # fmt: skip
        if self.registers is not None:
            extra = self._extra(len(rows))
            assert extra is not None
            everyone = attention(rows, *extra, scale=self.scale, return_lse=True)
            o, _ = merge([(o, lse), everyone])
        return span.tokens(o), span.state()

    @property
    def _kept(self) -> int:
        """Tokens of a text that the next one may see, itself included."""
        return (self.window[0] - 1) * self.dilation[0] + 1

    def _visible(self, span: Span) -> Mask:
        part, starts = self._part(span["k"].shape[1]), span.starts
        if starts is None:
            return part
        # Where a text's first tokens are forgotten, only the phase in dilation and stride matters.
        phase = self.dilation[0] * self.stride[0]
        return masks.placed(part, torch.where(starts < 0, -(-starts % phase), starts))

    def _part(self, T: int) -> Mask:
        """Over a text of T tokens at any phase: it has no end that would push windows inward."""
        phase = self.dilation[0] * self.stride[0]
        length = (max(T, self.window[0] * self.dilation[0]) // phase + 2) * phase
        return masks.neighborhood((length,), self.window, self.stride, self.dilation, True)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        if not (self.causal and len(self.window) == 1):
            return 0
        return min(T, self._kept) * 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def flops(self, T: int) -> int:
        """Of T tokens, the ends of the axes not counted but where the tokens are a text."""
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pairs = T * prod(self.window)
        if self.causal and len(self.window) == 1:
            pairs = self._part(T).area(T, T)
        if self.registers is not None:
            pairs += T * len(self.registers)
        return 2 * T * projections + 4 * pairs * self.heads * self.head_dim
