"""DeltaNet: each write replaces what the state returns for its key.

Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", arXiv 2406.06484, sections 2 and 3; the older options are those of Schlag, Irie,
Schmidhuber, arXiv 2102.11174.

Legend: B batch, T tokens, C dim, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm, sum_norm
from subquad.mixers.parts.recurrent import QKVMixer
from subquad.ops import checks

QK_ACTIVATIONS = ("silu", "elu", "relu", "identity")
QK_NORMS = {"l2": l2_norm, "sum": sum_norm}


class DeltaNet(QKVMixer):
    """``S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``.

    Args:
        dim: C, the model's width.
        heads: H.
        expand_k: K = expand_k C / H; expand_v: V = expand_v C / H.
        conv_size: kernel of the short convolutions of q, k and v; 0 for none.
        qk_activation: of q and k, "silu", "elu" (elu(x) + 1), "relu" or "identity".
        qk_norm: of q and k, "l2" or "sum" (Schlag et al.).
        use_gate: whether ``silu(Wg x)`` multiplies the normed output.
        negative_eigenvalues: doubles beta, so that the transition's eigenvalues reach -1.
        norm_eps: of the output norm.
    """

    delta = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        use_gate: bool = False,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        checks.one_of("qk_activation", qk_activation, QK_ACTIVATIONS)
        checks.one_of("qk_norm", qk_norm, QK_NORMS)
        checks.divides("heads", heads, "expand_k * dim", int(expand_k * dim))
        checks.divides("heads", heads, "expand_v * dim", int(expand_v * dim))
        V = int(expand_v * dim) // heads
        super().__init__(
            dim=dim,
            heads=heads,
            key_heads=heads,
            value_heads=heads,
            key_dim=int(expand_k * dim) // heads,
            value_dim=V,
            conv_size=conv_size,
            qk_activation=qk_activation,
        )
        self.qk_norm = QK_NORMS[qk_norm]
        self.negative_eigenvalues = negative_eigenvalues
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.g_proj = nn.Linear(dim, heads * V, bias=False) if use_gate else None
        self.norm = GatedRMSNorm(V, eps=norm_eps)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q, k, v, state = self.qkv(x, context)
        beta = torch.sigmoid(self.b_proj(x)) * (2 if self.negative_eigenvalues else 1)
        o = self.recur(self.qk_norm(q), self.qk_norm(k), v, context, state, beta=beta)
        y = self.norm(o, None if self.g_proj is None else self.g_proj(x).view_as(o))
        return self.o_proj(y.flatten(-2)), state
