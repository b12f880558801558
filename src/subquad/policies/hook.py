"""``subquad.apply``: put a policy into any transformers decoder, and take it out again.

Nothing is patched. Our attention and mask functions are registered under a name of our own, the
model's configuration is pointed at that name, and forward pre-hooks give the model the policy's
cache and (for late rotation) identity rotations. Removing it restores all three.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from subquad.caches.kv import PolicyCache
from subquad.ops import checks
from subquad.policies.base import Call, Policy, Site

NAME = "subquad"

# attention module -> the policy that is applied to its model, and where the module stands in it
_sites: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


@dataclass
class _Bound:
    applied: Applied
    site: Site
    cache: PolicyCache | None = None
    positions: Tensor | None = None
    rotations: Any = None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q ``[B,H,T,K]``, o ``[B,T,H,V]``."""
    bound = _sites.get(module)
    if bound is None:
        raise ValueError("this model's attention is 'subquad' but no policy is applied to it")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    policy = bound.applied.policy
    if bound.cache is None:  # use_cache=False: the call is all there is
        layer = policy.layer(bound.site)
        layer.update(key, value)
    else:
        layer = bound.cache.layers[bound.site.index]
    call = Call(
        site=bound.site,
        q=q,
        k=k,
        v=v,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        real=attention_mask,
        positions=bound.applied.positions(bound, q),
        rotate=bound.applied.rotate(module, bound),
    )
    o = policy.decode(call) if q.shape[1] == 1 else policy.prefill(call)
    return o, None


def _mask(
    *, attention_mask: Tensor | None = None, kv_length: int = 0, **kwargs: Any
) -> Tensor | None:
    """transformers' mask function: only which tokens are real; the rest is the policy's."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, :kv_length].bool()


def apply(model: PreTrainedModel, policy: Policy) -> Applied:
    """Let ``model`` attend as ``policy`` says: for good, or within a ``with`` block.

        with subquad.apply(model, Quest(budget=1024)):
            model.generate(...)

    Args:
        model: any decoder of transformers that uses its ``AttentionInterface``.
        policy: e.g. ``Quest()``, or ``VerticalSlash() + Quest()``.

    Raises:
        ValueError: for an encoder, a model without AttentionInterface or with capped scores, and
            for what the policy itself refuses.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must be a subquad Policy, got {policy!r}")
    return Applied(model, policy)


class Applied:
    """A policy in a model; a context manager, or :meth:`remove` it by hand."""

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self.model, self.policy = model, policy
        modules = attention_modules(model)
        sites = [site_of(m, len(modules)) for m in modules]
        policy.check(sites)
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _mask)
        self._config = model.config.get_text_config(decoder=True)
        self._before = self._config._attn_implementation
        self._config._attn_implementation = NAME
        self._handles = [
            decoder_of(model).register_forward_pre_hook(self._give_cache, with_kwargs=True)
        ]
        for module, site in zip(modules, sites, strict=True):
            _sites[module] = _Bound(self, site)
            self._handles.append(
                module.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
            )
        self._modules = modules

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            _sites.pop(module, None)
        self._config._attn_implementation = self._before
        self._handles, self._modules = [], []

    def new_cache(self) -> PolicyCache:
        """An empty cache of the policy's layers, to pass as ``past_key_values``."""
        return PolicyCache([self.policy.layer(_sites[m].site) for m in self._modules])

    def _give_cache(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Swap a fresh cache of transformers for one of the policy's."""
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is not None and ids.shape[0] > 1 and not self.policy.batched:
            raise ValueError(
                f"{type(self.policy).__name__} takes one sequence at a time, got {ids.shape[0]}"
            )
        past = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        use_cache = self._config.use_cache if use_cache is None else use_cache
        if not isinstance(past, PolicyCache) and (past is not None or use_cache):
            if past is not None and past.get_seq_length() > 0:
                raise ValueError("past_key_values was filled without this policy; start afresh")
            past = self.new_cache()
        for module in self._modules:
            _sites[module].cache = past
        return args, kwargs | {"past_key_values": past}

    def _enter_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note the positions; for late rotation let the module rotate by nothing."""
        bound = _sites[module]
        bound.positions = kwargs.get("position_ids")
        if self.policy.late_rope:
            cos, sin = kwargs["position_embeddings"]
            kwargs = kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        return args, kwargs

    def positions(self, bound: _Bound, q: Tensor) -> Tensor:
        B, T = q.shape[:2]
        if bound.positions is not None:
            return bound.positions.expand(B, -1)
        seen = 0 if bound.cache is None else bound.cache.layers[bound.site.index].seen - T
        return torch.arange(seen, seen + T, device=q.device).expand(B, -1)

    def rotate(self, module: nn.Module, bound: _Bound) -> Callable[[Tensor, Tensor], Tensor]:
        """The model's own rotation, at any positions."""

        def rotated(x: Tensor, positions: Tensor) -> Tensor:
            rotary = next(
                (m for n, m in self.model.named_modules() if n.endswith("rotary_emb")), None
            )
            apply_rope = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
            if rotary is None or apply_rope is None:
                raise ValueError(f"{type(self.model).__name__} has no rotary embedding to apply")
            kinds = inspect.signature(rotary.forward).parameters
            extra = {"layer_type": module.layer_type} if "layer_type" in kinds else {}
            cos, sin = rotary(x, positions, **extra)
            x = x.transpose(1, 2)
            return apply_rope(x, x, cos, sin)[0].transpose(1, 2)

        return rotated


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
    found = [
        m
        for m in decoder_of(model).modules()
        if hasattr(m, "layer_idx") and getattr(m, "is_causal", False) and hasattr(m, "k_proj")
    ]
    if len(found) != config.num_hidden_layers:
        raise ValueError(
            f"model must have softmax attention in every layer, {name} has {len(found)} of "
            f"{config.num_hidden_layers}"
        )
    return sorted(found, key=lambda m: m.layer_idx)


def site_of(module: nn.Module, layers: int) -> Site:
    config: Any = module.config
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[module.layer_idx] == "sliding_attention"
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    heads = config.num_attention_heads
    checks.divides("num_key_value_heads", config.num_key_value_heads, "num_attention_heads", heads)
    return Site(
        index=int(module.layer_idx),
        layers=layers,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(module, "head_dim", config.hidden_size // heads),
        window=window if slides else None,
    )


__all__ = ["Applied", "apply"]
