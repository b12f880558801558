"""``subquad.apply``: put a policy into any transformers decoder, and take it out again.

Nothing is patched. Our attention and mask functions are registered under a name of our own, the
model's configuration is pointed at that name, and forward pre-hooks give the model the policy's
cache and (for late rotation) identity rotations. Removing it restores all three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from subquad.caches.kv import PolicyCache
from subquad.caches.steps import ROOM, Steps, on_one_gpu
from subquad.ops.attention.token import Rope
from subquad.policies.base import Call, Policy, Site, Tally
from subquad.policies.parts import late
from subquad.policies.parts.decoder import (
    attention_modules,
    decoder_of,
    layer_index,
    rotation_of,
    site_of,
)

NAME = "subquad"

# attention module -> the policy that is applied to its model, and where the module stands in it
_sites: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


@dataclass
class _Bound:
    applied: Applied
    site: Site
    cache: PolicyCache | None = None
    positions: Tensor | None = None
    called: bool = False


class _Found(Exception):
    """Ends a forward pass that was run for one attention's call: what follows is not needed."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


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
    applied = bound.applied
    if bound.called:
        raise ValueError(f"{type(module).__name__} attends more than once, which is not supported")
    bound.called = True
    if bound.cache is None:  # use_cache=False: the call is all there is
        layer = applied.policy.layer(bound.site)
        layer.starts = applied.starts
        layer.update(key, value)
    else:
        layer = bound.cache.held[bound.site.index]
    call = Call(
        site=bound.site,
        q=q,
        k=k,
        v=v,
        layer=layer,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        real=attention_mask,
        positions=applied.positions(bound, layer.seen, q),
        rotate=applied.rotate(module),
        tally=applied.tally,
        rope=partial(applied.rope, module, q),
    )
    if applied.probe is not None:
        return late.attend(applied.probe(call)), None
    if applied.watched == bound.site.index:
        raise _Found(call)
    if call.tally is not None and applied.watched is None:
        unread = bound.cache.skipped if bound.cache is not None else 0
        first = unread * (unread + 1) // 2 if call.first else 0
        more = (unread * q.shape[1] + first) * bound.site.heads
        call.tally.add(q.shape[1], visible=call.visible() + more)
    answers = q.shape[1] == 1 or layer.compressed
    o = applied.policy.decode(call) if answers else applied.policy.prefill(call)
    if q.shape[1] > 1:
        applied.policy.settle(call)
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
    """A policy in a model; a context manager, or :meth:`remove` it by hand.

    Attributes:
        model, policy: what was applied to what; sites: the model's attention layers.
        tally: set it to a :class:`~subquad.policies.base.Tally` and the pairs attended to are
            counted (which costs some time); None counts nothing.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        self.model = model
        self.tally: Tally | None = None
        self.watched: int | None = None
        self.starts: list[int] | None = None
        self.probe: Callable[[Call], Call] | None = None
        self._modules = attention_modules(model)
        if self._modules[0] in _sites:
            other = type(_sites[self._modules[0]].applied.policy).__name__
            raise ValueError(f"model has the policy {other} already; remove it, or join them by +")
        self.sites = [site_of(m, len(self._modules)) for m in self._modules]
        self.policy: Policy = policy.prepare(model)
        self.policy.check(self.sites)
        self._rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
        kinds = {} if self._rotary is None else inspect.signature(self._rotary.forward).parameters
        self._by_type = "layer_type" in kinds
        if self.policy.late_rope and (
            self._rotary is None or rotation_of(self._modules[0]) is None
        ):
            raise ValueError(f"{type(model).__name__} has no rotary embedding to apply late")
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _mask)
        self._config = model.config.get_text_config(decoder=True)
        self._before = self._config._attn_implementation
        self._config._attn_implementation = NAME
        self._handles = [
            decoder_of(model).register_forward_pre_hook(self._give_cache, with_kwargs=True)
        ]
        for module, site in zip(self._modules, self.sites, strict=True):
            _sites[module] = _Bound(self, site)
            self._handles.append(
                module.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
            )
        self._late, self._rotates = self.policy.late_rope, [True] * len(self.sites)
        self._ropes: dict[Any, Rope | None] = {}
        self._still: dict[Any, tuple[Tensor, Tensor]] = {}
        if self._late:
            try:
                self._rotates = late.rotating(self)
            except BaseException:
                self.remove()
                raise

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            _sites.pop(module, None)
        self._config._attn_implementation = self._before
        self._handles = []

    def new_cache(self) -> PolicyCache:
        """An empty cache of the policy's layers, to pass as ``past_key_values``."""
        return PolicyCache([self.policy.layer(_sites[m].site) for m in self._modules])

    def steps(self, cache: PolicyCache, room: int = ROOM) -> Steps:
        """Decode from ``cache``, token after token; on a GPU the launches are recorded and
        repeated, where the policy can (``Policy.repeats``) and nobody counts pairs. See
        :class:`~subquad.caches.steps.Steps`."""
        can = all(self.policy.repeats(site) for site in self.sites) and not self.rescales

        def run(ids: Tensor, places: Tensor | None) -> Tensor:
            return self.model(ids, past_key_values=cache, position_ids=places).logits

        repeats = can and self.tally is None and on_one_gpu(self.model)
        return Steps(run, cache, repeats=repeats, room=room)

    @property
    def rescales(self) -> bool:
        """Whether the model's rotations follow the length, which the host is asked for."""
        kinds = getattr(self._rotary, "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        return any("dynamic" in kind or kind == "longrope" for kind in kinds)

    def _give_cache(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Swap a fresh cache of transformers for one of the policy's."""
        ids = kwargs.get("input_ids", args[0] if args else None)
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
        if self.policy.reads and self.watched is None:
            kwargs, args = kwargs | self._read(kwargs.get("input_ids", *args[:1]), past, kwargs), ()
        self.starts = padding_starts(kwargs.get("attention_mask"))
        for layer in past.held if past is not None else []:
            layer.starts = self.starts
        for module in self._modules:
            _sites[module].cache = past
        return args, kwargs | {"past_key_values": past}

    def _read(self, ids: Tensor | None, past: PolicyCache | None, kwargs: dict) -> dict:
        """What the policy reads in a prompt's place; what follows takes its place behind that."""
        if ids is None:
            raise ValueError(f"{type(self.policy).__name__} needs input_ids, not inputs_embeds")
        if past is None or past.get_seq_length() == 0:
            starts = padding_starts(kwargs.get("attention_mask")) or [0]
            text = self.policy.read(ids[:, starts[0] :], self.look)
            if past is not None:
                past.skipped = ids.shape[1] - text.shape[1]
            ids = text
        held = 0 if past is None else past.held[0].seen
        places = torch.arange(held, held + ids.shape[1], device=ids.device)[None]
        return {"input_ids": ids, "attention_mask": None, "position_ids": places}

    def look(self, ids: Tensor, layer: int | None = None) -> Call:
        """Run the model over ``ids [B,T]``, without a cache, as far as the attention of ``layer``
        (the last where None), for what that is called with."""
        self.watched = len(self.sites) - 1 if layer is None else layer
        try:
            decoder_of(self.model)(input_ids=ids, use_cache=False)
        except _Found as found:
            return found.call
        finally:
            self.watched = None
        raise AssertionError("the model never called the attention of that layer")

    def run(self, ids: Tensor, probe: Callable[[Call], Call], late: bool) -> None:
        """Run the model over ``ids [B,T]``, each attention with the call that ``probe`` returns for
        its own, rotated by the model or, ``late``, not."""
        decoder, training = decoder_of(self.model), self.model.training
        self.probe, self.watched, before, self._late = probe, -1, self._late, late
        try:
            self.model.eval()
            decoder(input_ids=ids.to(self.model.device), use_cache=False)
        finally:
            self.model.train(training)
            self.probe, self.watched, self._late = None, None, before

    def _enter_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note the positions; for late rotation let the module rotate by nothing."""
        _sites[module].positions, _sites[module].called = kwargs.get("position_ids"), False
        if self._late:
            cos, sin = kwargs["position_embeddings"]
            kind = cos.dtype, cos.device
            if kind not in self._still:  # made once, to save two launches a layer and token
                with torch.inference_mode(False):
                    pair = torch.tensor([1.0, 0.0], dtype=cos.dtype, device=cos.device)
                    self._still[kind] = pair[0], pair[1]
            one, zero = self._still[kind]
            kwargs = kwargs | {"position_embeddings": (one.expand_as(cos), zero.expand_as(sin))}
        return args, kwargs

    def positions(self, bound: _Bound, seen: int, q: Tensor) -> Tensor:
        """int64 ``[B,T]``, as the model counts them."""
        B, T = q.shape[:2]
        if bound.positions is not None:
            return bound.positions.expand(B, -1)
        return torch.arange(seen - T, seen, device=q.device).expand(B, -1)

    def rope(self, module: nn.Module, like: Tensor, n: int) -> Rope | None:
        """:meth:`rotate` to the places 0..n-1 in numbers of the dtype of ``like [...,K]``, once for
        all layers that rotate alike; None where it follows the length, or is no :class:`Rope`."""
        if self.rescales:
            return None
        key = self._rotates[layer_index(module)], self._kind(module), n, like.dtype, like.device
        if key not in self._ropes:
            with torch.inference_mode(False), torch.no_grad():
                self._ropes[key] = late.table(self.rotate(module), n, like)
        return self._ropes[key]

    def _kind(self, module: nn.Module) -> str | None:
        """Of layer, where the model's rotation asks for it."""
        if not self._by_type:
            return None
        return getattr(module, "layer_type", self._config.layer_types[layer_index(module)])

    def rotate(self, module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """The model's own rotation, at any positions."""
        if not self._rotates[layer_index(module)]:
            return lambda x, positions: x
        rotary, apply_rope = self._rotary, rotation_of(module)
        extra = {"layer_type": self._kind(module)} if self._by_type else {}

        def rotated(x: Tensor, positions: Tensor) -> Tensor:
            if rotary is None or apply_rope is None:
                raise ValueError(f"{type(self.model).__name__} has no rotary embedding to apply")
            cos, sin = rotary(x, positions, **extra)
            x = x.transpose(1, 2)
            return apply_rope(x, x[:, :0], cos, sin)[0].transpose(1, 2)  # queries alone

        return rotated


def padding_starts(attention_mask: Any) -> list[int] | None:
    """Columns of padding at the start of each row; None where there is none.

    Raises:
        ValueError: unless the mask is ``[B,S]`` with its padding on the left.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        shape = getattr(attention_mask, "shape", None)
        found = type(attention_mask).__name__ if shape is None else list(shape)
        raise ValueError(f"attention_mask must be [B,S] under a policy, got {found}")
    real = attention_mask.bool()
    if bool(real.all()):
        return None
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise ValueError(
            "attention_mask must have its padding on the left (tokenizer.padding_side='left')"
        )
    return (~real).sum(1).tolist()


__all__ = ["Applied", "apply"]
