"""The cache of a :class:`~subquad.models.causal_lm.CausalLM`: one mixer state per layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from subquad.state import State


class StateCache(Cache):
    """A transformers ``Cache`` whose entries are the mixers' states.

    It is empty until the first forward pass, and goes along with ``generate``: beam search reorders
    it, several returned sequences repeat it, and a later turn continues it. ``copy.deepcopy`` keeps
    a prompt for several continuations.

    Attributes:
        states: one :class:`~subquad.state.State` a layer, empty before the first token.
        tokens: columns of the input consumed so far, left padding included.
        pending: ``[B,P,C]``, embeddings of columns in which some sequence has not begun yet. A
            mixer takes padding only at the very start, so they are read again with what follows.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        self.states: list[State] = []
        self.tokens = 0
        self.pending: Tensor | None = None

    def with_pending(self, x: Tensor) -> Tensor:
        """``x [B,T,C]`` behind the pending columns, from whose start the states then begin anew."""
        if self.pending is None:
            return x
        self.states = []
        return torch.cat([self.pending, x], 1)

    def advance(self, states: Iterable[State], tokens: int, pending: Tensor | None = None) -> None:
        """Take the states after ``tokens`` more columns of input."""
        self.states = list(states)
        self.tokens += tokens
        self.pending = pending

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
