"""Keys and values of one layer of a pretrained model, as transformers caches them.

Legend: B batch, T new tokens, S cached entries, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from subquad.ops.cache import append


class Rows:
    """A tensor ``[B,S,...]`` that grows along axis 1 in place, an eighth at a time."""

    def __init__(self, data: Tensor | None = None) -> None:
        self._memory = data
        self.length = 0 if data is None else data.shape[1]

    @property
    def data(self) -> Tensor:
        """``[B,S,...]``, a view of what is filled."""
        return self.memory[:, : self.length]

    @property
    def memory(self) -> Tensor:
        """``[B,R,...]``, with the room that is left."""
        assert self._memory is not None, "nothing appended yet"
        return self._memory

    @property
    def nbytes(self) -> int:
        return 0 if self._memory is None else self._memory.untyped_storage().nbytes()

    def append(self, x: Tensor) -> None:
        """Add ``x [B,T,...]``."""
        end = self.length + x.shape[1]
        if self._memory is None:  # a first, prompt-sized allocation is exact
            self._memory = x.new_empty(x.shape[0], end, *x.shape[2:])
        self.extend(x.shape[1])
        self._memory[:, self.length - x.shape[1] :][:, : x.shape[1]] = x

    def extend(self, n: int) -> Tensor:
        """Count ``n`` more, which the caller writes into the memory that is returned,
        ``[B,R,...]``; where it has to grow it leaves room for an eighth more."""
        end = self.length + n
        if end > self.memory.shape[1]:
            self.reserve(n + max(64, end // 8))
        self.length = end
        return self.memory

    def reserve(self, n: int) -> None:
        """Make room for ``n`` more."""
        held = self.memory
        if self.length + n > held.shape[1]:
            self._memory = held.new_empty(held.shape[0], self.length + n, *held.shape[2:])
            self._memory[:, : self.length] = held[:, : self.length]

    def replace(self, x: Tensor) -> None:
        """Hold ``x [B,S,...]`` and nothing else; what was held is freed."""
        self._memory, self.length = x.contiguous(), x.shape[1]

    def drop(self, n: int) -> None:
        """Free the first ``n``."""
        if n > 0:
            self.replace(self.data[:, n:].clone())

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows ``rows``, in that order."""
        if self._memory is not None:
            self.replace(self.data.index_select(0, rows.to(self.data.device)))


class Held(NamedTuple):
    """What a token of :func:`subquad.ops.attention.token.token` may read, its first arguments
    after the query; with a clock the whole memory, with the room that is left."""

    keys: Tensor
    values: Tensor
    clock: Tensor | None = None
    shift: int = 0


