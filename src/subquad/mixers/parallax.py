"""Parallax: softmax attention whose mean of the values is corrected along a learned probe.

Source: Zuo et al., "Parallax: Parameterized Local Linear Attention for Language Modeling", arXiv
2605.29157.

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.probe import cost, probe

PROBES = ("random", "zero")


class Probed(Softmax):
    """Softmax attention's layer around a correction of its mean; causal or not.

    Args:
        causal: whether a token sees only those before it and itself.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``sinks`` and ``out_bias``.
    """

    WITHOUT = ("sinks", "out_bias")

    def __init__(self, *, dim: int, heads: int = 8, causal: bool = True, **options: Any) -> None:
        for name in set(self.WITHOUT) & set(options):
            if options.pop(name):
                raise ValueError(f"{name} is not an option of {type(self).__name__.lower()}")
        super().__init__(dim=dim, heads=heads, **options)
        if self.window is not None and not causal:
            raise ValueError(f"window needs causal=True, got window={self.window}, causal=False")
        self.causal = causal

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        q, k, v = self.qkv(x, context)
        span = Span(context, {"k": k, "v": v}, window=self.window)
        extra = self.extra(x, context, span)
        o = self.attend(span.rows(q), span["k"], span["v"], extra, self.places(span))
        return span.tokens(o), span.state()

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """What each value counts ``[B,H,T,T]``: rows sum to one, and entries may be negative.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        q, k, _ = self.qkv(x, context)
        (B, T), G = x.shape[:2], self.kv_heads
        span = Span(context, {"k": k}, window=self.window)
        each = torch.eye(T, dtype=k.dtype, device=k.device)[None, :, None].expand(B, T, G, T)
        o = self.attend(q, k, each, self.extra(x, context, span), self.places(span))
        return o.transpose(1, 2)

    def places(self, span: Span) -> dict[str, Any]:
        """Who sees whom among the tokens of ``span``, as options of the operation."""
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "starts": None if span.pad is None else span.pad.sum(1),
            "cu_seqlens": span.cu_seqlens,
        }

    def extra(self, x: Tensor, context: Context, span: Span) -> Tensor | None:
        """What :meth:`attend` needs of the new tokens beside q, laid out as q is."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, places: Mapping[str, Any]
    ) -> Tensor:
        """o ``[B,T,H,K]`` over the keys that ``places`` (the operation's options) makes visible."""
        raise NotImplementedError

    def pairs(self, T: int) -> int:
        return super().pairs(T) if self.causal else T * T


class Parallax(Probed):
    """``o_t = vbar_t - Cov_t(v, k) r_t``: the softmax's mean of the values, corrected by their
    covariance with the keys along ``r_t = W_r x_t``. ``r = 0`` is softmax attention.

    The weights of a softmax layer load as they are; W_r, which they lack, is 0 then.

    Args:
        dim: C.
        heads: H.
        causal: whether a token sees only those before it and itself.
        probe: how W_r starts, "random" as the other weights do, or "zero".
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``sinks`` and ``out_bias``;
            ``bias`` and ``qk_norm`` hold for r too, which is rotated as q is.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        causal: bool = True,
        probe: str = "random",
        **options: Any,
    ) -> None:
        super().__init__(dim=dim, heads=heads, causal=causal, **options)
        checks.one_of("probe", probe, PROBES)
        bias = self.q_proj.bias is not None
        self.r_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        if probe == "zero":
            for p in self.r_proj.parameters():
                nn.init.zeros_(p)
        self.r_norm = None
        if self.q_norm is not None:
            self.r_norm = nn.RMSNorm(self.head_dim, eps=self.q_norm.eps)
        self.register_load_state_dict_pre_hook(_from_softmax)

    def extra(self, x: Tensor, context: Context, span: Span) -> Tensor:
        r = self.r_proj(context.zero_padding(x))
        return span.rows(self._place(r, self.heads, self.r_norm, context))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, places: Mapping[str, Any]
    ) -> Tensor:
        assert extra is not None
        return probe(q, k, v, extra, **places)

    def flops(self, T: int) -> int:
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        area = self.pairs(T) * self.heads
        return 2 * T * projections + cost.flops(area=area, K=self.head_dim, V=self.head_dim)


def _from_softmax(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add a zero probe to the weights of a softmax layer."""
    given = f"{prefix}q_proj.weight" in weights
    if not given or f"{prefix}r_proj.weight" in weights:
        return
    for name, parameter in module.named_parameters():
        if name.startswith("r_"):
            like = torch.ones_like if name.startswith("r_norm") else torch.zeros_like
            weights[prefix + name] = like(parameter.detach())
