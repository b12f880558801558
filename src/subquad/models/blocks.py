"""What models are stacked from: blocks of a mixer and an MLP, built as the config says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad import catalogue
from subquad.mixers.base import Mixer, create_mixer
from subquad.mixers.parts.decay import LowerBounds
from subquad.mixers.parts.norm import GatedRMSNorm as RMSNorm
from subquad.models.config import CausalLMConfig
from subquad.ops.layer import gated
from subquad.state import State


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)`` without biases."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.up_proj(x), self.gate_proj(x)))


class Block(GradientCheckpointingLayer):
    """One mixer and one MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: CausalLMConfig, layer: int, bounds: LowerBounds | None) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = build_mixer(config, layer, bounds)
        self.mlp: SwiGLU | None = None
        if config.inner_dim:
            self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
            self.mlp = SwiGLU(config.dim, config.inner_dim)
        for projection in (
            getattr(self.mixer, "o_proj", None),
            getattr(self.mlp, "down_proj", None),
        ):
            if projection is not None:
                projection.writes_residual = True

    def forward(self, h: Tensor, state: State | None = None, **places: Any) -> tuple[Tensor, State]:
        y, state = self.mixer(normed(self.mixer_norm, h), state=state, **places)
        h = h + y
        if self.mlp is not None:
            h = h + self.mlp(normed(self.mlp_norm, h))
        return h, state


def normed(norm: RMSNorm, h: Tensor) -> Tensor:
    """The norm of the residual stream, which may be wider than the weights, in their dtype."""
    return norm(h).to(norm.weight.dtype)


def build_mixer(config: CausalLMConfig, layer: int, bounds: LowerBounds | None = None) -> Mixer:
    """The mixer of one layer.

    A mixer that depends on the depth is told where it stands (``layer``, ``layers``); one whose
    gates are bounded below by a parameter of the whole model is handed it (``bounds``).
    """
    key, options = config.mixer(config.pattern[layer])
    place = {"layer": layer, "layers": config.depth, "bounds": bounds}
    known = parameters_of(key)
    options = {name: value for name, value in place.items() if name in known} | options
    mixer = create_mixer(key, dim=config.dim, **options)
    if not mixer.causal:
        raise ValueError(f"layers must be causal mixers, {key!r} is not with {options}")
    return mixer


def parameters_of(key: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(catalogue.system(key).load()).parameters


def lower_bounds(config: CausalLMConfig) -> LowerBounds | None:
    """The parameter that bounds the forget gates of all layers, where a layer takes it."""
    if any("bounds" in parameters_of(config.mixer(alias)[0]) for alias in config.pattern[1:]):
        return LowerBounds(config.depth, config.dim)
    return None
