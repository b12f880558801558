"""Token after token, without waiting for the host: a step's launches recorded once and repeated.

A token of a model is hundreds of short kernels, which the host starts more slowly than a GPU runs
them. A CUDA graph starts them all at once, if they are the same at every token: caches count on the
device then, and memory is reserved ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subquad.ops import checks

ROOM = 1024  # tokens for which memory is reserved at once


class Counting(Protocol):
    """A cache whose tokens a device can count.

    Attributes:
        place: the tokens that it counts, and what changes with whatever else is done to it.
        steady: whether a token's launches are the same as the one's before.
    """

    @property
    def place(self) -> tuple[int, *tuple[object, ...]]: ...

    @property
    def steady(self) -> bool: ...

    def get_seq_length(self) -> int: ...

    def reserve(self, n: int) -> None:
        """Make room for ``n`` more tokens."""

    def advance(self) -> None:
        """Count a token that repeated launches have stored."""

    def counted_by(self, clock: Tensor) -> AbstractContextManager[None]:
        """Within, the token that is decoded is stored and read by ``clock`` (int64 ``[1]``, on the
        device), not by the host's count."""


class Steps:
    """Decodes from a cache that holds a prompt.

        step = model.steps(cache)  # of a CausalLM; of a pretrained model: on.steps(cache)
        for _ in range(100):
            logits = step(logits.argmax(-1, keepdim=True))

    The first token runs as always, the second for a rehearsal, the third is recorded, and from then
    on they are repeated; again so after every ``room`` tokens, and where the cache was used
    otherwise in between.

    Args:
        run: ``(ids [B,1], places [B,1] or None) -> logits [B,1,vocabulary]``, with the cache.
        cache: of the model, no row padded.
        repeats: whether tokens can be recorded; else every token runs as always.
        room: tokens for which memory is reserved at once.

    Attributes:
        repeats: as given.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor | None], Tensor],
        cache: Counting,
        *,
        repeats: bool,
        room: int = ROOM,
    ) -> None:
        checks.positive("room", room)
        if not cache.get_seq_length():
            raise ValueError("cache must hold a prompt, got an empty one")
        self._model, self.cache, self.repeats, self.room = run, cache, repeats, room
        self._graph: torch.cuda.CUDAGraph | None = None
        self._place: tuple[object, ...] | None = None  # of the cache after the last step
        self._left = 0  # tokens that there is room for

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The logits ``[B,vocabulary]`` after ``ids [B,1]``; the next call overwrites them."""
        if ids.dim() != 2 or ids.shape[1] != 1:
            raise ValueError(f"ids must be [B,1], got {list(ids.shape)}")
        if not self.repeats:
            return self._run(ids)
        if self._place is None or not self.cache.steady:  # there may be something to settle first
            logits, self._left = self._run(ids), 0
        elif self._place != self.cache.place or self._left < 1:
            self.cache.reserve(self.room)
            self._graph, self._left = None, self.room
            self._clock = torch.full((1,), self.cache.place[0], device=ids.device)
            self._ids = ids.clone()
            logits = self._counted()
        else:
            checks.shape("ids", ids, tuple(self._ids.shape))
            self._ids.copy_(ids)
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                # PyTorch's own stream for this lies on the GPU that first recorded.
                stream = torch.cuda.Stream(ids.device) if ids.is_cuda else None
                with torch.cuda.graph(graph, stream=stream):
                    self._logits = self._counted()
                self._graph = graph
            else:
                self.cache.advance()
            self._graph.replay()
            logits = self._logits
        self._place, self._left = self.cache.place, self._left - 1
        return logits

    def _counted(self) -> Tensor:
        """A token whose launches read its place from the device."""
        with self.cache.counted_by(self._clock):
            logits = self._run(self._ids, self._clock.expand(len(self._ids), 1))
        self._clock += 1
        return logits

    def _run(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        return self._model(ids, places)[:, -1]


def on_one_gpu(model: nn.Module) -> bool:
    """Whether all of a model lies on one GPU, of which alone a graph records."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def decoding(on: Any, streamer: Any = None) -> Callable[..., Tensor]:
    """A ``custom_generate`` for ``model.generate``, whose tokens are :class:`Steps`: greedy or
    sampled, with its processors and criteria, of texts without padding; it returns their tokens.

        model.generate(ids, custom_generate=decoding(model))  # a CausalLM
        model.generate(ids, past_key_values=on.new_cache(), custom_generate=decoding(on))

    Args:
        on: what has ``steps(cache)``: a :class:`~subquad.models.CausalLM` or a policy in a model.
        streamer: of transformers, handed every token.
    """

    def run(
        model: Any,
        ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,  # by this name: others than those of its own loop are passed twice
    ) -> Tensor:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("texts must be of one length, got an attention_mask with padding")
        if generation_config.num_beams != 1:
            raise ValueError(f"num_beams must be 1, got {generation_config.num_beams}")
        cache, pad = model_kwargs["past_key_values"], generation_config.pad_token_id
        new = ids[:, cache.get_seq_length() :]
        logits = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        step = on.steps(cache)
        going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        while True:
            scores = logits_processor(ids, logits.to(torch.float32, copy=True))
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            token = torch.where(going[:, None], token, 0 if pad is None else pad)
            ids = torch.cat([ids, token], 1)
            if streamer is not None:
                streamer.put(token[:, 0].cpu())
            going &= ~stopping_criteria(ids, None)
            if not bool(going.any()):
                break
            logits = step(token)
        if streamer is not None:
            streamer.end()
        return ids

    return run