class KVLayer(CacheLayerMixin):
    """Every key and value, in memory that grows by an eighth; the base of the other layers.

    ``update`` returns the *new* keys and values only; a policy reads the past from the layer.

    Args:
        window: of the model's own, outside which no later token sees: an eighth more at most is
            kept (and a prompt, until the token after it).

    Attributes:
        seen: columns fed, padding included, whatever is still held; the positions of new tokens
            follow from it.
        starts: columns of padding at the start of each row; None where there is none. The hook
            sets it before the layer is fed.
        keys, values: ``[B,S,G,K]``.
        clock: int64 ``[1]`` on the device, what was seen before the token that is decoded. While it
            is set, a token's launches depend on no number of the host, so that they can be recorded
            and repeated; there must be room (:meth:`reserve`) and no padding.
    """

    is_sliding = False
    _keys: Rows
    _values: Rows

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self._window = window
        self._clear()

    def _clear(self) -> None:
        """Everything as at the start; what a subclass holds besides, it clears here too."""
        self.seen = 0
        self.starts: list[int] | None = None
        self.clock: Tensor | None = None
        self._keys, self._values = Rows(), Rows()
        self.is_initialized = False

    # transformers sets and reads `keys` and `values` as attributes; here they are views.
    @property
    def keys(self) -> Tensor:
        return self._keys.data

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            self._keys.replace(value)

    @property
    def values(self) -> Tensor:
        return self._values.data

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            self._values.replace(value)

    @property
    def compressed(self) -> bool:
        """Whether a prompt was compressed: text after it is attended to as answers are."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes allocated for this layer."""
        return self._keys.nbytes + self._values.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take ``[B,G,T,K]``, the layout of transformers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.store(key_states.transpose(1, 2), value_states.transpose(1, 2))
        return key_states, value_states

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep the new ``k [B,T,G,K]`` and ``v [B,T,G,V]``, which ``seen`` counts already."""
        if self._window is not None and self.clock is None:
            over = self._keys.length - (self._window - 1)
            if over > max(64, self._window // 8):
                self._keys.drop(over)
                self._values.drop(over)
        if k.shape[1] == 1 and self._keys.length:
            self._append(k, v)
        else:
            self._keys.append(k)
            self._values.append(v)

    def _append(self, k: Tensor, v: Tensor, **more: Any) -> None:
        """One token, in place."""
        memory = self._keys.extend(1), self._values.extend(1)
        at = self._keys.length - 1
        append(k, v, *memory, at if self.clock is None else self._shift, self.clock, **more)

    @property
    def _shift(self) -> int:
        """What dropped tokens take from the index of the others."""
        return self._keys.length - self.seen

    def held(self) -> Held:
        """The keys and values of a token that is decoded."""
        if self.clock is None:
            return Held(self.keys, self.values)
        return Held(self._keys.memory, self._values.memory, self.clock, self._shift)

    def reserve(self, n: int) -> None:
        """Make room for ``n`` more tokens."""
        self._keys.reserve(n)
        self._values.reserve(n)

    def advance(self) -> None:
        """Count a token that a repeated launch has stored."""
        self.seen += 1
        self._keys.extend(1)
        self._values.extend(1)

    def row(self, b: int) -> KVLayer:
        """Row ``b`` without its padding, as a plain layer that shares this one's memory."""
        alone, start = KVLayer(), (self.starts or [0] * (b + 1))[b]
        alone.seen = self.seen - start
        dropped = self.seen - self.keys.shape[1]
        alone._keys = Rows(self.keys[b : b + 1, max(start - dropped, 0) :])
        alone._values = Rows(self.values[b : b + 1, max(start - dropped, 0) :])
        return alone

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows ``rows``, in that order."""
        self._keys.select(rows)
        self._values.select(rows)
        if self.starts is not None:
            self.starts = [self.starts[b] for b in rows.tolist()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.seen:
            self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.select(torch.arange(self._batch, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.select(torch.arange(self._batch).repeat_interleave(repeats))

    @property
    def _batch(self) -> int:
        return self.keys.shape[0]


class PolicyCache(Cache):
    """The layers that a policy chose, one per layer of the model.

    Attributes:
        skipped: tokens of the prompt that no layer was fed, as the policy read another text in its
            place; they count as seen.
    """

    def __init__(self, layers: Sequence[KVLayer]) -> None:
        super().__init__(layers=list(layers))
        self.skipped = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) + self.skipped

    def reset(self) -> None:
        super().reset()
        self.skipped = 0

    @property
    def held(self) -> list[KVLayer]:
        return cast(list[KVLayer], self.layers)

    @property
    def place(self) -> tuple[int]:
        return (self.held[0].seen,)

    @property
    def steady(self) -> bool:
        return True

    def reserve(self, n: int) -> None:
        """Make room for ``n`` more tokens."""
        for layer in self.held:
            layer.reserve(n)

    def advance(self) -> None:
        """Count a token that repeated launches have stored."""
        for layer in self.held:
            layer.advance()

    @contextmanager
    def counted_by(self, clock: Tensor) -> Iterator[None]:
        """Within, the token that is decoded is stored and read by ``clock`` (int64 ``[1]``, on the
        device), not by the host's count."""
        for layer in self.held:
            layer.clock = clock
        try:
            yield
        finally:
            for layer in self.held:
                layer.clock = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(layer.nbytes for layer in self.held)
