"""Keys and values that grow with the tokens: joined to the past, packed, padded, windowed.

Legend: B rows of the input, N sequences (B, or those packed in one row), T tokens of the call,
P tokens of the past, S = P + T, D whatever a token keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.mixers.base import Context
from subquad.ops.attention.token import token
from subquad.parallel import attention
from subquad.parallel.tokens import join

PAD = "pad"  # bool [N,S] among a state's tensors, True where a row holds no token (on its left)
SLACK = 64  # tokens of room that a buffer has at least when it is made


class Span:
    """The past and the new tokens that a call's queries see, each sequence at its row's right.

    A mixer gives what it keeps of the new tokens, takes ``span[name]`` for the whole, and calls::

        o = span.tokens(attention(span.rows(q), ..., span.mask(), cu_seqlens=span.cu_seqlens))

    Packed sequences without a past stay packed; with one they become rows of a common length,
    padded on the left. ``pad`` is None where no row is padded. Of split sequences the tensors are
    this device's own, but with a past: then they are whole, the same on every device.

    Args:
        context: of the mixer's input.
        new: ``[B,T,D...]`` by name, what to keep of every token.
        window: of the past, keep the last ``window`` tokens (None: all)
        sinks: and the first ``sinks``.
        pad: the name of the padding in the state, where a mixer has several spans.
        rows: whether packed sequences become rows at once, also without a past.
    """

    def __init__(
        self,
        context: Context,
        new: Mapping[str, Tensor],
        *,
        window: int | None = None,
        sinks: int = 0,
        pad: str = PAD,
        rows: bool = False,
    ) -> None:
        self.window, self.sinks, self._pad = window, sinks, pad
        self._context = context
        self.cu_seqlens: Tensor | None = None
        self.pad: Tensor | None = None
        self._packing: _Packing | None = None
        past = None if context.state is None else context.state.tensors
        here, self._joined = context.here, False
        if here is not None and past is not None:
            if context.cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None where a split sequence has a past")
            new = {name: join(t, mesh=here) for name, t in new.items()}
            self._joined = True
        self._tokens = context.tokens * (1 if here is None else here.size)
        if past is None and rows and context.cu_seqlens is not None:
            self._packing = packing = _Packing(context.cu_seqlens)
            self.tensors = {name: packing.rows(t) for name, t in new.items()}
            self.pad = packing.pad
        elif past is None:
            self.tensors, self.cu_seqlens, self.pad = dict(new), context.cu_seqlens, context.padding
        elif context.cu_seqlens is not None:
            self._packing = _Packing(context.cu_seqlens)
            self.tensors, self.pad = self._packing.join(past, new, pad)
        elif context.clock is not None:
            self.tensors = {n: past[n].index_copy_(1, context.clock, t) for n, t in new.items()}
        else:
            self.tensors = {name: append(past[name], t) for name, t in new.items()}
            if pad in past:
                fresh = context.seen.new_zeros(len(context.seen), self._tokens, dtype=torch.bool)
                self.pad = append(past[pad], fresh)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, q: Tensor) -> Tensor:
        """The queries ``[B,T,...]`` laid out as the keys are."""
        return q if self._packing is None else self._packing.rows(q)

    def tokens(self, o: Tensor) -> Tensor:
        """What ``rows`` did, undone: outputs ``[N,T',...]`` as ``[B,T,...]``."""
        return o if self._packing is None else self._packing.back(o)

    @property
    def length(self) -> int:
        """S, of the whole sequences where they are split over several devices."""
        held = next(iter(self.tensors.values())).shape[1]
        here = self._context.here
        return held if here is None or self._joined else held * here.size

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """Of the queries ``q``, in rows, to what ``mask`` lets them see of what is here; a token
        in memory with room, to all that it holds."""
        clock = self._context.clock
        alone = q.shape[1] == 1 and self.cu_seqlens is None and self._context.here is None
        if clock is not None or (alone and mask == masks.causal()):
            return token(q, k, v, clock, scale=scale)
        return attention(q, k, v, mask, scale=scale, cu_seqlens=self.cu_seqlens)

    def mask(self) -> Mask:
        """Causal, within the window and the sinks, over the tokens that are there."""
        S = self.length
        mask = masks.causal()
        if self.window is not None and self.window < S:
            mask = masks.window(self.window - 1)
            if self.sinks:
                mask = masks.causal() & (mask | self._sinks(S))
        if self.pad is None:
            return mask
        return mask & masks.documents(torch.where(self.pad, -1, 0))

    def placed(self, part: Mask) -> Mask:
        """``part``, a mask over tokens counted from 0, where each sequence's tokens stand."""
        starts = self.starts
        return part if starts is None else masks.placed(part, starts)

    @property
    def starts(self) -> Tensor | None:
        """int ``[N]``, where each row's token 0 stands (it may be forgotten: then it is negative),
        or ``[1]`` where all rows agree; None where it is 0, as in packed sequences."""
        S = self.length
        if self.cu_seqlens is not None:
            return None
        if self.pad is None:
            past = S - self._tokens
            if self.window is None or past < self.window + self.sinks:
                return None
            return S - self._context.seen_after[:1]
        return S - self._context.seen_after

    def _sinks(self, S: int) -> Mask:
        if self.pad is None:
            return masks.sinks(self.sinks)
        # In padded rows the first tokens stand at different places. Each sink has a document of
        # its own and all other tokens share one, so what two tokens do not share is a sink.
        place = torch.arange(S, device=self.pad.device) - self.pad.sum(1, keepdim=True)
        first = (place >= 0) & (place < self.sinks)
        return ~masks.documents(torch.where(first, place + 1, 0))

    def state(self) -> Mapping[str, Tensor]:
        """The tensors of the state after this call, of the whole sequences where they are split."""
        here = self._context.here
        if here is not None:
            if not here.states:
                return {}
            if not self._joined:
                self.tensors = {name: join(t, mesh=here) for name, t in self.tensors.items()}
                self._joined = True
        if self.cu_seqlens is not None:
            return _Later([*self.tensors, self._pad], self._unpacked)
        tensors = self.tensors if self.pad is None else {**self.tensors, self._pad: self.pad}
        return self._kept(tensors, self.pad)

    def _unpacked(self) -> dict[str, Tensor]:
        assert self.cu_seqlens is not None
        packing = _Packing(self.cu_seqlens)
        tensors = {name: packing.rows(t) for name, t in self.tensors.items()}
        return self._kept({**tensors, self._pad: packing.pad}, packing.pad)

    def _kept(self, tensors: dict[str, Tensor], pad: Tensor | None) -> dict[str, Tensor]:
        """The sinks and the window of each row, or all."""
        if self.window is None:
            return tensors
        first, keep = next(iter(tensors.values())), self.window + self.sinks
        S = first.shape[1]
        if keep >= S:
            return tensors
        if not self.sinks:
            return {name: compact(t[:, S - keep :]) for name, t in tensors.items()}
        slot = torch.arange(keep, device=first.device)
        source = slot + S - keep
        if pad is None:
            source = torch.where(slot < self.sinks, slot, source)
            return {name: t.index_select(1, source) for name, t in tensors.items()}
        start = pad.sum(1, keepdim=True)
        sink = (slot < self.sinks) & (S - start > keep)
        source = torch.where(sink, start + slot, source)
        return {name: take(t, source) for name, t in tensors.items()}


class _Later(Mapping[str, Tensor]):
    """Tensors made when one is first asked for.

    Training drops the state of packed sequences unused, and as rows the short ones would take the
    longest one's memory.
    """

    def __init__(self, names: Sequence[str], make: Callable[[], dict[str, Tensor]]) -> None:
        self._names, self._make = names, make

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return self._make()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Packing:
    """Packed sequences as rows of a common length, each at the right of its row."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff()
        self.width = int(lengths.max())
        steps = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        self.row = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
        self.column = self.width - cu_seqlens[1:][self.row] + steps
        slots = torch.arange(self.width, device=cu_seqlens.device)
        self.hole = (self.width - lengths)[:, None]
        self.pad = slots < self.hole
        self._source = (cu_seqlens[1:, None] - self.width + slots).clamp_min(0)

    def rows(self, x: Tensor) -> Tensor:
        """``[1,T,...]`` to ``[N,width,...]``; what stands at the padding is another's."""
        return x[0][self._source]

    def back(self, rows: Tensor) -> Tensor:
        return rows[self.row, self.column][None]

    def join(
        self, past: Mapping[str, Tensor], new: Mapping[str, Tensor], name: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Past and new rows, the past moved to the right over the padding of the new."""
        first = past[next(iter(new))]
        P = first.shape[1]
        slots = torch.arange(P + self.width, device=first.device)
        source = torch.where(slots >= P + self.hole, slots, (slots - self.hole).clamp_min(0))
        before = past.get(name, first.new_zeros(first.shape[:2], dtype=torch.bool))
        pad = take(torch.cat([before, self.pad], 1), source) | (slots < self.hole)
        common = int(pad.sum(1).min())
        source, pad = source[:, common:], pad[:, common:]
        joined = {
            key: take(torch.cat([past[key], self.rows(t)], 1), source) for key, t in new.items()
        }
        return joined, pad


def take(t: Tensor, index: Tensor) -> Tensor:
    """``t [N,S,...]`` at the places ``index [N,S']`` of each row."""
    return t[torch.arange(len(t), device=t.device)[:, None], index]


def append(past: Tensor, new: Tensor) -> Tensor:
    """``[N,P,D...]`` and ``[N,T,D...]`` joined along the tokens.

    Outside autograd the past's memory is a buffer with room to spare, so that a token costs its own
    size and not the past's; the past is spent.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([past, new], 1)
    end, room = _place(past)
    P, S = past.shape[1], past.shape[1] + new.shape[1]
    if end + new.shape[1] > room:
        buffer = past.new_empty(past.shape[0], S + max(S // 4, SLACK), *past.shape[2:])
        buffer[:, :P] = past
        whole = buffer[:, :S]
    else:
        whole = past.as_strided((past.shape[0], S, *past.shape[2:]), past.stride())
    whole[:, P:] = new
    return whole


def compact(t: Tensor) -> Tensor:
    """``t [N,S,D...]``, copied where it would keep far more memory than it needs."""
    if torch.compiler.is_compiling():
        return t.clone()
    spare = t.untyped_storage().nbytes() - t.nbytes
    slack = 2 * SLACK * t.nbytes // max(t.shape[1], 1)
    return t.clone() if spare > t.nbytes + slack else t


def _place(t: Tensor) -> tuple[int, int]:
    """Where ``t`` ends in its buffer ``[N,room,D...]``, and the room.

    (0, 0) where it is no slice of such a buffer along the tokens, or one that may not be written.
    """
    step = t[0, 0].numel() if t.numel() else 0
    frozen = t.is_inference() and not torch.is_inference_mode_enabled()
    if not step or frozen or not t[0, 0].is_contiguous() or t.stride(1) != step:
        return 0, 0
    room = t.untyped_storage().nbytes() // (t.itemsize * step * t.shape[0])
    if t.stride(0) != room * step or t.storage_offset() % step:
        return 0, 0
    return t.storage_offset() // step + t.shape[1], room
