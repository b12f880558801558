"""Mixers that begin with a softmax layer's weights, and models with some layers replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from subquad.mixers.base import Mixer
from subquad.models import CausalLM, CausalLMConfig
from subquad.models.blocks import build_mixer, parameters_of
from subquad.recipes.base import Recipe


def options_for(key: str, layer: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a softmax layer that mixer ``key`` has too, and ``more`` over them."""
    known = parameters_of(key)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return {**{k: v for k, v in layer.items() if takes_all or k in known}, **more}


def plan(teacher: CausalLM, recipe: Recipe, keep: Iterable[int]) -> CausalLMConfig:
    """The config of the teacher with all layers replaced but those of ``keep``."""
    config, keep = teacher.config, set(keep)
    new, kept = recipe.mixer, recipe.kept
    if new == kept:
        new, kept = f"new_{new}", f"kept_{kept}"
    aliases = [kept if l in keep else new for l in range(config.depth)]
    layer = config.mixer(config.pattern[0])[1]
    mixers = {
        new: {"mixer": recipe.mixer, **options_for(recipe.mixer, layer, recipe.options)},
        kept: {"mixer": recipe.kept, **options_for(recipe.kept, layer, recipe.kept_options)},
    }
    used = {alias: mixers[alias] for alias in dict.fromkeys(aliases)}
    return CausalLMConfig.from_dict({**config.to_dict(), "layers": aliases, "mixers": used})


def twin(teacher: CausalLM, config: CausalLMConfig, layer: int, seed: int = 0) -> Mixer:
    """The new mixer of a layer with what fits of the teacher's weights; the rest drawn anew.

    Keys and values of grouped heads are repeated where the mixer has as many as queries.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed * 1009 + layer)
        made = build_mixer(config, layer)
    old = teacher.blocks[layer].mixer
    made.to(device=teacher.device, dtype=teacher.dtype)
    inherit(made, old)
    return made.train(False)


@torch.no_grad()
def inherit(made: nn.Module, old: nn.Module) -> list[str]:
    """Copy the parameters of ``old`` that ``made`` has too; their names."""
    source, copied = old.state_dict(), []
    for name, t in made.state_dict().items():
        found = source.get(name)
        if found is None:
            continue
        if found.shape != t.shape:
            found = _repeated(name, found, t, old)
        if found is not None:
            t.copy_(found)
            copied.append(name)
    return copied


def _repeated(name: str, found: Tensor, wanted: Tensor, old: Any) -> Tensor | None:
    """Rows of each key or value head once for every query head that reads it, if that fits."""
    if name.split(".")[0] not in ("k_proj", "v_proj"):
        return None
    each = old.heads // old.kv_heads
    if wanted.shape != (found.shape[0] * each, *found.shape[1:]):
        return None
    heads = found.unflatten(0, (old.kv_heads, -1))
    return heads.repeat_interleave(each, 0).flatten(0, 1)


def assemble(teacher: CausalLM, config: CausalLMConfig, mixers: Mapping[int, Mixer]) -> CausalLM:
    """The model of ``config`` that shares all with the teacher but the layers of ``mixers``."""
    with torch.random.fork_rng([]):  # what a kept layer has anew is part of the result
        torch.manual_seed(0)
        made = CausalLM(config)
    made.to(dtype=teacher.dtype)
    for name, child in teacher.named_children():
        if name not in ("layers", "lower_bounds"):
            setattr(made, name, child)
    for l, (block, old) in enumerate(zip(made.blocks, teacher.blocks, strict=True)):
        for name, child in old.named_children():
            if name != "mixer":
                setattr(block, name, child)
        if l in mixers:
            block.mixer = mixers[l]
        elif type(block.mixer) is type(old.mixer):
            block.mixer = old.mixer
        else:
            inherit(block.mixer.to(teacher.device), old.mixer)
    made.generation_config = deepcopy(teacher.generation_config)
    return made.eval()


def own(model: CausalLM) -> CausalLM:
    """A copy that shares no weight with any other model."""
    return deepcopy(model)
