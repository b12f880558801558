"""What vision models are stacked from: stems, steps between stages, blocks around a mixer.

Legend: B batch, T tokens of a grid (height, width), row-major, C dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.mixers.base import Mixer, create_mixer, options_of
from subquad.mixers.parts.grid import to_image, to_tokens
from subquad.models.vision.config import VisionConfig

Grid = tuple[int, int]
# Of mixers that also read text: an image has no order, and its positions come from the model.
IMAGE_OPTIONS = {"causal": False, "rope_theta": None}


class MLP(nn.Module):
    """``fc2(u + conv(u))``, ``u = gelu(fc1(x))``, the depth-wise 3x3 convolution over the grid."""

    def __init__(self, dim: int, inner: int, conv: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.conv = depthwise(inner) if conv else None
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        u = F.gelu(self.fc1(x))
        if self.conv is not None:
            u = u + over_image(self.conv, u, grid)
        return self.fc2(u)


class Block(GradientCheckpointingLayer):
    """A mixer and an MLP, each added to the stream: behind a norm, or with one after the sum."""

    def __init__(self, config: VisionConfig, stage: int, block: int, drop: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.post = config.norm == "post"
        self.position = depthwise(dim) if config.position == "conv" else None
        self.mixer_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mixer = build_mixer(config, stage, block)
        self.mlp_norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, config.inner_dim(stage), config.mlp_conv)
        self.drop = drop
        scale = config.layer_scale
        first = scale[stage] if isinstance(scale, list) else scale
        self.mixer_scale = None if first is None else nn.Parameter(first * torch.ones(dim))
        self.mlp_scale = None if first is None else nn.Parameter(first * torch.ones(dim))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.position is not None:
            x = x + over_image(self.position, x, grid)
        if self.post:
            x = self.mixer_norm(x + self._branch(self.mixer(x, grid=grid)[0], self.mixer_scale))
            return self.mlp_norm(x + self._branch(self.mlp(x, grid), self.mlp_scale))
        x = x + self._branch(self.mixer(self.mixer_norm(x), grid=grid)[0], self.mixer_scale)
        return x + self._branch(self.mlp(self.mlp_norm(x), grid), self.mlp_scale)

    def _branch(self, x: Tensor, scale: nn.Parameter | None) -> Tensor:
        x = x if scale is None else scale * x
        if not (self.drop and self.training):
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop
        return x * kept.to(x.dtype) / (1 - self.drop)


class Stage(nn.Module):
    """The step down from the stage before, positions, blocks."""

    def __init__(self, config: VisionConfig, stage: int, drops: list[float]) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.down = None
        if stage:
            self.down = nn.Sequential(conv3(config.dims[stage - 1], dim, 2), nn.BatchNorm2d(dim))
        self.position = None
        if config.position == "learned":
            side = max(1, config.image_size // config.patch // 2**stage)
            self.position = nn.Parameter(config.init_std * torch.randn(1, dim, side, side))
        self.blocks = nn.ModuleList(
            [Block(config, stage, block, drop) for block, drop in enumerate(drops)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``x [B,C',height,width]`` to the image after each block, ``[B,C,height,width]``."""
        x = x if self.down is None else self.down(x)
        grid = (x.shape[2], x.shape[3])
        if self.position is not None:
            x = x + resized(self.position, grid)
        h, levels = to_tokens(x), []
        for block in self.blocks:
            h = block(h, grid)
            levels.append(to_image(h, grid))
        return levels


def stem(config: VisionConfig) -> nn.Module:
    """From pixels to the first stage's grid."""
    dim, channels = config.dims[0], config.channels
    if config.stem == "patch":
        return nn.Conv2d(channels, dim, config.patch, config.patch)
    half = max(1, dim // 2)
    layers: list[nn.Module] = []
    for a, b, stride in ((channels, half, 2), (half, half, 1), (half, half, 1)):
        layers += [conv3(a, b, stride), nn.BatchNorm2d(b), nn.GELU()]
    return nn.Sequential(*layers, conv3(half, dim, 2), nn.BatchNorm2d(dim))


def build_mixer(config: VisionConfig, stage: int, block: int) -> Mixer:
    """The mixer of one block."""
    key, options = config.mixer(config.patterns[stage][block])
    return image_mixer(key, config.dims[stage], config.heads[stage], options)


def image_mixer(
    key: str,
    dim: int,
    heads: int,
    options: Mapping[str, Any],
    more: Mapping[str, Any] = IMAGE_OPTIONS,
) -> Mixer:
    """A mixer for tokens of an image: ``heads`` and ``more`` for those that know them, beneath
    its own options."""
    known = options_of(key)
    ours: dict[str, Any] = {"heads": heads, **more}
    given = {name: value for name, value in ours.items() if name in known} | dict(options)
    return create_mixer(key, dim=dim, **given)


def resized(position: Tensor, grid: Grid) -> Tensor:
    """Positions ``[1,C,side,side]`` on another grid."""
    if tuple(position.shape[2:]) == grid:
        return position
    return F.interpolate(position, grid, mode="bilinear", align_corners=False)


def over_image(conv: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """A convolution of tokens ``[B,T,C]``."""
    return to_tokens(conv(to_image(x, grid)))


def depthwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def conv3(a: int, b: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride, 1)
