"""What a policy has to know of a transformers decoder: its layers, and how they rotate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.ops import checks
from subquad.policies.base import Site


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose forward takes ``past_key_values`` and runs the layers."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The model's attention modules by layer.

    Raises:
        ValueError: for a model that a policy cannot reach.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"model must be a decoder that generates, got {name}")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"model must use transformers' AttentionInterface, {name} does not")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"{name} caps its scores (attn_logit_softcapping), which is not supported")
    found: list[Any] = [
        m
        for m in decoder_of(model).modules()
        if hasattr(m, "layer_idx") and getattr(m, "is_causal", False) and hasattr(m, "k_proj")
    ]
    if len(found) != config.num_hidden_layers:
        raise ValueError(
            f"model must have softmax attention in every layer, with a k_proj of its own; "
            f"{name} has {len(found)} of {config.num_hidden_layers}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise ValueError(f"{name} has layers of {sorted(kinds)}, which is not supported")
    if any(getattr(m, "sinks", None) is not None for m in found):
        raise ValueError(f"{name} has learned attention sinks, which are not supported")
    return sorted(found, key=layer_index)


def layer_index(module: Any) -> int:
    """The place of an attention module among the layers."""
    return int(module.layer_idx)


def site_of(module: nn.Module, layers: int) -> Site:
    """Where an attention module stands, of ``layers``."""
    config: Any = module.config
    index = layer_index(module)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[index] == "sliding_attention"
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    heads = config.num_attention_heads
    checks.divides("num_key_value_heads", config.num_key_value_heads, "num_attention_heads", heads)
    return Site(
        index=index,
        layers=layers,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(module, "head_dim", config.hidden_size // heads),
        window=window if slides else None,
    )


def rotation_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """How the model's own file rotates q and k."""
    return getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
