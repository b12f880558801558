"""The plain hybrid: softmax layers become a recurrence with the teacher's projections.

Three stages, as in HALO (Chen et al., "Hybrid Linear Attention Done Right", arXiv 2601.22156):
each layer's output is aligned with the teacher's, the whole is distilled from its logits, and then
learns the next token. The layers to keep follow the ratios of Wang et al., "A Systematic Analysis
of Hybrid Linear Attention", arXiv 2507.06457, with ``keep="3:1"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune

STAGES: tuple[Stage, ...] = (
    Transfer(target="output", lr=3e-3, warmup=20, betas=(0.9, 0.95), scale=1.0),
    Tune(loss="logits", how="full", lr=5e-4, warmup=20, betas=(0.9, 0.95)),
)


@dataclass(frozen=True, kw_only=True)
class Hybrid(Recipe):
    """Keys and values of grouped heads are repeated, for the recurrence has as many as queries."""

    key: ClassVar[str] = "gated_deltanet"
    mixer: str = "gated_deltanet"
    options: Mapping[str, Any] = field(default_factory=lambda: {"expand_v": 1.0})
    stages: tuple[Stage, ...] = STAGES


@dataclass(frozen=True, kw_only=True)
class HybridKimi(Hybrid):
    """The same with Kimi Delta Attention."""

    key: ClassVar[str] = "kimi_linear"
    mixer: str = "kimi_linear"
    options: Mapping[str, Any] = field(default_factory=dict)
