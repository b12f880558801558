"""Models: blocks around mixers, at home in transformers."""

from importlib import import_module
from typing import Any

_HOMES = {
    "CausalLM": "subquad.models.causal_lm",
    "CausalLMConfig": "subquad.models.config",
    "based": "subquad.models.presets",
    "create_model": "subquad.models.presets",
    "hybrid": "subquad.models.presets",
    "kimi_linear": "subquad.models.presets",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'subquad.models' has no attribute {name!r}")
