"""Diffusion models: a transformer of any mixers that learns a flow from noise to images."""

from subquad.lazy import getter

_HOMES = {
    "BATCH": "subquad.models.diffusion.sampling",
    "DiT": "subquad.models.diffusion.model",
    "DiTConfig": "subquad.models.diffusion.config",
    "create_diffusion_model": "subquad.models.diffusion.presets",
    "sample": "subquad.models.diffusion.sampling",
    "save_grid": "subquad.models.diffusion.grid",
}

__all__ = [*_HOMES]
__getattr__ = getter(__name__, _HOMES)
