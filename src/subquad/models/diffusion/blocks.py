"""What a diffusion transformer is stacked from: places, times, blocks that a condition modulates.

Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, section 3.2
(adaLN-Zero).

Legend: B batch, T tokens of a grid (height, width), row-major, C dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.models.diffusion.config import DiTConfig
from subquad.models.vision.blocks import IMAGE_OPTIONS, Grid, image_mixer

WAVES = 256  # features of a time before its MLP


def waves(x: Tensor, width: int, longest: float = 10000.0) -> Tensor:
    """Cosines and sines of ``x [...]`` at ``width / 2`` frequencies from 1 down to 1 / longest:
    ``[...,width]``."""
    half = width // 2
    powers = torch.arange(half, device=x.device, dtype=x.dtype) / half
    angles = x[..., None] * longest**-powers
    return torch.cat([angles.cos(), angles.sin()], -1)


def places(grid: Grid, dim: int, like: Tensor) -> Tensor:
    """Where tokens stand, ``[T,C]``: half of the features for the row, half for the column."""
    kind = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (torch.arange(n, device=like.device, dtype=kind) for n in grid)
    parts = (
        waves(rows, dim // 2)[:, None].expand(*grid, -1),
        waves(columns, dim // 2)[None].expand(*grid, -1),
    )
    return torch.cat(parts, -1).flatten(0, 1).to(like.dtype)


class Condition(nn.Module):
    """The time and the class as one vector: ``[B,C]``."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.fc1, self.fc2 = nn.Linear(WAVES, dim), nn.Linear(dim, dim)
        # The last row stands for no class.
        self.classes = nn.Embedding(config.classes + 1, dim) if config.classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=config.init_std)

    def forward(self, time: Tensor, classes: Tensor | None) -> Tensor:
        wide = torch.promote_types(time.dtype, torch.float32)
        u = waves(1000 * time.to(wide), WAVES).to(self.fc1.weight.dtype)
        c = self.fc2(F.silu(self.fc1(u)))
        if self.classes is None:
            return c
        if classes is None:
            classes = time.new_full(time.shape, self.classes.num_embeddings - 1, dtype=torch.int64)
        return c + self.classes(classes)


class Modulation(nn.Module):
    """``n`` vectors of the condition, each ``[B,1,C]``, zero at first."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.proj = nn.Linear(dim, n * dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.proj(F.silu(c))[:, None].chunk(self.n, -1)


class Block(GradientCheckpointingLayer):
    """A mixer and an MLP, shifted and scaled behind a norm and gated, all by the condition."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        dim, inner = config.dim, round(config.mlp_ratio * config.dim)
        key, options = config.mixer(config.pattern[layer])
        more = {"bias": config.bias, "out_bias": config.bias, "qk_norm": config.qk_norm}
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.mixer = image_mixer(key, dim, config.heads, options, IMAGE_OPTIONS | more)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.modulation = Modulation(dim, 6)

    def forward(self, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate1 * self.mixer(self.norm(x) * (1 + scale1) + shift1, grid=grid)[0]
        u = self.fc1(self.norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.fc2(F.gelu(u, approximate="tanh"))
