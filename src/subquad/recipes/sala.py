"""SALA's conversion: Lightning layers aligned one by one, the layers to keep chosen by a
measurement and made sparse without positions, then distillation and plain training.

Sources: MiniCPM Team, arXiv 2602.11761; HALO: Chen et al., arXiv 2601.22156.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from subquad.recipes.base import Recipe, Stage, Transfer, Tune

HALO: dict[str, Any] = {"betas": (0.9, 0.95), "min_lr_ratio": 0.1}


@dataclass(frozen=True, kw_only=True)
class SALA(Recipe):
    """A quarter of the layers is to be kept, ``keep=depth // 4``.

    The steps are few; published are 20,000, 20,000 and 500 of 32 texts, the last of 16k tokens.
    """

    key: ClassVar[str] = "sala"
    mixer: str = "sala"
    options: Mapping[str, Any] = field(
        default_factory=lambda: {"qk_norm": True, "kv_heads": None, "rope_theta": 1e4}
    )
    kept: str = "infllm_v2"
    kept_options: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_theta": None, "qk_norm": True, "out_gate": True}
    )
    scored: str = "ratio"
    stages: tuple[Stage, ...] = (
        Transfer(
            target="output", lr=1e-3, scale=1.0, length=512, batch=32,
            betas=(0.9, 0.95), min_lr_ratio=0.01,
        ),
        Tune(loss="logits", how="full", lr=1e-4, length=512, batch=32, **HALO),
        Tune(how="full", lr=1e-5, length=4096, batch=2, steps=100, **HALO),
    )  # fmt: skip
