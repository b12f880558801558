"""Lightning Attention (TNL): linear attention with a fixed, data-independent decay per head.

Sources: Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in
Large Language Models", arXiv 2401.04658, algorithm 1 (the blocked form, here the recurrence
operation's); Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with
Lightning Attention", arXiv 2405.17381, section 3 (the layer).

Legend: B batch, T tokens, C dim, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.recurrent import RecurrentMixer, low_rank
from subquad.ops import checks

PRESETS = ("example", "paper")
DECAYS = ("code", "paper")


class Lightning(RecurrentMixer):
    """``S_t = exp(-s_h) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``: no scale, no denominator.

    Args:
        dim: C, the model's width, a multiple of ``heads``.
        heads: H.
        preset: "example" (the authors' example layer: silu on q, k and v; layer norm over all
            heads; a low-rank sigmoid gate after it) or "paper" (TNL: silu on q and k; a root mean
            square norm without weight over all heads; a linear gate; in layer 0 also a learned
            rotation, LRPE, which doubles the state).
        decay: "code" (``s = slope_h (1 - l/(L-1) + 1e-5)``, geometric in the head) or "paper"
            (``s = 8 h/H (1 - l/L)``, linear in it).
        layer: l, this layer's index; the upper layers decay less.
        layers: L, the model's depth.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        "output_gate.0.weight": "g_proj.0.weight",
        "output_gate.1.weight": "g_proj.1.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        preset: str = "example",
        decay: str = "code",
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        checks.divides("heads", heads, "dim", dim)
        checks.one_of("preset", preset, PRESETS)
        checks.one_of("decay", decay, DECAYS)
        checks.positive("layers", layers)
        if not 0 <= layer < layers:
            raise ValueError(f"layer must lie in 0..{layers - 1}, got {layer}")
        width = dim // heads
        rotates = preset == "paper" and layer == 0
        super().__init__(
            dim=dim, heads=heads, key_dim=2 * width if rotates else width, value_dim=width
        )
        self.heads, self.preset = heads, preset
        self.decay, self.layer, self.layers = decay, layer, layers

        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        if preset == "example":
            self.g_proj: nn.Module = low_rank(dim, width, dim)
            self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-5)
        else:
            self.g_proj = nn.Linear(dim, dim, bias=False)
            self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.theta = nn.Parameter(lrpe_angles(heads, width)) if rotates else None

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        state: dict[str, Tensor] = {}
        q = F.silu(self.q_proj(x)).unflatten(-1, (self.heads, -1))
        k = F.silu(self.k_proj(x)).unflatten(-1, (self.heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        if self.preset == "example":
            v = F.silu(v)
        if self.theta is not None:
            q = lrpe(q, context.positions, self.theta)
            k = lrpe(k, context.positions, self.theta)
        rates = lightning_rates(self.heads, self.layer, self.layers, form=self.decay, like=x)
        o = self.recur(q, k, v, context, state, decay=-rates, scale=1.0)
        gate = self.g_proj(x)
        gate = torch.sigmoid(gate) if self.preset == "example" else gate
        return self.o_proj(self.norm(o.flatten(-2)) * gate), state


def slopes(heads: int, *, device: torch.device | None = None, wide: bool = False) -> Tensor:
    """The geometric slopes ``[H]``, float32 (float64 where ``wide``), in the authors' order.

    With P the largest power of two up to H: ``2^(-8 (h+1) / P)`` for h < P, then every second
    slope of 2 P, ``2^(-(8 i + 4) / P)`` for i = 0 .. H - P - 1.
    """
    checks.positive("heads", heads)
    P = 2 ** int(math.log2(heads))
    h = torch.arange(heads, device=device, dtype=torch.float64 if wide else torch.float32)
    return torch.exp2(-torch.where(h < P, 8 * (h + 1), 8 * (h - P) + 4) / P)


def lightning_rates(
    heads: int, layer: int, layers: int, *, form: str = "code", like: Tensor
) -> Tensor:
    """The rates s >= 0 of a layer's heads, ``[H]``, float32 at least: a token decays by exp(-s)."""
    wide = like.dtype == torch.float64
    if form == "code":
        depth = layer / (layers - 1) if layers > 1 else 0.0
        return slopes(heads, device=like.device, wide=wide) * (1 - depth + 1e-5)
    h = torch.arange(heads, device=like.device, dtype=torch.float64 if wide else torch.float32)
    return 8 * h / heads * (1 - layer / layers)


def lrpe_angles(heads: int, width: int) -> Tensor:
    """LRPE's first angles, ``[H,1,K]``: ``10000^(-2 (h K + j) / (H K))``."""
    steps = torch.arange(heads * width, dtype=torch.float32) / (heads * width)
    return (10000 ** (-2 * steps)).view(heads, 1, width)


def lrpe(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """``[x cos(t theta), x sin(t theta)]``, ``[B,T,H,K]`` to ``[B,T,H,2K]``.

    Scores then weigh each feature's product by the cosine of ``(t - i) theta``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = positions[..., None, None].to(wide) * theta[:, 0].to(wide)
    return torch.cat([x * angles.cos(), x * angles.sin()], -1).to(x.dtype)
