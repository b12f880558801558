"""subquad: long-context attention for PyTorch.

Published attention systems on a few shared, fast operations. Everything here is imported on first
use, so ``import subquad`` costs next to nothing beyond torch.

    import subquad
    mixer = subquad.create_mixer("gated_deltanet", dim=256, heads=4)
    y, state = mixer(x)                      # prefill
    y1, state = mixer(x1, state=state)       # one more token
"""

from importlib import import_module
from typing import Any

from subquad.models import auto as _auto

__version__ = "0.1.0"

# The public names and the modules they live in; the only place that lists them.
_HOMES = {
    "CausalLM": "subquad.models.causal_lm",
    "CausalLMConfig": "subquad.models.config",
    "Mask": "subquad.mask",
    "Mixer": "subquad.mixers.base",
    "State": "subquad.state",
    "System": "subquad.catalogue",
    "analyse": "subquad.analysis",
    "apply": "subquad.policies.hook",
    "backend": "subquad.ops.backend",
    "convert": "subquad.recipes.run",
    "create_diffusion_model": "subquad.models.diffusion.presets",
    "create_model": "subquad.models.presets",
    "create_mixer": "subquad.mixers.base",
    "create_task": "subquad.tasks",
    "create_policy": "subquad.policies.base",
    "create_vision_model": "subquad.models.vision.presets",
    "explain": "subquad.ops.backend",
    "systems": "subquad.catalogue",
}
_MODULES = (
    "analysis",
    "bench",
    "caches",
    "catalogue",
    "mask",
    "mixers",
    "models",
    "ops",
    "parallel",
    "policies",
    "recipes",
    "tasks",
    "train",
)

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"subquad.{name}")
    raise AttributeError(f"module 'subquad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_auto.install()
