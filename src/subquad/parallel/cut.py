"""Where the ranks' borders fall among packed sequences.

Legend: W ranks, C tokens of a rank, N sequences, n those that have tokens on this rank.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from subquad.parallel.collectives import total
from subquad.parallel.mesh import Split


@dataclass(frozen=True)
class Piece:
    """What one rank holds of the packed sequences: those from ``first`` to ``last``.

    Attributes:
        continues: whether the first of them began on an earlier rank.
        goes_on: whether the last of them ends on a later one.
    """

    first: int
    last: int
    continues: bool
    goes_on: bool

    @property
    def whole(self) -> bool:
        """Whether all tokens belong to one sequence that began before: the rank maps a state."""
        return self.continues and self.first == self.last


class Cut:
    """The packed sequences ``cu_seqlens`` (None: every row is one) over the ranks of ``here``.

    Attributes:
        pieces: of every rank.
        mine: this rank's.
    """

    def __init__(self, cu_seqlens: Tensor | None, C: int, here: Split) -> None:
        self.here, self.C = here, C
        self.bounds = [0, C * here.size] if cu_seqlens is None else cu_seqlens.tolist()
        self._given = cu_seqlens
        self.pieces = [self._piece(rank) for rank in range(here.size)]
        self.mine = self.pieces[here.rank]
        self.low = here.rank * C

    def _piece(self, rank: int) -> Piece:
        low, high = rank * self.C, (rank + 1) * self.C
        first = bisect_right(self.bounds, low) - 1
        last = bisect_left(self.bounds, high) - 1
        return Piece(first, last, self.bounds[first] < low, self.bounds[last + 1] > high)

    @property
    def packed(self) -> bool:
        return self._given is not None

    @cached_property
    def cu(self) -> Tensor | None:
        """int32 ``[n+1]``, the boundaries on this rank."""
        if self._given is None:
            return None
        bounds = self.bounds[self.mine.first : self.mine.last + 2]
        local = [min(max(b - self.low, 0), self.C) for b in bounds]
        return torch.tensor(local, dtype=torch.int32, device=self._given.device)

    @property
    def head(self) -> int:
        """How many tokens belong to the first sequence."""
        return min(self.bounds[self.mine.first + 1] - self.low, self.C)

    @property
    def tail(self) -> int:
        """Where the tokens of the last sequence begin."""
        return max(self.bounds[self.mine.last] - self.low, 0)

    def initial(self, state: Tensor | None, head: Tensor, like: Tensor) -> Tensor | None:
        """The states ``[n,...]`` before this rank's tokens, from those ``[N,...]`` before the whole
        and, where the first sequence continues, ``head``; None where all are zero.

        ``like`` ``[*,...]`` has the shape of a state.
        """
        mine = self.mine
        if not self.packed:
            return head if mine.continues else state
        if state is None:
            if not mine.continues:
                return None
            state_part = like.new_zeros(mine.last + 1 - mine.first, *like.shape[1:])
        else:
            state_part = state[mine.first : mine.last + 1]
        return torch.cat([head, state_part[1:]]) if mine.continues else state_part

    def final(self, states: Tensor, state: Tensor | None) -> Tensor:
        """The states ``[N,...]`` after the whole sequences, on every rank, from those ``[n,...]``
        after this rank's tokens; ``state [N,...]`` is that of the sequences without tokens."""
        mine, N = self.mine, len(self.bounds) - 1
        ends = len(states) - mine.goes_on
        before, after = mine.first, N - mine.first - ends
        own = torch.cat(
            [
                states.new_zeros(before, *states.shape[1:]),
                states[:ends],
                states.new_zeros(after, *states.shape[1:]),
            ]
        )
        # A sequence without tokens lies on one rank, or between two: rank 0 speaks for it.
        empty = [a == b for a, b in pairwise(self.bounds)]
        if any(empty):
            hole = torch.tensor(empty, device=states.device).view(-1, *[1] * (states.dim() - 1))
            kept = 0 if state is None or self.here.rank else state.to(states.dtype)
            own = torch.where(hole, kept, own)
        return total(own, self.here)
