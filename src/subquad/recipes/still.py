"""STILL: transfer into the norm-preserving maps and the gate, then LoRA on the next token.

Source: Meng, Huo, Luo et al., arXiv 2602.02180.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune


@dataclass(frozen=True, kw_only=True)
class STILL(Recipe):
    """As LoLCATs; the adapters of the second stage are on the gate too."""

    key: ClassVar[str] = "still"
    mixer: str = "still"
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = (
        Transfer(train=("feature_map", "g_proj"), clip=1e9),
        Tune(targets=("q_proj", "k_proj", "v_proj", "o_proj", "g_proj")),
    )
