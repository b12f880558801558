"""SOFT and SOFT++: attention by a Gaussian kernel, through landmarks and without softmax.

Source: Lu et al., "Softmax-free Linear Transformers", arXiv 2207.03341, sections 3.2 to 3.4.

Legend: B batch, N tokens, C dim, H heads, K head dim, M landmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.grid import ImageMixer, image
from subquad.ops import checks
from subquad.ops.kernel_attention import landmark_attention

VARIANTS = ("soft", "soft++")


class SOFT(ImageMixer):
    """``P inv(A) P^T v``, ``P = G(q, L)``, ``A = G(L, L)``, ``G(a, b) = exp(-|a - b|^2 / 2)``.

    Keys are the queries, landmarks L a strided convolution of them; a convolution of v is added.

    Args:
        dim: C, the model's width.
        heads: H.
        ratio: r: a landmark for every r x r tokens; what is left over at the edges has none.
        conv_size: of the convolution of v, odd, one kernel a head; 0 for none.
        variant: "soft", or "soft++" with the symmetric normalisation that keeps the spectral norm
            from growing with the landmarks, for images larger than those of the training.
        iterations: Newton steps of the inverse.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("W_q", "q_proj"),
            ("W_v", "v_proj"),
            ("ff", "o_proj"),
            ("attn.Qlandmark_op", "pool"),
            ("attn.Qnorm_act.0", "pool_norm"),
            ("attn.conv", "v_conv"),
        )
        for kind in ("weight", "bias")
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 2,
        ratio: int = 4,
        conv_size: int = 3,
        variant: str = "soft++",
        iterations: int = 20,
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        checks.divides("heads", heads, "dim", dim)
        checks.positive("ratio", ratio)
        if ratio < 2:
            raise ValueError(f"ratio must be at least 2, got {ratio}")
        checks.positive("conv_size", conv_size, zero=True)
        if conv_size and conv_size % 2 == 0:
            raise ValueError(f"conv_size must be odd, or 0 for none, got {conv_size}")
        checks.one_of("variant", variant, VARIANTS)
        checks.positive("iterations", iterations)
        self.heads, self.head_dim, self.ratio = heads, dim // heads, ratio
        self.variant, self.iterations = variant, iterations
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.pool = nn.Conv2d(self.head_dim, self.head_dim, ratio, ratio, bias=False)
        self.pool_norm = nn.LayerNorm(self.head_dim)
        self.v_conv = None
        if conv_size:
            self.v_conv = nn.Conv2d(
                heads, heads, conv_size, padding=conv_size // 2, groups=heads, bias=False
            )

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        grid = image(context)
        if min(grid) < self.ratio:
            raise ValueError(f"grid must be at least ratio={self.ratio} a side, got {grid}")
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)) * self.head_dim**-0.25
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        o = landmark_attention(
            q,
            self.landmarks(q, grid),
            v,
            normalize=self.variant == "soft++",
            iterations=self.iterations,
        )
        if self.v_conv is not None:
            o = o + self._near(v, grid)
        return self.o_proj(o.flatten(-2)), {}

    def landmarks(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[B,M,H,K]`` of ``q [B,N,H,K]``."""
        B, H = q.shape[0], self.heads
        pooled = self.pool(q.permute(0, 2, 3, 1).reshape(B * H, -1, *grid))
        marks = F.gelu(self.pool_norm(pooled.flatten(2).mT))
        return marks.unflatten(0, (B, H)).transpose(1, 2)

    def _near(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Each head's kernel over each of its channels."""
        assert self.v_conv is not None
        B, K = v.shape[0], self.head_dim
        near = self.v_conv(v.permute(0, 3, 2, 1).reshape(B * K, self.heads, *grid))
        return near.view(B, K, self.heads, -1).permute(0, 3, 2, 1)

    def flops(self, T: int) -> int:
        """With T / r^2 landmarks; those of an image whose sides r does not divide are fewer."""
        marks = T // self.ratio**2
        kernels = 2 * marks * self.dim * (3 * T + marks)
        inverse = 4 * self.iterations * self.heads * marks**3
        conv = self.v_conv.weight.numel() * self.head_dim if self.v_conv is not None else 0
        pool = self.pool.weight.numel() * self.heads // self.ratio**2
        return 2 * T * (3 * self.dim**2 + conv + pool) + kernels + inverse
