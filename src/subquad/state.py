"""What a mixer carries from token to token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Named tensors plus the number of tokens seen.

    A mixer takes the state of the past and returns the state after its input. The state passed in
    is spent: its memory may be reused for the new one. Keep the past with :meth:`snapshot`.

    Attributes:
        tensors: named tensors, each with the batch (or, for packed input, the sequences) as its
            first axis. A recurrence keeps ``S`` ``[B,H,K,V]`` in float32; a short convolution
            its last inputs; softmax attention its keys and values ``[B,S,G,K]``.
        seen: int64 ``[B]``, the real (not padding) tokens that each row has consumed.
        past: names of the tensors that grow along axis 1 with the tokens seen, one entry a
            position. Only a state whose every tensor is listed here can be cropped.
        roomy: the tensors of ``past`` are memory with room (:meth:`reserved`), of which each row's
            first ``seen`` entries hold tokens, and a token more is written into it in place, so
            that its launches depend on no number of the host.
    """

    tensors: Mapping[str, Tensor]
    seen: Tensor
    past: tuple[str, ...] = field(default=())
    roomy: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the state keeps allocated, unused capacity included."""
        storages = {t.untyped_storage().data_ptr(): t for t in self.tensors.values() if t.numel()}
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """The state with ``fn`` applied to every tensor, ``seen`` included."""
        return replace(
            self, tensors={k: fn(t) for k, t in self.tensors.items()}, seen=fn(self.seen)
        )

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def snapshot(self) -> State:
        """A copy that later calls cannot touch; hand it back to the mixer to return to it."""
        return self.map(torch.clone)

    def restore(self, snapshot: State) -> State:
        """The state as it was at ``snapshot``; the snapshot stays good for another time."""
        if set(snapshot.tensors) != set(self.tensors):
            raise ValueError(
                f"snapshot must hold the tensors {sorted(self.tensors)}, "
                f"got {sorted(snapshot.tensors)}"
            )
        return snapshot.snapshot()

    def select(self, rows: Tensor) -> State:
        """The state of the batch rows ``rows`` (int ``[B']``), as beam search reorders them."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def reserved(self, tokens: int) -> State:
        """A copy with room for ``tokens`` more tokens; of rows without padding."""

        def roomy(t: Tensor) -> Tensor:
            memory = t.new_empty(t.shape[0], t.shape[1] + tokens, *t.shape[2:])
            memory[:, : t.shape[1]] = t
            return memory

        kept = {n: roomy(t) if n in self.past else t.clone() for n, t in self.tensors.items()}
        return replace(self, tensors=kept, seen=self.seen.clone(), roomy=True)

    def overwrite(self, new: State) -> None:
        """Take over what a token made of this roomy state, where it is not in this memory."""
        for name, t in self.tensors.items():
            if new[name].data_ptr() != t.data_ptr():
                t.copy_(new[name])
        self.seen.copy_(new.seen)

    def filled(self, tokens: int) -> State:
        """The state of a roomy one that holds ``tokens`` tokens, in the same memory."""
        kept = {n: t[:, :tokens] if n in self.past else t for n, t in self.tensors.items()}
        return replace(self, tensors=kept, roomy=False)

    def crop(self, tokens: int) -> State:
        """The state without its last ``tokens`` tokens.

        Raises:
            ValueError: if the past cannot be undone (a recurrence forgets it) or is shorter.
        """
        fixed = sorted(set(self.tensors) - set(self.past))
        if fixed:
            raise ValueError(f"crop needs a state that keeps its past; {fixed} do not: snapshot()")
        shortest = min((self.tensors[n].shape[1] for n in self.past), default=0)
        if not 0 <= tokens <= shortest:
            raise ValueError(f"tokens must lie in 0..{shortest}, got {tokens}")
        kept = {n: t[:, : t.shape[1] - tokens] for n, t in self.tensors.items()}
        return replace(self, tensors=kept, seen=self.seen - tokens)
