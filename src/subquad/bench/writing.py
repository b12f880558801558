"""A pretrained model that answers, with or without a policy, and says how it went."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TextStreamer

from subquad.bench import policies
from subquad.caches.steps import decoding
from subquad.models import CausalLM
from subquad.models.checkpoint import tokenizer_of
from subquad.ops import checks
from subquad.policies.hook import apply
from subquad.policies.parts.decoder import attention_modules


@dataclass(frozen=True)
class Written:
    """An answer's figures: tokens written, seconds to the first, tokens a second from then on, and
    bytes of the cache."""

    tokens: int
    read: float
    rate: float
    cache: int


class Writer:
    """A model, its tokenizer and perhaps a policy.

    Args:
        model: a folder or name for AutoModelForCausalLM.
        policy: as :func:`subquad.bench.policies.policy` reads it; None for the model as it is.
    """

    def __init__(self, model: str, policy: str | None, *, device: str, dtype: torch.dtype) -> None:
        self.policy = None if policy is None else policies.policy(policy)
        checks.device(device)
        self.tokenizer = tokenizer_of(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.model.to(device)

    def tokens(self, text: str) -> Tensor:
        """int64 ``[1,T]``.

        Raises:
            ValueError: for a text without tokens.
        """
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise ValueError(f"prompt must hold at least one token, got {text!r}")
        return ids

    def write(
        self,
        ids: Tensor,
        new: int,
        temperature: float = 0.0,
        reading: Callable[[float], None] = lambda share: None,
        writing: Callable[[str], None] = lambda text: None,
    ) -> Written:
        """Answer the prompt ``ids [1,T]`` with at most ``new`` tokens.

        Args:
            temperature: of sampling; 0 takes the likeliest token.
            reading: is told the share of the prompt's layers that are done.
            writing: is told each piece of text.
        """
        checks.positive("new", new)
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature!r}")
        streamer = _Stream(self.tokenizer, writing)
        more: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {}
        with nullcontext() if self.policy is None else apply(self.model, self.policy) as on:
            cache = policies.new_cache(self.model) if on is None else on.new_cache()
            records = self.model if isinstance(self.model, CausalLM) else on
            if records is not None:
                more["custom_generate"] = decoding(records, streamer)
            hooks = _report_layers(self.model, reading)
            try:
                start = time.perf_counter()
                out = self.model.generate(
                    ids.to(self.model.device),
                    past_key_values=cache,
                    max_new_tokens=new,
                    do_sample=temperature > 0,
                    streamer=streamer,
                    **more,
                )
                end = time.perf_counter()
            finally:
                for hook in hooks:
                    hook.remove()
        wrote = out.shape[1] - ids.shape[1]
        rate = (wrote - 1) / max(end - streamer.first, 1e-9)
        return Written(wrote, streamer.first - start, rate, policies.cache_bytes(cache))


class _Stream(TextStreamer):
    """Hands finished words on, and notes when the first token came."""

    def __init__(self, tokenizer: Any, writing: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.first = 0.0
        self._prompt_seen, self._writing = False, writing

    def put(self, value: Tensor) -> None:
        if self._prompt_seen and not self.first:
            self.first = time.perf_counter()
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._writing(text)


def _report_layers(model: Any, reading: Callable[[float], None]) -> list[Any]:
    """Hooks that tell how far the prompt has come through the layers."""

    def done(share: float, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        if x is not None and x.shape[1] > 1:
            reading(share)

    if isinstance(model, CausalLM):
        modules = [block.mixer for block in model.blocks]
    else:
        try:
            modules = attention_modules(model)
        except ValueError:  # a policy could not reach it, but it writes
            return []
    return [
        module.register_forward_hook(partial(done, (i + 1) / len(modules)), with_kwargs=True)
        for i, module in enumerate(modules)
    ]
