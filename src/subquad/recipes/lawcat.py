"""LAWCAT: transfer into maps, convolutions and gates, then LoRA on the next token.

Source: Liu, Kundu et al., arXiv 2509.18467, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune


@dataclass(frozen=True, kw_only=True)
class LAWCAT(Recipe):
    """As LoLCATs, with the convolutions and the gate beside the maps in the first stage."""

    key: ClassVar[str] = "lawcat"
    mixer: str = "lawcat"
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = (
        Transfer(train=("feature_map", "conv", "gk_proj", "window_factors"), clip=1e9),
        Tune(),
    )
