"""RetNet: retention, linear attention with a fixed decay per head and a rotation of q and k.

Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
arXiv 2307.08621, section 2.

Legend: B batch, T tokens, C dim, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.recurrent import RecurrentMixer
from subquad.mixers.parts.rotary import rope_frequencies, rotate
from subquad.ops import checks
from subquad.ops.layout import segments

VARIANTS = ("torchscale", "library")
SCORE_NORMS = (None, "decay", "rows")


class RetNet(RecurrentMixer):
    """``S_t = g S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``, ``g_h = 1 - 2^(-5-h)``.

    ``y = Wo (silu(Wg x) * rms_norm(o))``, q and k rotated by their position, k times K^-0.5.

    Args:
        dim: C, the model's width.
        heads: H.
        head_dim: K, even; C / H where None.
        value_dim: V, of a head; 2 K where None, as in the paper.
        variant: "torchscale" (the authors': interleaved pairs with frequencies evenly spaced on a
            log scale from 1 to 1/10000, a norm without weight, eps 1e-6) or "library" (half-split
            pairs with RoPE's frequencies, a norm with weight, eps 1e-5).
        score_norm: divides a token's output by a positive number, which the norm takes out again
            but for its eps: None; "decay", the root of the sum of its decays; "rows", the same
            and then the sum of its weights' absolute values, clamped to [1, 5e4] and held constant
            (quadratic in T; over the tokens of the call, not those of the state).
        norm_eps: of the output norm; the variant's where None.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        "out_proj.weight": "o_proj.weight",
        "g_norm.weight": "norm.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        head_dim: int | None = None,
        value_dim: int | None = None,
        variant: str = "torchscale",
        score_norm: str | None = None,
        norm_eps: float | None = None,
    ) -> None:
        checks.one_of("variant", variant, VARIANTS)
        checks.one_of("score_norm", score_norm, SCORE_NORMS)
        if head_dim is None:
            checks.divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be a positive even int, got {head_dim}")
        value_dim = 2 * head_dim if value_dim is None else value_dim
        super().__init__(dim=dim, heads=heads, key_dim=head_dim, value_dim=value_dim)
        self.heads, self.variant, self.score_norm = heads, variant, score_norm
        self.norm_eps = (
            (1e-6 if variant == "torchscale" else 1e-5) if norm_eps is None else norm_eps
        )

        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * value_dim, bias=False)
        self.g_proj = nn.Linear(dim, heads * value_dim, bias=False)
        self.o_proj = nn.Linear(heads * value_dim, dim, bias=False)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)
        if variant == "library":
            self.norm = GatedRMSNorm(value_dim, eps=self.norm_eps)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        state: dict[str, Tensor] = {}
        q = self._turn(self.q_proj(x), context)
        k = self._turn(self.k_proj(x), context) * self.key_dim**-0.5
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        decay = retention_decay(self.heads, x)
        o = self.recur(q, k, v, context, state, decay=decay, scale=1.0)
        if self.score_norm:
            o = (o / self._row_scale(q, k, decay, context)).to(o.dtype)
        g = self.g_proj(x).unflatten(-1, (self.heads, -1))
        if self.variant == "library":
            y = self.norm(o, g)
        else:
            y = F.silu(g) * F.rms_norm(o, o.shape[-1:], None, self.norm_eps)
        return self.o_proj(y.flatten(-2)), state

    @property
    def splits(self) -> bool:
        return self.score_norm != "rows"  # which looks at all pairs

    def _turn(self, x: Tensor, context: Context) -> Tensor:
        K, wide = self.key_dim, x.dtype == torch.float64
        if self.variant == "library":
            frequencies, layout = rope_frequencies(K, device=x.device, wide=wide), "half"
        else:
            frequencies, layout = retention_frequencies(K, x), "interleaved"
        x = x.unflatten(-1, (self.heads, -1))
        return rotate(x, context.positions, frequencies, layout=layout)

    def _row_scale(self, q: Tensor, k: Tensor, decay: Tensor, context: Context) -> Tensor:
        """``[B,T,H,1]``, what each token's output is divided by."""
        seen = replace(context, given=None).positions[..., None] + 1
        scale = (torch.expm1(seen * decay) / torch.expm1(decay)).sqrt()
        if self.score_norm == "rows":
            cu = context.cu_seqlens
            pieces = [slice(None)] if cu is None else list(segments(cu))
            with torch.no_grad():
                sums = torch.cat([absolute_row_sums(q[:, p], k[:, p], decay) for p in pieces], 1)
            scale = scale * (sums / scale).clamp(1, 5e4)
        return scale[..., None]


def retention_decay(heads: int, like: Tensor) -> Tensor:
    """``log(1 - 2^(-5-h))``, ``[H]``, float32 at least."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, device=like.device, dtype=wide)))


def retention_frequencies(width: int, like: Tensor) -> Tensor:
    """``10000^(-j / (width/2 - 1))`` for j = 0 .. width/2 - 1: both ends included."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return 10000 ** -torch.linspace(0, 1, width // 2, device=like.device, dtype=wide)


def absolute_row_sums(q: Tensor, k: Tensor, decay: Tensor, rows: int = 256) -> Tensor:
    """``sum_i |q_t . k_i| exp(decay (t - i))`` over i <= t, ``[B,T,H]``, some rows at a time."""
    T, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    sums = [q.new_zeros(q.shape[0], 0, q.shape[2], dtype=wide)]
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        scores = torch.einsum("bthk,bshk->bhts", q[:, start:stop], k[:, :stop]).to(wide).abs()
        steps = torch.arange(stop, device=q.device)
        ago = steps[start:, None] - steps
        weights = (decay[:, None, None] * ago.clamp_min(0)).exp() * (ago >= 0)
        sums.append((scores * weights).sum(-1).mT)
    return torch.cat(sums, 1)
