"""LongHeads: each head reads a few chunks of a long text, numbered as in a short one.

Lu et al. 2024, LongHeads: Multi-Head Attention is Secretly a Long Context Processor, arXiv
2402.10685.

Legend: T new tokens of one row, n those of them in a piece, H query heads, G key heads, K head dim;
l tokens in a chunk, C chunks, P chunks that a token attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import mask
from subquad.caches.chunks import ChunkLayer
from subquad.ops import checks
from subquad.ops.attention import attention, merge
from subquad.policies.base import Call, Policy, Site
from subquad.policies.parts.dispatch import dispatch

PIECE = 1 << 25  # elements of rotated queries at once
SCORES = 1 << 24  # scores of chunks at once


@dataclass(frozen=True)
class LongHeads(Policy):
    """Beyond ``length`` tokens each head and token attends to ``length / chunk`` chunks of the
    text: the first, the last two, and those whose summary fits the query best. Their tokens are
    numbered through, so that no distance exceeds what the model was trained on.

    Attributes:
        chunk: l; length: P l, the most tokens attended to, not above the trained length.
        after: tokens that are read by plain attention before that; None for ``length``.
        exclude_self: as the authors' code has it: a token of a prompt does not see itself, and at a
            chunk's last token decoding drops the chunk before it.
    """

    late_rope: ClassVar[bool] = True

    chunk: int = 256
    length: int = 4096
    after: int | None = None
    exclude_self: bool = False

    def __post_init__(self) -> None:
        checks.positive("chunk", self.chunk)
        checks.positive("length", self.length)
        if self.after is not None:
            checks.positive("after", self.after, zero=True)
        if self.length % self.chunk or self.length < 4 * self.chunk:
            raise ValueError(
                f"length must be a multiple of chunk={self.chunk} and 4 of it or more, "
                f"got {self.length}"
            )

    @property
    def chunks(self) -> int:
        """P."""
        return self.length // self.chunk

    def layer(self, site: Site) -> ChunkLayer:
        return ChunkLayer()

    def prefill(self, call: Call) -> Tensor:
        o = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        for b, row in enumerate(call.rows()):
            if T := row.q.shape[1]:
                o[b, -T:] = self._row(row)
        return o

    def decode(self, call: Call) -> Tensor:
        return self.prefill(call)

    def _row(self, call: Call) -> Tensor:
        """``o [T,H,V]`` of a row without padding."""
        T, l = call.q.shape[1], self.chunk
        before = call.layer.seen - T
        if call.site.window is not None:  # never sees far
            return self._plain(call, T)
        self._summarise(call)
        after = self.length if self.after is None else self.after
        done = min(max(after - before - (T == 1 and self.exclude_self), 0), T)
        if T == 1 and not done:
            return self._token(call)
        outs = [self._plain(call, done)] if done else []
        most = PIECE * (1 + 3 * call.q.is_cuda) // (call.q[0, 0].numel() * self.chunks)
        most = max(l, most // l * l)
        text = None
        if T - done > l:  # a prompt reads nearly all chunks, piece by piece: they are rotated once
            text = self._chunks(call, torch.arange(-(-call.layer.seen // l), device=call.q.device))
        while done < T:
            # At once go tokens that have as many chunks to choose from.
            start = before + done
            few = start // l + 1 < self.chunks
            n = min(l - start % l if few else most, T - done)
            outs.append(self._piece(call, done, n, text))
            done += n
        return torch.cat(outs)

    def _plain(self, call: Call, n: int) -> Tensor:
        """The first n new tokens by plain attention at true positions."""
        before = call.layer.seen - call.q.shape[1]
        first, m = 0, mask.causal()
        if call.site.window is not None:
            first = max(before + 1 - call.site.window, 0)
            m = m & mask.window(call.site.window - 1)
        end = before + n
        place = torch.arange(first, end, device=call.q.device)[None]
        k, v = call.layer.keys[:, first:end], call.layer.values[:, first:end]
        q = call.rotate(call.q[:, :n], place[:, -n:])
        if call.tally is not None:
            call.count(m.area(n, end - first) * call.site.heads)
        return attention(q, call.rotate(k, place), v, m, scale=call.scale)[0]

    def _summarise(self, call: Call) -> None:
        """Note the summaries of the chunks that the new tokens fill up."""
        layer, l = call.layer, self.chunk
        assert isinstance(layer, ChunkLayer)
        note = layer.notes[0]
        q = call.q[0] if note.queries is None else torch.cat([note.queries, call.q[0]])
        done = layer.seen - len(q)
        full = len(q) // l
        if full:
            own = slice(done, done + full * l)
            q, note.queries = q[: full * l].unflatten(0, (full, l)), q[full * l :].clone()
            k, v = (x[0, own].unflatten(0, (full, l)) for x in (layer.keys, layer.values))
            note.summaries.append(self.summaries(call, q, k, v)[None])
        else:
            note.queries = q.clone()

    def summaries(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One key for each chunk and head, ``[C,H,K]``, of full chunks ``[C,l,*,K]``: the chunk's
        keys, weighted by how much the mean of what it says to itself attends to them."""
        place = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
        q, k = call.rotate(q, place), call.rotate(k, place)
        said = attention(q, k, v, scale=call.scale).mean(1, keepdim=True)
        return attention(said, k, k, scale=call.scale)[:, 0]

    def _piece(
        self, call: Call, done: int, n: int, text: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """New tokens ``done .. done + n - 1`` over their chosen chunks, ``[n,H,V]``: those at the
        end, the first, and what each head chose, merged. ``text`` is that of all chunks.

        A query that stands ``d`` chunks after a chosen chunk, and at r in its own, is rotated to
        ``d l + r`` and that chunk's keys to 0..l-1: so keys are rotated once for all queries.
        """
        l, q = self.chunk, call.q[:, done : done + n]
        start = call.layer.seen - call.q.shape[1] + done
        t = start + torch.arange(n, device=q.device)
        r = (t % l)[None]
        chosen = min(self.chunks, start // l + 1)
        tail = min(2, chosen)  # chunks at the end
        lead = min(1, chosen - tail)  # the very first one
        free = chosen - tail - lead
        parts = [self._tail(call, call.rotate(q, (tail - 1) * l + r), start, tail)]
        if lead:
            k, v = self._chunks(call, torch.zeros_like(t[:1]))
            away = call.rotate(q, (chosen - 1) * l + r)
            o, lse = attention(away, k, v, scale=call.scale, return_lse=True)
            parts.append((o[0], lse[0]))
        if free:
            index = self._choose(call, q[0], start, tail, free)
            if text is None:
                used, index = index.unique(return_inverse=True)
                k, v = self._chunks(call, used)
            else:
                k, v = (x[: (start + n - 1) // l + 1] for x in text)
            away = torch.arange(tail + free - 1, tail - 1, -1, device=q.device)[:, None] * l + r
            turned = call.rotate(q.expand(free, -1, -1, -1), away)
            parts.append(dispatch(turned, index.permute(2, 0, 1), k, v, scale=call.scale))
        if call.tally is not None:
            blind = n * (self.exclude_self and call.q.shape[1] > 1)
            call.count(call.site.heads * (n * (chosen - 1) * l + r.sum() + n - blind))
        return merge([(o[None], lse[None]) for o, lse in parts])[0][0]

    def _token(self, call: Call) -> Tensor:
        """The one new token over its chosen chunks, ``[1,H,V]``, by copies of their keys: few
        launches, as a token's time is mostly theirs."""
        l, (H, G), device = self.chunk, (call.q.shape[2], call.k.shape[2]), call.q.device
        t = call.layer.seen - 1
        lone = self.exclude_self and t % l == l - 1
        chosen = min(self.chunks - lone, t // l + 1)
        tail = min(1 if lone else 2, chosen)
        lead = min(1, chosen - tail)
        free = chosen - tail - lead
        ends = torch.arange(lead, device=device), torch.arange(-tail, 0, device=device) + t // l + 1
        index = [x.expand(H, -1) for x in ends]
        if free:
            index.insert(1, self._choose(call, call.q[0], t, tail, free)[0])
        tokens = torch.cat(index, -1)[..., None] * l + torch.arange(l, device=device)
        n = (chosen - 1) * l + t % l + 1
        tokens, head = tokens.flatten(1)[:, :n].T, torch.arange(H, device=device) * G // H
        k, v = (x[0, tokens, head][None] for x in (call.layer.keys, call.layer.values))
        place = torch.arange(n, device=device)[None]
        q, k = call.rotate(call.q, place[:, -1:]), call.rotate(k, place)
        call.count(H * n)
        return attention(q, k, v, scale=call.scale)[0]

    def _chunks(self, call: Call, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, rotated to 0..l-1, and values of the chunks ``index [C]``, ``[C,l,G,K]`` each,
        zeros behind the end."""
        tokens = index[:, None] * self.chunk + torch.arange(self.chunk, device=index.device)
        there = tokens < call.layer.seen
        k, v = (
            x[0, tokens.clamp_max(call.layer.seen - 1)].masked_fill(~there[..., None, None], 0)
            for x in (call.layer.keys, call.layer.values)
        )
        place = torch.arange(self.chunk, device=index.device).expand(len(index), -1)
        return call.rotate(k, place), v

    def _tail(self, call: Call, q: Tensor, start: int, chunks: int) -> tuple[Tensor, Tensor]:
        """The rotated ``q [1,n,H,K]`` from ``start`` on over what came before in its own chunk and,
        with ``chunks`` 2, over the chunk before that."""
        l, n = self.chunk, q.shape[1]
        first, last = start // l, (start + n - 1) // l
        index = torch.arange(first - chunks + 1, last + 1, device=q.device)
        tokens = (index[0] * l + torch.arange(len(index) * l, device=q.device)).clamp_max(
            call.layer.seen - 1
        )
        windows = [
            x[0, tokens].unfold(0, chunks * l, l).movedim(-1, 1)
            for x in (call.layer.keys, call.layer.values)
        ]
        place = torch.arange(chunks * l, device=q.device).expand(len(index) - chunks + 1, -1)
        k, v = call.rotate(windows[0], place), windows[1]
        m = mask.causal()
        if self.exclude_self and call.q.shape[1] > 1:
            m = m & ~mask.window(0)
        lead, count = start % l, last - first + 1
        if count == 1:
            offset = (chunks - 1) * l + lead
            o, lse = attention(q, k, v, m, scale=call.scale, offset=offset, return_lse=True)
            return o[0], lse[0]
        q = F.pad(q, (0, 0, 0, 0, lead, count * l - lead - n)).unflatten(1, (count, l))[0]
        o, lse = attention(q, k, v, m, scale=call.scale, return_lse=True)
        return o.flatten(0, 1)[lead : lead + n], lse.flatten(0, 1)[lead : lead + n]

    def _choose(self, call: Call, q: Tensor, start: int, tail: int, n: int) -> Tensor:
        """For each query and head, ``q [T,H,K]`` from ``start`` on and before rotation, the n best
        of the chunks between the first and its last ``tail``, rising: int ``[T,H,n]``."""
        layer = call.layer
        assert isinstance(layer, ChunkLayer)
        C = (start + len(q) - 1) // self.chunk - tail
        # What is compared is not rounded: of thousands of chunks many score nearly the same.
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        summaries = layer.notes[0].summaries.data[0, 1 : C + 1].to(wide)
        chunk = torch.arange(1, C + 1, device=q.device)
        last = (start + torch.arange(len(q), device=q.device)) // self.chunk - tail
        step, out = max(1, SCORES // (C * q.shape[1])), []
        for i in range(0, len(q), step):
            score = torch.einsum("thk,chk->thc", q[i : i + step].to(wide), summaries)
            hidden = chunk > last[i : i + step, None, None]
            best = score.masked_fill_(hidden, -torch.inf).topk(n, -1, sorted=False).indices
            out.append(best.sort(-1).values + 1)
        return torch.cat(out)
