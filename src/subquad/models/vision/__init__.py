"""Vision models: an isotropic and a four-stage backbone around any mixer."""

from subquad.lazy import getter

_HOMES = {
    "VisionConfig": "subquad.models.vision.config",
    "VisionModel": "subquad.models.vision.model",
    "create_vision_model": "subquad.models.vision.presets",
}

__all__ = [*_HOMES]
__getattr__ = getter(__name__, _HOMES)
