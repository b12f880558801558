"""Keys and values of one layer of a pretrained model, as transformers caches them.

Legend: B batch, T new tokens, S cached entries, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Rows:
    """A tensor ``[B,S,...]`` that grows along axis 1 in place, an eighth at a time."""

    def __init__(self, data: Tensor | None = None) -> None:
        self._memory = data
        self.length = 0 if data is None else data.shape[1]

    @property
    def data(self) -> Tensor:
        """``[B,S,...]``, a view of what is filled."""
        assert self._memory is not None, "nothing appended yet"
        return self._memory[:, : self.length]

    @property
    def nbytes(self) -> int:
        return 0 if self._memory is None else self._memory.untyped_storage().nbytes()

    def append(self, x: Tensor) -> None:
        """Add ``x [B,T,...]``."""
        end = self.length + x.shape[1]
        if self._memory is None or end > self._memory.shape[1]:
            # A first (prompt-sized) allocation is exact; later ones leave room for an eighth more.
            room = end if self._memory is None else end + max(64, end // 8)
            grown = x.new_empty(x.shape[0], room, *x.shape[2:])
            if self._memory is not None:
                grown[:, : self.length] = self.data
            self._memory = grown
        self._memory[:, self.length : end] = x
        self.length = end

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
        if self._window is not None:
            over = self._keys.length - (self._window - 1)
            if over > max(64, self._window // 8):
                self._keys.drop(over)
                self._values.drop(over)
        self._keys.append(k)
        self._values.append(v)

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
    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(layer.nbytes for layer in self.held)
