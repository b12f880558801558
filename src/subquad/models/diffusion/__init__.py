"""Diffusion models: a transformer of any mixers that learns a flow from noise to images."""

from importlib import import_module
from typing import Any

_HOMES = {
    "BATCH": "subquad.models.diffusion.sampling",
    "DiT": "subquad.models.diffusion.model",
    "DiTConfig": "subquad.models.diffusion.config",
    "create_diffusion_model": "subquad.models.diffusion.presets",
    "sample": "subquad.models.diffusion.sampling",
    "save_grid": "subquad.models.diffusion.grid",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'subquad.models.diffusion' has no attribute {name!r}")
