"""One mixer for another in a trained model, where both have the same weights."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from subquad import catalogue
from subquad.models import CausalLM
from subquad.models.blocks import parameters_of
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.models.diffusion import DiT

    Model = TypeVar("Model", CausalLM, DiT)


def swap(model: Model, old: str, new: str, **options: Any) -> Model:
    """A copy of ``model`` whose layers of mixer ``old`` are of mixer ``new``, with their weights.

    Softmax attention becomes any system that only masks it otherwise: ``masformer``,
    ``power_attention``, ``longlora``, ``infllm_v2``, ``cca``; or one whose further parameters add
    nothing at first (its ``ADDED``): ``sla``.

    Args:
        old, new: keys of the catalogue.
        **options: of the new mixer, over those of the old one that it also has.

    Raises:
        ValueError: where no layer is ``old``, or the new mixer has other weights.
    """
    config = model.config
    aliases = [alias for alias in dict.fromkeys(config.pattern) if config.mixer(alias)[0] == old]
    checks.one_of("old", old, sorted({config.mixer(alias)[0] for alias in config.pattern}))
    known = parameters_of(new)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    mixers = dict(config.mixers)
    for alias in aliases:
        kept = {k: v for k, v in config.mixer(alias)[1].items() if takes_all or k in known}
        mixers[alias] = {"mixer": new, **kept, **options}
    made = type(model)(type(config).from_dict({**config.to_dict(), "mixers": mixers}))
    nn.Module.to(made, device=model.device, dtype=model.dtype)
    weights = dict(model.state_dict())
    fresh = made.state_dict()
    added = tuple(f".{name}" for name in catalogue.system(new).load().ADDED)
    weights |= {n: t for n, t in fresh.items() if n not in weights and n.endswith(added)}
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{new!r} must have the weights of {old!r}: {error}") from None
    return made.train(model.training)
