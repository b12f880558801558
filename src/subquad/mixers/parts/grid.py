"""What mixers of images share: the grid, rotary positions of two axes, gated attention on them.

Legend: B batch, T tokens (rows of H_ columns W_, row-major), C dim, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import mask
from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.rotary import rotate
from subquad.ops import checks
from subquad.ops.attention import attention

ATTENTIONS = ("linear", "softmax")


class ImageMixer(Mixer):
    """A mixer that sees all of an image at once: it has no state, and needs to know the grid."""

    causal = False

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return 0


def image(context: Context) -> tuple[int, int]:
    """Rows and columns of the image.

    Raises:
        ValueError: where ``grid`` does not have two axes, or with a state, padding or packing.
    """
    whole(context)
    if context.grid is None or len(context.grid) != 2:
        raise ValueError(f"grid must be (height, width) for an image, got {context.grid}")
    return context.grid[0], context.grid[1]


def whole(context: Context) -> None:
    """Refuse what an image does not have."""
    given = {"state": context.state, "padding": context.padding, "cu_seqlens": context.cu_seqlens}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"an image takes no state, padding or cu_seqlens, got {named}")


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[B,T,C]`` as ``[B,C,height,width]``."""
    return x.mT.unflatten(2, grid)


def to_tokens(x: Tensor) -> Tensor:
    """``[B,C,height,width]`` as ``[B,T,C]``."""
    return x.flatten(2).mT


def rotate_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``x [B,T,H,K]``: the first half of a head turns with the row, the second with the column.

    The angles a step are ``10000^(-m / (K/4 - 1))``, m = 0 .. K/4 - 1, both ends included; pairs
    are neighbors. Source: the authors' code of RALA (arXiv 2411.07635).
    """
    F_ = x.shape[-1] // 4
    wide = torch.promote_types(x.dtype, torch.float32)
    powers = torch.linspace(0, 1, F_, dtype=wide, device=x.device)
    place = torch.arange(x.shape[1], device=x.device)[None]
    parts = zip(x.chunk(2, -1), (place // grid[1], place % grid[1]))
    turned = [rotate(part, at, 10000.0**-powers, layout="interleaved") for part, at in parts]
    return torch.cat(turned, -1)


class GatedImageAttention(ImageMixer):
    """``Wo ((attend(q, k, v) + conv(v)) * g)``, ``q, k, v, g`` linear in x.

    ``conv`` is a depth-wise 5x5 convolution of v over the image. A subclass writes :meth:`attend`.

    Args:
        dim: C, the model's width, 4 heads times a whole number.
        heads: H.
        attention: "linear", the system itself, or "softmax", the same layer with softmax over
            rotated q and k, which the published backbones have in their later stages.
        rotary: whether the image's positions turn q and k.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, dim: int, heads: int = 4, attention: str = "linear", rotary: bool = True
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        checks.divides("heads", heads, "dim", dim)
        checks.one_of("attention", attention, ATTENTIONS)
        if dim // heads % 4:
            raise ValueError(f"dim / heads must be a multiple of 4, got {dim} / {heads}")
        self.heads, self.head_dim = heads, dim // heads
        self.attention, self.rotary = attention, rotary
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.g_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.v_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' ``qkvo``, ``lepe`` and ``proj`` (1x1 convolutions) under our names."""
        out: dict[str, Tensor] = {}
        for name, t in weights.items():
            layer, _, kind = name.partition(".")
            if layer == "qkvo":
                parts = t.flatten(1) if kind == "weight" else t
                out |= {f"{n}_proj.{kind}": part for n, part in zip("qkvg", parts.chunk(4))}
            elif layer == "proj":
                out[f"o_proj.{kind}"] = t.flatten(1) if kind == "weight" else t
            else:
                out[name.replace("lepe.", "v_conv.")] = t
        return out

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        grid = image(context)
        v = self.v_proj(x)
        near = to_tokens(self.v_conv(to_image(v, grid)))
        q, k, values = (self._heads(t) for t in (self.q_proj(x), self.k_proj(x), v))
        if self.attention == "softmax":
            q, k = (self.place(t, grid) for t in (q, k))
            o = attention(q, k, values, mask.full())
        else:
            o = self.attend(q, k, values, grid)
        assert isinstance(o, Tensor)
        return self.o_proj((o.flatten(-2) + near) * self.g_proj(x)), {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """``o [B,T,H,K]`` of q, k, v ``[B,T,H,K]``."""
        raise NotImplementedError

    def place(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return rotate_image(x, grid) if self.rotary else x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def flops(self, T: int) -> int:
        own = 2 * T * (5 * self.dim**2 + 25 * self.dim)
        if self.attention == "softmax":
            return own + 4 * T * T * self.dim
        return own + 4 * T * self.dim * self.head_dim


def positive(x: Tensor) -> Tensor:
    """``elu(x) + 1``, in float32 at least."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1
