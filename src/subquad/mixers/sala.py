"""The linear layer of SALA: Lightning Attention in the projections of a softmax layer.

Sources: MiniCPM Team, "MiniCPM-SALA: Hybridizing Sparse and Linear Attention for Efficient
Long-Context Modeling", arXiv 2602.11761; Chen et al., "Hybrid Linear Attention Done Right",
arXiv 2601.22156. The sparse layers are InfLLM-V2 without rotation; the preset ``sala`` joins both.

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.lightning import slopes
from subquad.mixers.parts.recurrent import flops_of_weights
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.recurrence import cost, recurrence


class SALA(Softmax):
    """``S_t = exp(-m_h) S_{t-1} + k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``,
    ``y = Wo (rms_norm(o) * sigmoid(Wg x))``, one norm over all heads, no denominator.

    q and k are normed per head and rotated. The slopes m are fixed and the same in every layer.
    The projections are those of the softmax layer it replaces, whose weights it loads by name.

    Args:
        qk_norm: a root mean square norm of q and k per head, before the rotation.
        norm: whether the output has its norm; norm_eps: of all norms.
        decay: whether the state decays (``m_h = 2^(-8 (h + 1) / H)`` for H a power of two).
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")
    FOREIGN: ClassVar[Mapping[str, str]] = {
        "z_proj.weight": "g_proj.weight",
        "o_norm.weight": "norm.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        qk_norm: bool = True,
        norm: bool = True,
        decay: bool = True,
        norm_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to the state, got {sorted(options)}")
        super().__init__(dim=dim, qk_norm=qk_norm, norm_eps=norm_eps, **options)
        self.past = ()
        self.decay = decay
        width = self.heads * self.head_dim
        self.g_proj = nn.Linear(dim, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=norm_eps) if norm else None

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What enters ``o_proj``, normed and gated, ``[B,T,H,K]``, and the new state's tensors."""
        q, k, v = self.qkv(x, context)
        rates = slopes(self.heads, device=x.device, wide=x.dtype == torch.float64)
        o, S = recurrence(
            q,
            context.zero_padding(k),
            v,
            decay=-rates if self.decay else None,
            scale=self.scale,
            state=context.past("S"),
            cu_seqlens=context.cu_seqlens,
        )
        o = o.flatten(-2)
        o = o if self.norm is None else self.norm(o)
        o = o * torch.sigmoid(self.g_proj(x))
        return o.unflatten(-1, (self.heads, -1)), {"S": S}

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """Refused: without a denominator there are no shares to compare with softmax's."""
        raise ValueError("sala has no weights that sum to one; transfer it by its outputs")

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return cost.state_bytes(H=self.heads, K=self.head_dim, V=self.head_dim)

    def flops(self, T: int) -> int:
        K = self.head_dim
        return flops_of_weights(self, T) + cost.flops(B=1, T=T, H=self.heads, K=K, V=K)


PUBLISHED = (0, 9, 16, 17, 22, 29, 30, 31)  # the sparse layers of the released model's 32


def sparse_layers(depth: int) -> tuple[int, ...]:
    """The layers, a quarter and at least two, that stay softmax: the first, the last and others
    evenly between; the published plan at depth 32."""
    checks.positive("depth", depth)
    if depth == 32:
        return PUBLISHED
    count = min(depth, max(2, depth // 4))
    return tuple(sorted({round(n * (depth - 1) / max(count - 1, 1)) for n in range(count)}))


def layer_importance(retrieval: Sequence[float], commonsense: Sequence[float]) -> list[float]:
    """How much each layer should stay softmax: ``min(50, (max_j r_j - r_l) / (max_j c_j - c_l +
    1e-10))``, HALO's measure.

    Args:
        retrieval: r_l, the accuracy in retrieval of the softmax model with layer l alone replaced.
        commonsense: c_l, likewise of commonsense tasks.

    Raises:
        ValueError: for lists of different lengths, and empty ones.
    """
    if len(retrieval) != len(commonsense) or not retrieval:
        raise ValueError(
            f"retrieval and commonsense must name one score a layer, got {len(retrieval)} "
            f"and {len(commonsense)}"
        )
    best_r, best_c = max(retrieval), max(commonsense)
    pairs = zip(retrieval, commonsense, strict=True)
    return [min(50.0, (best_r - r) / (best_c - c + 1e-10)) for r, c in pairs]
