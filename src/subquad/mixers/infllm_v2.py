"""InfLLM-V2: dense attention that turns sparse on long texts, each token choosing key blocks.

Source: Zhao et al., "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long
Adaptation", arXiv 2509.24663; pooling and masking as in the authors' kernels.

Legend: N rows, T tokens, S tokens with the past, H query heads, G key/value heads, K head dim,
M pooled windows.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import mask as masks
from subquad.mixers.base import Context
from subquad.mixers.parts.past import Span
from subquad.mixers.parts.rotary import rotate
from subquad.mixers.softmax import Softmax, ramp
from subquad.ops import checks, select
from subquad.ops.attention import attention
from subquad.ops.attention.chosen import chosen

MASSES = 1 << 24  # window masses held at once


class InfLLMv2(Softmax):
    """Causal softmax; from ``dense_len`` tokens on each token reads ``topk + local`` blocks only.

    A block's score is the largest of the softmax masses, summed over the heads of a key head, that
    fall on the windows (means of ``block / 2`` keys, ``block / 4`` apart) that touch it. Kept are
    the first blocks, the token's own and the ``local`` before it, and the best others. All heads of
    a key head share the choice. No parameter is added and no gradient goes through the choice.

    Args:
        block: tokens in a block, a multiple of 4.
        init: first blocks, always kept.
        local: blocks before the token's own that are always kept.
        topk: the init blocks, the own one and those chosen, together.
        dense_len: tokens (the past included) from which attention is sparse.
        approximate: normalise the masses by windows four times as long (a quarter more work
            instead of twice as much), as the paper does.
        nope: choose by unrotated queries and keys.
        out_gate: multiply what the heads read by ``sigmoid(Wg x)``, before the output projection.
        logit_scaling: a; outside training, query t (from 0) is multiplied by
            ``log(t + a) / log(a)``; None for none. Chen et al., arXiv 2601.22156, equation 11.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")
    FOREIGN: ClassVar[Mapping[str, str]] = {"o_gate.weight": "g_proj.weight"}
    past = ()

    def __init__(
        self,
        *,
        dim: int,
        block: int = 64,
        init: int = 1,
        local: int = 32,
        topk: int = 64,
        dense_len: int = 8192,
        approximate: bool = True,
        nope: bool = False,
        out_gate: bool = False,
        logit_scaling: float | None = None,
        **options: Any,
    ) -> None:
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to local and init, got {sorted(options)}")
        super().__init__(dim=dim, **options)
        checks.positive("block", block)
        checks.divides("block windows", 4, "block", block)
        for name, value in (("init", init), ("local", local), ("dense_len", dense_len)):
            checks.positive(name, value, zero=True)
        if topk < init + 1:
            raise ValueError(f"topk must hold the init blocks and the own one, got {topk}")
        if nope and self.rope_theta is None:
            raise ValueError("nope needs rotated keys, got rope_theta=None")
        self.block, self.init, self.local, self.topk = block, init, local, topk
        self.dense_len, self.approximate, self.nope = dense_len, approximate, nope
        if logit_scaling is not None and not logit_scaling > 1:
            raise ValueError(f"logit_scaling must be above 1 or None, got {logit_scaling}")
        self.logit_scaling = logit_scaling
        width = self.heads * self.head_dim
        self.g_proj = nn.Linear(dim, width, bias=False) if out_gate else None

    @property
    def kept(self) -> int:
        """Blocks that a token reads."""
        return self.topk + self.local

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        q, k, v = self.qkv(x, context)
        if self.logit_scaling is not None and not self.training:
            a = self.logit_scaling
            factor = (context.positions + a).log() / math.log(a)
            q = q * factor[..., None, None].to(q.dtype)
        span = Span(context, {"k": k, "v": v})
        q, k, v = span.rows(q), span["k"], span["v"]
        texts = list(self._texts(span, context, q.shape[1]))
        pooled = [self._pool(k[text.keys], context.past("pooled"), text) for text in texts]
        if max(text.seen + q[text.queries].shape[1] for text in texts) < self.dense_len:
            o = attention(q, k, v, span.mask(), scale=self.scale, cu_seqlens=span.cu_seqlens)
        else:
            o = torch.zeros_like(q)
            for text, windows in zip(texts, pooled):
                o[text.queries] = self._attend(q[text.queries], k[text.keys], v[text.keys], windows)
        longest = max(windows.shape[1] for windows in pooled)
        rows = [F.pad(t, (0, 0, 0, 0, 0, longest - t.shape[1])) for t in pooled]
        state = ChainMap({"pooled": torch.cat(rows)}, span.state())  # type: ignore[arg-type]
        o = span.tokens(o)
        if self.g_proj is not None:
            o = o * torch.sigmoid(self.g_proj(x)).view_as(o)
        return o, state

    def _texts(self, span: Span, context: Context, T: int) -> Iterator[_Text]:
        """The sequences of a call, each of its own length; one for all rows where they agree."""
        every, S = slice(None), span["k"].shape[1]
        if span.cu_seqlens is not None:
            for a, b in pairwise(span.cu_seqlens.tolist()):
                yield _Text((every, slice(a, b)), (every, slice(a, b)), every, 0)
        elif span.pad is None:
            yield _Text((every, every), (every, every), every, S - T)
        else:
            ends = zip(context.seen.tolist(), context.seen_after.tolist())
            for n, (seen, after) in enumerate(ends):
                row = slice(n, n + 1)
                queries = row, slice(T - after + seen, T)
                yield _Text(queries, (row, slice(S - after, S)), row, seen)

    @torch.no_grad()
    def _pool(self, k: Tensor, past: Tensor | None, text: _Text) -> Tensor:
        """The complete windows ``[N,M,G,K]`` of keys ``[N,S,G,K]``."""
        size, stride = self.block // 2, self.block // 4
        held = max(0, (text.seen - size) // stride + 1)
        tail = k[:, held * stride :]
        new = select.pool(self._unrotated(tail, held * stride), size, stride=stride)
        return new if past is None else torch.cat([past[text.row, :held], new], 1)

    def _unrotated(self, x: Tensor, first: int) -> Tensor:
        """``x [N,T,*,K]`` as it was before its rotation, where ``nope`` asks for that."""
        if not self.nope:
            return x
        back = -torch.arange(first, first + x.shape[1], device=x.device)[None]
        return rotate(x, back, self._frequencies(x), layout=self.rope_layout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, windows: Tensor) -> Tensor:
        if q.shape[1] == 0:
            return q
        if k.shape[1] < self.dense_len:
            return attention(q, k, v, masks.causal(), scale=self.scale)
        index = self.choose(q, windows, k.shape[1])
        return chosen(q, k, v, index, self.block, scale=self.scale)

    @torch.no_grad()
    def choose(self, q: Tensor, windows: Tensor, tokens: int) -> Tensor:
        """The blocks that each query reads.

        Args:
            q: ``[N,T,H,K]``, the last T of ``tokens`` tokens.
            windows: ``[N,M,G,K]``, the pooled keys.

        Returns:
            int32 ``[N,G,T,n]``, rising, -1 at the end.
        """
        size, stride, (N, T) = self.block // 2, self.block // 4, q.shape[:2]
        by = None
        if self.approximate:  # windows four times as long are means of every second one
            coarse = windows[:, :0]
            if windows.shape[1] >= 7:
                coarse = windows.unfold(1, 7, 4)[..., ::2].mean(-1)
            by = coarse, 4 * size, 4 * stride
        q = self._unrotated(q, tokens - T)
        step = max(1, MASSES // max(1, N * windows.shape[2] * windows.shape[1]))
        parts = []
        for t in range(0, T, step):
            part, first = q[:, t : t + step], tokens - T + t
            mass = select.window_mass(
                part, windows, size, stride, by=by, scale=self.scale, offset=first
            )
            index = select.top(
                block_scores(mass, -(-tokens // self.block)),
                self.kept,
                size=self.block,
                rows=1,
                sinks=self.init,
                local=self.local + 1,
                offset=first,
            )
            parts.append(index)
        return torch.cat(parts, 2)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        windows = max(0, (T - self.block // 2) // (self.block // 4) + 1)
        return (2 * T + windows) * self.kv_heads * self.head_dim * dtype.itemsize

    def pairs(self, T: int) -> int:
        """A scored window counts half: it has no value."""
        if self.dense_len > T:
            return super().pairs(T)
        size, stride = self.block // 2, self.block // 4
        scored = sum(
            masks.block_band(0, None, far, 1, shift=1 - wide, key_shift=0).area(T, n, 0)
            for wide, far in [(size, stride), (4 * size, 4 * stride)][: 1 + self.approximate]
            if (n := (T - wide) // far + 1) > 0
        )
        whole, rest = divmod(T, self.block)
        before = ramp(whole, self.kept) - whole  # blocks kept beside a block's own, summed
        read = self.block**2 * before + rest * self.block * min(whole, self.kept - 1)
        return read + whole * ramp(self.block, self.block) + ramp(rest, rest) + scored // 2


class _Text(NamedTuple):
    """A sequence in a call: where its queries and keys lie, its rows of the state, and how many of
    its tokens came before."""

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    row: slice
    seen: int


def block_scores(mass: Tensor, blocks: int) -> Tensor:
    """The largest mass among the windows that touch each block.

    Args:
        mass: ``[...,M]`` of windows half a block long and a quarter apart: window ``4 b - 1`` is
            the first that reaches into block b, ``4 b + 3`` the last.

    Returns:
        ``[...,blocks]``, -inf where a block has no window.
    """
    right = 4 * blocks - mass.shape[-1]
    return F.pad(mass, (1, right), value=-torch.inf).unfold(-1, 5, 4).amax(-1)
