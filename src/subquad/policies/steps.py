"""Token after token, without waiting for the host: a step's launches recorded once and repeated.

A token of a pretrained model is hundreds of short kernels, which the host starts more slowly than a
GPU runs them. A CUDA graph starts them all at once, if they are the same at every token: caches
count on the device then (``KVLayer.clock``), and memory is reserved ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.caches.kv import PolicyCache
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.policies.hook import Applied

ROOM = 1024  # tokens for which memory is reserved at once


class Steps:
    """Decodes by a model under a policy, from a cache that holds a prompt.

        with subquad.apply(model, Quest()) as on:
            cache = on.new_cache()
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            step = on.steps(cache)
            for _ in range(100):
                logits = step(logits.argmax(-1, keepdim=True))

    The first token runs as always, the second for a rehearsal, the third is recorded, and from then
    on they are repeated; again so after every ``room`` tokens, and where the cache was used
    otherwise in between.

    Args:
        on: the policy in its model; cache: of its :meth:`~subquad.policies.hook.Applied.new_cache`,
            no row padded.
        room: tokens for which memory is reserved at once.

    Attributes:
        repeats: whether tokens are recorded: on a CUDA device, where the policy can
            (``Policy.repeats``) and nobody counts pairs. Else every token runs as always.
    """

    def __init__(self, on: Applied, cache: PolicyCache, room: int = ROOM) -> None:
        checks.positive("room", room)
        if not cache.get_seq_length():
            raise ValueError("cache must hold a prompt, got an empty one")
        self.on, self.cache, self.room = on, cache, room
        can = all(on.policy.repeats(site) for site in on.sites) and not on.rescales
        self.repeats = can and on.model.device.type == "cuda" and on.tally is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen, self._left = -1, 0  # after the last step; tokens that there is room for

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """The logits ``[B,vocabulary]`` after ``ids [B,1]``; the next call overwrites them."""
        if ids.dim() != 2 or ids.shape[1] != 1:
            raise ValueError(f"ids must be [B,1], got {list(ids.shape)}")
        if not self.repeats:
            return self._run(ids)
        if self._seen < 0:  # a policy may have something to settle first
            logits = self._run(ids)
        elif self._seen != self.cache.held[0].seen or self._left == 0:
            self.cache.reserve(self.room)
            self._graph, self._left = None, self.room
            self._clock = torch.full((1,), self.cache.held[0].seen, device=ids.device)
            self._ids = ids.clone()
            logits = self._counted()
        else:
            self._ids.copy_(ids)
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._logits = self._counted()
                self._graph = graph
            else:
                self.cache.advance()
            self._graph.replay()
            logits = self._logits
        self._seen, self._left = self.cache.held[0].seen, self._left - 1
        return logits

    def _counted(self) -> Tensor:
        """A token whose launches read its place from the device."""
        with self.cache.counted_by(self._clock):
            logits = self._run(self._ids, self._clock.expand(len(self._ids), 1))
        self._clock += 1
        return logits

    def _run(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        return self.on.model(ids, past_key_values=self.cache, position_ids=places).logits[:, -1]
