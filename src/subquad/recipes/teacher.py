"""A pretrained decoder of transformers as a CausalLM of softmax mixers: the same function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subquad.models import CausalLM, CausalLMConfig

_NAMES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "mixer",
}
_ROPE = ("default", "linear")


def import_decoder(model: Any) -> CausalLM:
    """The same model on our mixers, sharing the weights' memory.

    Any decoder of pre-norm blocks with softmax attention (grouped heads, rotary positions, biases
    and norms of q and k where it has them), a SwiGLU and RMS norms: Llama, Mistral, Qwen 2 and 3
    and their like. That it computes the same is checked on a few tokens.

    Args:
        model: a causal language model of transformers, or a ``CausalLM`` of softmax layers.

    Raises:
        ValueError: for sliding windows, rotary positions of another kind, weights without a place
            here, and a model that computes something else.
    """
    if isinstance(model, CausalLM):
        if {model.config.mixer(alias)[0] for alias in model.config.pattern} != {"softmax"}:
            raise ValueError(f"model must have softmax layers only, got {model.config.layers}")
        return model
    config = model.config
    refuse_windows(config)
    made = CausalLM(_config(config))
    weights = {_name(name): t for name, t in model.state_dict().items()}
    _load(made, weights, config.model_type)
    made.generation_config = model.generation_config
    made.train(model.training)
    _compare(model, made)
    return made


def refuse_windows(config: Any) -> None:
    """Raise ValueError where a layer of the pretrained model sees a sliding window only."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window is not None and getattr(config, "use_sliding_window", True)):
        seen = f"layer_types {sorted(kinds)}" if kinds else f"sliding_window={window}"
        raise ValueError(f"model must attend to the whole text in every layer, it has {seen}")


def _config(config: Any) -> CausalLMConfig:
    """Sizes and options of the softmax layers."""
    act = getattr(config, "hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"model must have hidden_act 'silu', got {act!r}")
    if not hasattr(config, "rms_norm_eps"):
        raise ValueError(f"model must have RMS norms, one of type {config.model_type!r} has not")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE:
        raise ValueError(f"model must have rotary positions of type {_ROPE}, got {kind!r}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    softmax = {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "rope_theta": float(rope.get("rope_theta", getattr(config, "rope_theta", 1e4))),
        "rope_factor": float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
        "qk_norm": config.model_type.startswith("qwen3"),
        "bias": bool(getattr(config, "attention_bias", config.model_type == "qwen2")),
        "out_bias": bool(getattr(config, "attention_bias", False)),
        "norm_eps": config.rms_norm_eps,
    }
    return CausalLMConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        layers="softmax",
        mixers={"softmax": softmax},
        mlp_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        tie_embeddings=bool(config.tie_word_embeddings),
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _name(name: str) -> str:
    return ".".join(_NAMES.get(part, part) for part in name.removeprefix("model.").split("."))


def _load(made: CausalLM, weights: Mapping[str, Tensor], kind: str) -> None:
    found = made.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in found.missing_keys if name != "lm_head.weight"]
    if missing or found.unexpected_keys:
        odd = [*missing, *found.unexpected_keys]
        raise ValueError(
            f"model of type {kind!r} must have the weights of pre-norm blocks of softmax "
            f"attention and SwiGLU; these differ: {', '.join(odd[:8])}"
        )
    made.tie_weights()


@torch.no_grad()
def _compare(model: Any, made: CausalLM) -> None:
    """Raise ValueError unless both give the same logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(made.config.vocab_size, (1, 24), generator=generator).to(made.device)
    was = model.training
    want = nn.Module.train(model, False)(ids, use_cache=False).logits.float()
    got = made.eval()(ids, use_cache=False).logits.float()
    model.train(was)
    made.train(was)
    off, size = (got - want).abs().max().item(), want.abs().max().item()
    if not off <= (1e-3 if made.dtype == torch.float32 else 5e-2) * size:
        raise ValueError(
            f"model of type {model.config.model_type!r} must be pre-norm blocks of softmax "
            f"attention and SwiGLU; on our layers its logits differ by {off:.3g}"
        )
