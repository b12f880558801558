"""Vision models: an isotropic and a four-stage backbone around any mixer."""

from importlib import import_module
from typing import Any

_HOMES = {
    "VisionConfig": "subquad.models.vision.config",
    "VisionModel": "subquad.models.vision.model",
    "create_vision_model": "subquad.models.vision.presets",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'subquad.models.vision' has no attribute {name!r}")
