"""HGRN: a gated linear RNN with one number of state per channel.

Source: Qin, Yang, Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
arXiv 2311.04823, section 3.

Legend: B batch, T tokens, C dim, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.decay import LayerBound, LowerBounds, bounded_gate, widen
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.recurrent import flops_of_weights
from subquad.ops import checks
from subquad.ops.scan import cost
from subquad.parallel import scan

VARIANTS = ("real", "complex")


class HGRN(Mixer):
    """``h_t = f_t h_{t-1} + (1 - f_t) silu(Wi x_t)``.

    ``f_t = bound + (1 - bound) sigmoid(Wf x_t)``.

    "real" gives ``Wo (rms_norm(h) * silu(Wg x))``, no biases. "complex", the paper's form, has
    biases, a complex input ``silu(Wi x)`` (adjacent pairs), a learned rotation theta of the state,
    ``h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) u_t``, and gives
    ``Wo (LayerNorm(cat(Re h, Im h)) * silu(Wg x))``.

    Args:
        dim: C, the model's width.
        variant: "real" or "complex".
        layer: the global layer number; layers: of the model. See ``bounds``.
        bounds: the least forget gate rises with the depth: the model's ``LowerBounds``, or a
            ``[C]`` tensor for a fixed one; None gives a layer of its own (0 in the first).
        causal: False adds to h that of a second scan, from the end, over the tokens of the call.
        norm_eps: of the output norm.
    """

    FOREIGN = {"g_norm.weight": "norm.weight"}
    repeats = True

    def __init__(
        self,
        *,
        dim: int,
        variant: str = "real",
        layer: int = 0,
        layers: int = 1,
        bounds: LowerBounds | Tensor | None = None,
        causal: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim=dim)
        checks.one_of("variant", variant, VARIANTS)
        self.complex, self.causal = variant == "complex", causal
        width = 2 * dim if self.complex else dim
        self.i_proj = nn.Linear(dim, width, bias=self.complex)
        self.f_proj = nn.Linear(dim, dim, bias=self.complex)
        self.g_proj = nn.Linear(dim, width, bias=self.complex)
        self.o_proj = nn.Linear(width, dim, bias=self.complex)
        self.bound = LayerBound(dim, layer=layer, layers=layers, bounds=bounds)
        if self.complex:
            self.theta = nn.Parameter(10000 ** (-2 / dim * torch.arange(dim)))
            self.norm: nn.Module = nn.LayerNorm(width, eps=norm_eps)
        else:
            self.norm = GatedRMSNorm(dim, eps=norm_eps)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """flash-linear-attention's names, or the authors' of the complex form, under ours."""
        theirs = {"input_proj": "i_proj", "lambda_proj": "f_proj", "gate": "g_proj",
                  "out_proj": "o_proj"}  # fmt: skip
        out = {}
        for name, t in super().translate(weights).items():
            layer, dot, kind = name.partition(".")
            out[theirs.get(layer, layer) + dot + kind] = t.flatten() if name == "theta" else t
        return out

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        decay, write = bounded_gate(self.f_proj(x), self.bound())
        decay, write = context.zero_padding(decay), context.zero_padding(write)
        i, z = widen(F.silu(self.i_proj(x))), self.g_proj(x)
        past = context.past("h")
        if not self.complex:
            h, last = self._scan(i * write, decay, past, context.cu_seqlens)
            return self.o_proj(self.norm(h.to(x.dtype), z)), {"h": last}
        u = torch.view_as_complex(i.unflatten(-1, (self.dim, 2))) * write
        turn = torch.complex(decay, widen(self.theta).expand_as(decay))
        past = None if past is None else torch.view_as_complex(past)
        h, last = self._scan(u, turn, past, context.cu_seqlens)
        y = self.norm(torch.cat([h.real, h.imag], -1).to(x.dtype)) * F.silu(z)
        return self.o_proj(y), {"h": torch.view_as_real(last)}

    def _scan(
        self, u: Tensor, decay: Tensor, past: Tensor | None, cu: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h, and the state after the last token."""
        h, last = scan(u, decay, state=past, cu_seqlens=cu)
        if not self.causal:
            back = None if cu is None else u.shape[1] - cu.flip(0)
            h = h + scan(u.flip(1), decay.flip(1), cu_seqlens=back)[0].flip(1)
        return h, last

    @property
    def splits(self) -> bool:
        return self.causal

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return cost.state_bytes(D=self.dim) * (2 if self.complex else 1)

    def flops(self, T: int) -> int:
        return flops_of_weights(self, T) + (2 - self.causal) * cost.flops(B=1, T=T, D=self.dim)
