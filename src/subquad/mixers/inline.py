"""InLine: linear attention that subtracts where others divide, and looks at its neighborhood.

Source: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention",
arXiv 2412.06590, equations 4 to 6; the local residual as in the authors' code.

Legend: B batch, T tokens, C dim, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.grid import ImageMixer, image, to_image, to_tokens, whole
from subquad.ops import checks
from subquad.ops.kernel_attention import bidirectional

# The scores divide by T, so an exponential must stay tame.
FEATURES = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "exp": lambda x: (0.2 * x).exp(),
}


class InLine(ImageMixer):
    """``w_ij = s_ij - mean_m(s_im) + 1/T``, ``s_ij = K^-0.5 phi(q_i) . phi(k_j) / T``, beside a 3x3
    neighborhood of v.

    The rows sum to 1, and two queries that differ have different rows. The neighborhood's weights
    are predicted, for each image and channel, from the mean token.

    Args:
        dim: C, the model's width.
        heads: H.
        feature_map: phi, one of "identity", "relu", "leaky_relu", "exp" (of 0.2 x).
        local: whether there is the neighborhood; without it no ``grid`` is needed.
        bias: of the projections of q, k and v.
        class_tokens: the first tokens, which are not of the image: they read, are read and count in
            the means as all do, but have no neighborhood. ``grid`` is that of the others.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        feature_map: str = "identity",
        local: bool = True,
        bias: bool = True,
        class_tokens: int = 0,
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        checks.divides("heads", heads, "dim", dim)
        checks.one_of("feature_map", feature_map, FEATURES)
        checks.positive("class_tokens", class_tokens, zero=True)
        self.off_grid = class_tokens
        self.heads, self.feature_map = heads, feature_map
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        self.local = None
        if local:
            self.local = nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=heads),
                nn.GELU(),
                nn.Conv1d(dim, 9 * dim, 1, groups=heads),
            )

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' ``qkv``, ``proj`` and ``residual`` under our names."""
        out: dict[str, Tensor] = {}
        for name, t in weights.items():
            layer, _, kind = name.partition(".")
            if layer == "qkv":
                out |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", t.chunk(3))}
            else:
                out[{"proj": "o_proj", "residual": "local"}.get(layer, layer) + "." + kind] = t
        return out

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        phi = FEATURES[self.feature_map]
        q, k = (phi(proj(x)).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(x)
        if self.local is None:
            whole(context)
        else:
            grid = image(context)
        o = bidirectional(q, k, v.unflatten(-1, (self.heads, -1)), "subtract").flatten(-2)
        if self.local is not None:
            near = to_tokens(self._neighbors(x, to_image(v[:, self.off_grid :], grid)))
            o = o + F.pad(near, (0, 0, self.off_grid, 0))
        return self.o_proj(o), {}

    def _neighbors(self, x: Tensor, v: Tensor) -> Tensor:
        """``v [B,C,height,width]`` correlated with each image's own 3x3 weights a channel."""
        assert self.local is not None
        B, C = v.shape[:2]
        kernels = self.local(x.mean(1)[..., None]).view(B * C, 1, 3, 3).to(v.dtype)
        return F.conv2d(v.flatten(0, 1)[None], kernels, padding=1, groups=B * C).view_as(v)

    def flops(self, T: int) -> int:
        sums = 4 * T * self.dim * (self.dim // self.heads)
        if self.local is None:
            return 8 * T * self.dim**2 + sums
        predicted = 20 * self.dim**2 // self.heads
        return 8 * T * self.dim**2 + sums + predicted + 18 * T * self.dim
