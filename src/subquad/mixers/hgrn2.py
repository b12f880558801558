"""HGRN2: gated linear attention whose key is what the forget gate lets go.

Source: Qin, Yang, Sun, Shen, Li, Sun, Zhong, "HGRN2: Gated Linear RNNs with State Expansion",
arXiv 2404.07904, section 3.

Legend: B batch, T tokens, C dim, H heads, d head width (key and value dim).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.decay import LayerBound, LowerBounds, bounded_gate
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.recurrent import RecurrentMixer
from subquad.ops import checks
from subquad.ops.layer.activation import ACTIVATIONS

VARIANTS = ("library", "standalone")


class HGRN2(RecurrentMixer):
    """``S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T``, ``o_t = d^-0.5 S_t^T q_t``.

    ``f_t = bound + (1 - bound) sigmoid(Wf x)``; the output is ``Wo norm(o)``, the norm over all C.

    Args:
        dim: C, the model's width.
        heads: H; C / expand_ratio where None.
        expand_ratio: d; C / heads where None, and 128 (C where C is smaller) where both are.
        variant: "library" (q through silu, rms_norm, no biases) or "standalone" (q through sigmoid,
            v through silu, no d^-0.5, LayerNorm, biases), the authors' package.
        layer: the global layer number; layers: of the model. See ``bounds``.
        bounds: the least forget gate rises with the depth: the model's ``LowerBounds``, or a
            ``[C]`` tensor for a fixed one; None gives a layer of its own (0 in the first).
        norm_eps: of the output norm.
    """

    FOREIGN = {"g_norm.weight": "norm.weight"}

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None = None,
        expand_ratio: int | None = None,
        variant: str = "library",
        layer: int = 0,
        layers: int = 1,
        bounds: LowerBounds | Tensor | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        checks.positive("dim", dim)
        checks.one_of("variant", variant, VARIANTS)
        if heads is None:
            expand_ratio = min(128, dim) if expand_ratio is None else expand_ratio
            checks.divides("expand_ratio", expand_ratio, "dim", dim)
            heads = dim // expand_ratio
        checks.divides("heads", heads, "dim", dim)
        d = dim // heads
        if expand_ratio not in (None, d):
            raise ValueError(f"expand_ratio must be dim / heads = {d}, got {expand_ratio}")
        super().__init__(dim=dim, heads=heads, key_dim=d, value_dim=d)
        standalone = variant == "standalone"
        self.q_activation = ACTIVATIONS["sigmoid" if standalone else "silu"]
        self.v_activation = ACTIVATIONS["silu" if standalone else "identity"]
        self.scale = 1.0 if standalone else d**-0.5
        self.q_proj = nn.Linear(dim, dim, bias=standalone)
        self.f_proj = nn.Linear(dim, dim, bias=standalone)
        self.i_proj = nn.Linear(dim, dim, bias=standalone)
        self.o_proj = nn.Linear(dim, dim, bias=standalone)
        self.norm = (
            nn.LayerNorm(dim, eps=norm_eps) if standalone else GatedRMSNorm(dim, eps=norm_eps)
        )
        self.bound = LayerBound(dim, layer=layer, layers=layers, bounds=bounds)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """flash-linear-attention's names, or the authors' standalone ones, under ours."""
        out: dict[str, Tensor] = {}
        for name, t in super().translate(weights).items():
            layer, _, kind = name.partition(".")
            if layer == "in_proj":
                out |= {f"{n}_proj.{kind}": part for n, part in zip("iqf", t.chunk(3))}
            else:
                out[name.replace("out_proj.", "o_proj.")] = t
        return out

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        state: dict[str, Tensor] = {}
        x = context.zero_padding(x)
        decay, k = bounded_gate(self.f_proj(x), self.bound())
        q, v = self.q_activation(self.q_proj(x)), self.v_activation(self.i_proj(x))
        q, k, v, decay = (t.unflatten(-1, (self.state_heads, -1)) for t in (q, k, v, decay))
        o = self.recur(q, k.to(q.dtype), v, context, state, decay=decay, scale=self.scale)
        return self.o_proj(self.norm(o.flatten(-2))), state
