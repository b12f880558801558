"""Diffusion models with a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subquad.models.diffusion.config import DiTConfig
from subquad.models.diffusion.model import DiT
from subquad.ops import checks

DIFFUSION_PRESETS: dict[str, dict[str, Any]] = {
    "dit_micro": {"dim": 96, "depth": 4, "heads": 3},
    "dit_mini": {"dim": 192, "depth": 6, "heads": 3},
    "dit_small": {"dim": 384, "depth": 12, "heads": 6},
    "dit_base": {"dim": 768, "depth": 12, "heads": 12},
}


def create_diffusion_model(
    name: str, *, mixer: str | Mapping[str, Any] | None = None, **config: Any
) -> DiT:
    """A :class:`~subquad.models.diffusion.model.DiT` with fresh weights.

    Args:
        name: one of ``DIFFUSION_PRESETS``: ``dit_micro``, ``dit_mini``, ``dit_small``,
            ``dit_base``.
        mixer: of every block, softmax where None: a key of the catalogue, or its options with the
            key as ``"mixer"``.
        **config: of :class:`~subquad.models.diffusion.config.DiTConfig`, over the preset's, e.g.
            ``image_size``, ``patch``, ``channels`` and ``classes``.

    Raises:
        ValueError: for an unknown name or mixer (with the nearest ones), and values out of range.
    """
    checks.one_of("name", name, DIFFUSION_PRESETS)
    made = {**DIFFUSION_PRESETS[name]}
    if mixer is not None:
        options = {"mixer": mixer} if isinstance(mixer, str) else dict(mixer)
        if "mixer" not in options:
            raise ValueError(f"mixer must be a key or have one as 'mixer', got {options}")
        key = options.pop("mixer")
        made |= {"layers": key, "mixers": {key: options} if options else {}}
    return DiT(DiTConfig(**{**made, **config}))
