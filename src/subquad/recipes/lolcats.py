"""LoLCATs: transfer of the heads' outputs into the new maps, then LoRA on the next token.

Source: Zhang, Arora et al., arXiv 2410.10254, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune


@dataclass(frozen=True, kw_only=True)
class LoLCATs(Recipe):
    """Only the maps and the factors learn in the transfer; they are frozen beside the adapters.

    The authors lower the learning rate on a plateau of the evaluation loss; here it follows a
    cosine, so that a layer by itself goes exactly as it goes in company.
    """

    key: ClassVar[str] = "lolcats"
    mixer: str = "lolcats"
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = (
        Transfer(train=("feature_map", "window_factors"), clip=1e9),
        Tune(),
    )
