"""The cache of a :class:`~subquad.models.causal_lm.CausalLM`: one mixer state per layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from subquad.mixers.parts.past import PAD
from subquad.state import State


class StateCache(Cache):
    """A transformers ``Cache`` whose entries are the mixers' states.

    It is empty until the first forward pass, and goes along with ``generate``: beam search reorders
    it, several returned sequences repeat it, and a later turn continues it. ``copy.deepcopy`` keeps
    a prompt for several continuations.

    Attributes:
        states: one :class:`~subquad.state.State` a layer, empty before the first token.
        tokens: columns of the input consumed so far, left padding included.
        steady: whether the last call was of a token that left every state as large as it was, but
            for what holds an entry a token.
        pending: ``[B,P,C]``, embeddings of columns in which some sequence has not begun yet. A
            mixer takes padding only at the very start, so they are read again with what follows.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._version = 0
        self.reset()

    def reset(self) -> None:
        self.states = []
        self.tokens = 0
        self.pending: Tensor | None = None
        self.steady = False

    @property
    def states(self) -> list[State]:
        if self._counting or not self._roomy:
            return self._states
        return [state.filled(self.tokens) for state in self._states]

    @states.setter
    def states(self, states: list[State]) -> None:
        self._states, self._roomy, self._counting = states, False, False
        self._version += 1

    def with_pending(self, x: Tensor) -> Tensor:
        """``x [B,T,C]`` behind the pending columns, from whose start the states then begin anew."""
        if self.pending is None:
            return x
        self.states = []
        return torch.cat([self.pending, x], 1)

    def take(self, states: Iterable[State], tokens: int, pending: Tensor | None = None) -> None:
        """Take the states after ``tokens`` more columns of input."""
        states = list(states)
        if self._counting:
            for home, new in zip(self._states, states, strict=True):
                home.overwrite(new)
        else:
            self.steady = tokens == 1 and sizes(self.states) == sizes(states)
            self.states = states
        self.tokens += tokens
        self.pending = pending

    @property
    def place(self) -> tuple[int, int]:
        """See :class:`~subquad.caches.steps.Counting`, as for the following three."""
        return self.tokens, self._version

    def reserve(self, n: int) -> None:
        self.states = states = self.states
        for i, state in enumerate(states):  # so that one layer at a time is there twice
            states[i] = state.reserved(n)
        self._roomy = True

    def advance(self) -> None:
        self.tokens += 1

    @contextmanager
    def counted_by(self, clock: Tensor) -> Iterator[None]:
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"StateCache(layers={len(self)}, tokens={self.tokens}, bytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes that the states keep allocated."""
        return sum(state.nbytes for state in self.states)

    @property
    def batch_size(self) -> int:
        return len(self.states[0].seen) if self.states else -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.tokens + query_length, 0

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether every layer keeps its past and can so forget the last tokens."""
        return all(set(state.tensors) == set(state.past) for state in self.states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``abs(tokens_to_remove)`` tokens, a count at or below zero.

        Raises:
            ValueError: if a layer's past cannot be undone; nothing is changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be <= 0, got {tokens_to_remove}")
        if tokens_to_remove:
            self.states = [state.crop(-tokens_to_remove) for state in self.states]
            self.tokens += tokens_to_remove

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [state.select(indices) for state in self.states]
        if self.pending is not None:
            self.pending = self.pending.index_select(0, indices.to(self.pending.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.states:
            rows = torch.arange(self.batch_size, device=self.states[0].seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def update(self, *args, **kwargs):
        raise TypeError("a StateCache holds mixer states, not keys and values: use advance()")


def sizes(states: Iterable[State]) -> list[dict[str, torch.Size]]:
    """Of what does not grow with the tokens; padding does not stay where it is."""
    return [
        {n: t.shape for n, t in s.tensors.items() if n == PAD or n not in s.past} for s in states
    ]
