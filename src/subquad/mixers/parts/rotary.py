"""Rotary position embedding: pairs of features turn by an angle proportional to the position.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
arXiv 2104.09864, section 3.2.2. A score of two rotated vectors depends on the positions'
difference alone.

Legend: B batch, T tokens, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("half", "interleaved")


def rope_frequencies(
    width: int, theta: float = 10000.0, *, device: torch.device | None = None, wide: bool = False
) -> Tensor:
    """``theta^(-2j / width)`` for j = 0 .. width/2 - 1, float32 (float64 where ``wide``)."""
    dtype = torch.float64 if wide else torch.float32
    return theta ** (-torch.arange(0, width, 2, device=device, dtype=dtype) / width)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, *, layout: str = "half") -> Tensor:
    """Turn the first ``2 F`` features of ``x``; those beyond stay as they are.

    Pair j, turned by ``positions * frequencies[j]`` from (a, b) to (a cos - b sin, b cos + a sin),
    is features (j, F + j) in the "half" layout and (2j, 2j + 1) in the "interleaved" one.

    Args:
        x: ``[B,T,H,K]``, K >= 2 F.
        positions: int ``[B,T]``, or ``[1,T]``.
        frequencies: ``[F]``, radians a token.
        layout: "half" or "interleaved".

    Returns:
        ``[B,T,H,K]`` in the dtype of x; angles and products are in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = (positions[..., None].to(wide) * frequencies.to(wide))[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    width = 2 * frequencies.shape[0]
    turning = x[..., :width].to(wide)
    if layout == "half":
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)
