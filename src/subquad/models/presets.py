"""Model configurations with a name: hybrids of linear and full attention, Kimi Linear, BASED."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from subquad.mixers.sala import sparse_layers
from subquad.models.config import CausalLMConfig
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.models.causal_lm import CausalLM

# The published plans of BASED: where its linear attention stands, a window layer after each.
_BASED_PLANS = {27: (1, 6, 11, 16, 21), 36: (1, 6, 11, 16, 21, 27, 33)}


def hybrid(
    linear: str = "gated_deltanet",
    ratio: float | None = 3,
    *,
    full: str = "softmax",
    **config: Any,
) -> CausalLMConfig:
    """``ratio`` linear layers, then one full one, repeated.

    Layer l (from 0) is full where ``(l + 1) % (ratio + 1) == 0``; where that selects none, the last
    layer is. Source: Wang et al., "A Systematic Analysis of Hybrid Linear Attention",
    arXiv 2507.06457, section 3.

    Args:
        linear: alias of the linear mixer.
        ratio: linear layers to one full layer; 0 makes every layer full, None or inf none.
        full: alias of the full attention, which has no window (causal softmax with RoPE).
        **config: of :class:`CausalLMConfig`; the options of an alias that the ratio leaves unused
            are dropped.
    """
    depth = config.get("depth", CausalLMConfig.depth)
    checks.positive("depth", depth)
    if ratio is None or ratio == math.inf:
        layers = linear
    else:
        if isinstance(ratio, float) and ratio.is_integer():
            ratio = int(ratio)
        checks.positive("ratio", ratio, zero=True)
        count = min(int(ratio), depth - 1)
        layers = f"{linear}*{count} {full}" if count else full
    used = {token.partition("*")[0] for token in layers.split()}
    mixers = {
        alias: options
        for alias, options in config.pop("mixers", {}).items()
        if alias in used or alias not in (linear, full)
    }
    return CausalLMConfig(layers=layers, mixers=mixers, **config)


def kimi_linear(*, heads: int = 4, head_dim: int | None = None, **config: Any) -> CausalLMConfig:
    """Three Kimi Delta Attention layers, then one latent attention without positions (MLA, NoPE).

    The last layer is an MLA whatever the depth, as in the published 27-layer model. Source: Kimi
    Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv 2510.26692,
    section 4. Its mixture of experts is a dense SwiGLU here.

    Args:
        heads: of both kinds of layer.
        head_dim: K = V of both kinds, 128 as published; ``dim / heads`` where None. The MLA's
            latent is four times as wide and its shared part half as wide, as published.
        **config: of :class:`CausalLMConfig`.
    """
    depth = config.get("depth", CausalLMConfig.depth)
    dim = config.get("dim", CausalLMConfig.dim)
    checks.positive("depth", depth)
    if head_dim is None:
        checks.divides("heads", heads, "dim", dim)
        head_dim = dim // heads
    layers = ["mla" if l % 4 == 3 or l == depth - 1 else "kimi_linear" for l in range(depth)]
    if depth % 4 == 0:
        layers = layers[:4]
    sizes = {"latent_dim": 4 * head_dim, "nope_dim": head_dim, "value_dim": head_dim}
    defaults: dict[str, dict[str, Any]] = {
        "kimi_linear": {"heads": heads, "head_dim": head_dim},
        "mla": {"heads": heads, **sizes, "rope_dim": max(1, head_dim // 2), "rope_theta": None},
    }
    mixers = _merged({alias: defaults[alias] for alias in layers}, config.pop("mixers", {}))
    return CausalLMConfig(layers=_pattern(layers), mixers=mixers, **config)


def based(
    *, heads: int | None = None, feature_dim: int = 16, window: int = 64, **config: Any
) -> CausalLMConfig:
    """Short convolutions, with Taylor linear attention and then a sliding window in every five.

    The plan is the published one at depth 27 and 36; at other depths layers 1, 6, 11, ... (from 0)
    are linear attention and the one after each is a window, as far as both fit. Source: Arora et
    al., "Simple linear attention language models balance the recall-throughput tradeoff",
    arXiv 2402.18668, section 5, and the authors' configuration files.

    Args:
        heads: of linear attention and window; ``dim / 64`` (at least 1) where None.
        feature_dim: d', the width of q and k in linear attention.
        window: keys that a token sees, itself included (the authors' window_size is about twice
            this: it counts both sides).
        **config: of :class:`CausalLMConfig`.
    """
    depth = config.get("depth", CausalLMConfig.depth)
    dim = config.get("dim", CausalLMConfig.dim)
    checks.positive("depth", depth)
    heads = max(1, dim // 64) if heads is None else heads
    linear = _BASED_PLANS.get(depth, tuple(range(1, depth - 1, 5)) or (depth - 1,))
    places = dict.fromkeys(linear, "based") | {l + 1: "window" for l in linear}
    layers = [places.get(l, "base_conv") for l in range(depth)]
    defaults: dict[str, dict[str, Any]] = {
        "based": {"heads": heads, "feature_dim": feature_dim},
        "window": {"mixer": "softmax", "heads": heads, "window": window},
        "base_conv": {},
    }
    mixers = _merged({alias: defaults[alias] for alias in layers}, config.pop("mixers", {}))
    ours = {
        "mlp_dim": 2 * dim,
        "tie_embeddings": True,
        "scale_residual_init": True,
        "residual_float32": True,
    }
    return CausalLMConfig(layers=_pattern(layers), mixers=mixers, **ours | config)


def sala(
    *, heads: int = 8, kv_heads: int | None = None, head_dim: int | None = None, **config: Any
) -> CausalLMConfig:
    """One sparse layer (InfLLM-V2, no positions) in four, Lightning Attention (rotary) elsewhere.

    The plan is :func:`~subquad.mixers.sala.sparse_layers`. Source: MiniCPM Team, "MiniCPM-SALA",
    arXiv 2602.11761. Its muP scaling of residuals, embeddings and logits is left out.

    Args:
        heads: of both kinds of layer; kv_heads: of the sparse ones, H / 16 (at least 1) as
            published where None. The linear ones have as many as heads.
        head_dim: K; ``dim / heads`` where None.
        **config: of :class:`CausalLMConfig`; the sparse layers' alias is ``sparse``, the linear
            ones' ``sala``.
    """
    depth = config.get("depth", CausalLMConfig.depth)
    sparse = sparse_layers(depth)
    kv_heads = max(1, heads // 16) if kv_heads is None else kv_heads
    layers = ["sparse" if l in sparse else "sala" for l in range(depth)]
    shape = {"heads": heads} | ({} if head_dim is None else {"head_dim": head_dim})
    defaults: dict[str, dict[str, Any]] = {
        "sala": dict(shape),
        "sparse": {
            "mixer": "infllm_v2", **shape, "kv_heads": kv_heads, "rope_theta": None,
            "qk_norm": True, "out_gate": True,
        },
    }  # fmt: skip
    mixers = _merged({alias: defaults[alias] for alias in layers}, config.pop("mixers", {}))
    return CausalLMConfig(layers=_pattern(layers), mixers=mixers, **config)


PRESETS: dict[str, Callable[..., CausalLMConfig]] = {
    "based": based,
    "hybrid": hybrid,
    "kimi_linear": kimi_linear,
    "sala": sala,
}


def create_model(name: str, **config: Any) -> CausalLM:
    """A :class:`~subquad.models.causal_lm.CausalLM` with fresh weights.

    Args:
        name: a preset, one of ``PRESETS``, or a layer pattern such as ``"gla*3 softmax"``.
        **config: the preset's arguments, or those of :class:`CausalLMConfig`.
    """
    from subquad.models.causal_lm import CausalLM

    if name in PRESETS:
        return CausalLM(PRESETS[name](**config))
    return CausalLM(CausalLMConfig(layers=name, **config))


def _pattern(layers: list[str]) -> str:
    """Neighbours of one name joined: ``a a b`` is ``"a*2 b"``."""
    tokens = [(alias, len(list(run))) for alias, run in groupby(layers)]
    return " ".join(alias if count == 1 else f"{alias}*{count}" for alias, count in tokens)


def _merged(
    defaults: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The options of each alias, the given ones over the defaults; empty ones left out."""
    every = {**defaults, **given}
    both = {alias: {**defaults.get(alias, {}), **given.get(alias, {})} for alias in every}
    return {alias: options for alias, options in both.items() if options}
