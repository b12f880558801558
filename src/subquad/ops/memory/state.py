"""What the memory carries from call to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Weights = tuple[Tensor, ...]


class MemoryState(NamedTuple):
    """The memory after some tokens; each group has the network's tensors, ``[N,H,...]``.

    Attributes:
        weights: W; momentum: S.
        base: the weights at which gradients are taken, those at the last chunk's end; empty where
            they are W itself (chunks of one token).
        pending: the sum of the step's gradients so far; empty where every token is a step.
        tokens: int64 ``[N]``, tokens read.
    """

    weights: Weights
    momentum: Weights
    base: Weights
    pending: Weights
    tokens: Tensor

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, for a mixer's state."""
        groups = {name: getattr(self, name) for name in self._fields[:-1]}
        out = {f"{name}{i}": t for name, group in groups.items() for i, t in enumerate(group)}
        return {**out, "tokens": self.tokens}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], count: int) -> MemoryState:
        """The inverse of :meth:`named`; ``count`` tensors make the network."""
        weights, momentum, base, pending = (
            tuple(tensors[f"{name}{i}"] for i in range(count) if f"{name}{i}" in tensors)
            for name in cls._fields[:-1]
        )
        return cls(weights, momentum, base, pending, tensors["tokens"])


def start(
    weights: Sequence[Tensor], tokens: Tensor, *, chunk: int | None, step: int
) -> MemoryState:
    """The state before the first token: the learned weights ``[H,...]``, once for each sequence."""
    N = tokens.shape[0]
    first = tuple(w.expand(N, *w.shape) for w in weights)
    zero = tuple(w.new_zeros(()).expand(N, *w.shape) for w in weights)
    return MemoryState(first, zero, () if chunk == 1 else first, () if step == 1 else zero, tokens)
