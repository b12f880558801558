"""Hedgehog's pretrained conversion: the maps learn the attention weights, then all weights learn.

Source: Zhang et al., "The Hedgehog & the Porcupine", arXiv 2402.04347, sections 4.2 and 5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune


@dataclass(frozen=True, kw_only=True)
class Hedgehog(Recipe):
    """Texts of the first stage are short, for its loss needs the teacher's ``[T,T]`` weights.

    With ``Tune(how="lora")`` in place of its second stage it is the conversion of large models.
    """

    key: ClassVar[str] = "hedgehog"
    mixer: str = "hedgehog"
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = (
        Transfer(target="weights", train=("feature_map",), batch=32, length=256, scale=1.0),
        Tune(how="full", lr=5e-4, warmup=20),
    )
