"""Models: blocks around mixers, at home in transformers."""

from subquad.lazy import getter

_HOMES = {
    "CausalLM": "subquad.models.causal_lm",
    "CausalLMConfig": "subquad.models.config",
    "based": "subquad.models.presets",
    "create_model": "subquad.models.presets",
    "hybrid": "subquad.models.presets",
    "kimi_linear": "subquad.models.presets",
}

__all__ = [*_HOMES]
__getattr__ = getter(__name__, _HOMES)
