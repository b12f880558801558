"""Models of equal size, from their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from subquad.bench import spec
from subquad.mixers.base import options_of
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.models.causal_lm import CausalLM
    from subquad.models.config import CausalLMConfig
    from subquad.models.vision import VisionConfig, VisionModel

TOLERANCE = 0.02


def matched(
    entries: Iterable[tuple[str, str]],
    *,
    heads: int | None = None,
    mlp_dim: int,
    make: Callable[..., Any] = spec.model,
    **sizes: Any,
) -> dict[str, Any]:
    """The configuration of each (label, model), their MLPs widened to equal parameter counts.

    Args:
        entries: labels and models as :mod:`subquad.bench.spec` names them.
        heads: of every mixer that has heads and is not given another number.
        mlp_dim: of the largest model; the others get wider ones.
        make: reads a model's name; :func:`spec.model`, or :func:`spec.vision` for images.
        **sizes: of :class:`~subquad.models.config.CausalLMConfig` (or the vision one), for all.

    Raises:
        ValueError: if the counts cannot be brought within 2%.
    """
    configs = {
        label: _with_heads(make(model, mlp_dim=mlp_dim, **sizes), heads) for label, model in entries
    }
    counts = {label: parameters(config) for label, config in configs.items()}
    target = max(counts.values())
    for label, config in configs.items():
        config.mlp_dim = mlp_dim + 1
        each = parameters(config) - counts[label]
        config.mlp_dim = mlp_dim + round((target - counts[label]) / each)
        found = parameters(config)
        if abs(found - target) > TOLERANCE * target:
            raise ValueError(
                f"{label} has {found:,} parameters where {target:,} are wanted; "
                "a larger dim or mlp_dim lets the MLP match them"
            )
    return configs


def _with_heads(config: Any, heads: int | None) -> Any:
    if heads is None:
        return config
    for alias in set(config.pattern):
        key, options = config.mixer(alias)
        if "heads" in options_of(key):
            config.mixers[alias] = {"mixer": key, "heads": heads, **options}
    return config


def parameters(config: CausalLMConfig | VisionConfig) -> int:
    """The model's parameters, counted without allocating them."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in _fresh(config).parameters())


def build(config: CausalLMConfig | VisionConfig, seed: int, device: str) -> Any:
    """A model with fresh weights.

    Raises:
        ValueError: for a device that is not there.
    """
    import torch

    checks.device(device)
    torch.manual_seed(seed)
    model = _fresh(config)
    torch.nn.Module.to(model, device)
    return model


def _fresh(config: CausalLMConfig | VisionConfig) -> CausalLM | VisionModel:
    from subquad.models.causal_lm import CausalLM
    from subquad.models.vision import VisionConfig, VisionModel

    return VisionModel(config) if isinstance(config, VisionConfig) else CausalLM(config)
