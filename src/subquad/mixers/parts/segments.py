"""Attention over a segment and over what an older memory says of each of its tokens (Titans MAC).

Legend: B batch, T tokens, N sequences, C dim, s tokens of a segment, w of a slab (a part of one),
H heads, K head width, P persistent tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import mask as masks
from subquad.mixers.base import Context
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.neural_memory import NeuralMemory
from subquad.mixers.parts.norm import l2_norm
from subquad.mixers.softmax import Softmax, ramp
from subquad.ops import checks
from subquad.ops.attention import attention, merge
from subquad.ops.memory import Rows, begin, read

Tensors = dict[str, Tensor]
KEPT = ("k", "v", "hk", "hv")  # of the segment's tokens, and of what was recalled for them


class SegmentAttention(nn.Module):
    """``a_i`` = attention of token i over ``[P, h_j, x_j]``, j <= i in its segment.

    h_j is what the memory of the segments before answers to x_j.

    What it returns beside a is ``M(a)``, the memory written and read token by token.

    Args:
        segment: s; the others are those of :class:`~subquad.mixers.softmax.Softmax`.
    """

    def __init__(
        self, *, dim: int, segment: int, heads: int, head_dim: int, rope_theta: float | None
    ) -> None:
        super().__init__()
        checks.positive("segment", segment)
        self.segment = segment
        self.attention = Softmax(dim=dim, heads=heads, head_dim=head_dim, rope_theta=rope_theta)

    def forward(
        self,
        x: Tensor,
        context: Context,
        past: Mapping[str, Tensor] | None,
        lmm: NeuralMemory,
        front: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensors]:
        """``x [B,T,C]`` to a and M(a), ``[B,T,C]`` each, and the new state's tensors."""
        rows = Rows(
            x.shape[1],
            context.seen,
            padding=context.padding,
            cu_seqlens=context.cu_seqlens,
            period=self.segment,
            begins=past is None,
        )
        state: Tensors = {}
        x = context.zero_padding(x)
        asked = l2_norm(lmm.project("q", x, context, past, state, entry="ask_conv"))
        laid, asked = rows.lay(x), rows.lay(asked)
        if past is None:
            past = self._begin(x, len(context.seen), lmm)
        state = {**past, **state}
        wide = self._front(front, len(context.seen))
        seen, out = context.seen, []
        for at in range(0, laid.shape[1], self.segment):
            slab = slice(at, at + self.segment)
            on = rows.real[:, slab]
            a, m, new = self._slab(laid[:, slab], asked[:, slab], on, seen, state, lmm, wide)
            state, seen = {**state, **new}, seen + on.sum(1)
            out.append(torch.cat([a, m], -1))
        if not out:
            return x, x, state
        a, m = rows.back(torch.cat(out, 1)).chunk(2, -1)
        return a, m, state

    def _begin(self, x: Tensor, N: int, lmm: NeuralMemory) -> Tensors:
        """Nothing read: zeros, and the memory's first weights."""
        H, K = self.attention.heads, self.attention.head_dim
        tensors = {name: x.new_zeros(N, self.segment, H, K) for name in KEPT}
        tensors |= begin(lmm.weights, N, chunk=lmm.chunk, step=lmm.step).named()
        if lmm.conv_size:
            inner = lmm.heads * lmm.head_dim
            empty = x.new_zeros(N, lmm.conv_size - 1, inner)
            tensors |= {f"{name}_conv": empty for name in "qkv"}
        olds = {f"old{i}": tensors[f"weights{i}"] for i in range(len(lmm.memory))}
        return tensors | olds

    def _front(self, front: Tensor | None, N: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the persistent tokens, which stand before the segment."""
        if front is None:
            return None
        n = len(front)
        places = torch.arange(-n, 0, device=front.device)[None]
        k, v = self._kv(front[None], places)
        return k.expand(N, -1, -1, -1), v.expand(N, -1, -1, -1)

    def _kv(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = self.attention.qkv(x, _plain(x, places))
        return k, v

    def _slab(
        self,
        x: Tensor,
        asked: Tensor,
        on: Tensor,
        seen: Tensor,
        state: Tensors,
        lmm: NeuralMemory,
        front: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensors]:
        """The next tokens, all of one segment; ``on [N,w]`` says which places hold one."""
        before = seen % self.segment  # tokens of the segment that were there
        places = (before[:, None] + on.cumsum(1) - 1).clamp_min(0)
        old = [state[f"old{i}"] for i in range(len(lmm.memory))]
        h = lmm.out(read(asked, old), x)
        q, k, v = self.attention.qkv(x, _plain(x, places))
        hk, hv = self._kv(h, places)
        a, kept = self._attend(q, {"k": k, "v": v, "hk": hk, "hv": hv}, on, before, state, front)
        m, written = self._write(a.masked_fill(~on[..., None], 0), on, state, lmm)
        full = on.any(1) & ((seen + on.sum(1)) % self.segment == 0)
        for i, t in enumerate(old):
            ends = full.view(-1, *[1] * (t.dim() - 1))
            written[f"old{i}"] = torch.where(ends, written[f"weights{i}"], t)
        return a, m, {**kept, **written}

    def _attend(
        self,
        q: Tensor,
        new: Tensors,
        on: Tensor,
        before: Tensor,
        state: Tensors,
        front: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensors]:
        """Over the persistent tokens, the recalled and the segment's own; what to keep of it."""
        s, slots = self.segment, torch.arange(self.segment, device=q.device)
        held = slots >= s - before[:, None]
        there = torch.cat([held, on], 1)
        keys = {name: torch.cat([state[name].to(t.dtype), t], 1) for name, t in new.items()}
        mask = masks.causal() & masks.documents(torch.where(there, 0, -1))
        scale = self.attention.scale
        parts = [
            attention(q, keys[f"{p}k"], keys[f"{p}v"], mask, scale=scale, return_lse=True)
            for p in ("", "h")
        ]
        if front is not None:
            k, v = (t.to(q.dtype) for t in front)
            parts.append(attention(q, k, v, masks.full(), scale=scale, return_lse=True))
        o, _ = merge(parts)
        # The last s tokens of each row, at its right: its places in order, the held ones first.
        order = torch.argsort(there.int(), dim=1, stable=True)[:, -s:]
        count = (before + on.sum(1)) % s
        live = (slots >= s - count[:, None])[..., None, None]
        at = torch.arange(len(order), device=q.device)[:, None]
        kept = {name: torch.where(live, t[at, order], 0) for name, t in keys.items()}
        return self.attention.o_proj(o.flatten(-2)), kept

    def _write(
        self, a: Tensor, on: Tensor, state: Tensors, lmm: NeuralMemory
    ) -> tuple[Tensor, Tensors]:
        """Feed ``a [N,w,C]`` to the memory."""
        new: Tensors = {}
        q, k, v = (self._convolved(name, a, on, state, lmm, new) for name in "qkv")
        context = replace(_plain(a, None), padding=~on)
        y, after = lmm.learn(l2_norm(q), l2_norm(k), v, lmm.gates(a), context, state)
        return lmm.out(y, a), {**new, **after}

    def _convolved(
        self, name: str, a: Tensor, on: Tensor, state: Tensors, lmm: NeuralMemory, new: Tensors
    ) -> Tensor:
        """A projection and its convolution where tokens may start anywhere in the slab: the last
        inputs of the call before are moved to stand in front of them."""
        y = lmm.get_submodule(f"{name}_proj")(a)
        if not lmm.conv_size:
            return F.silu(y).unflatten(-1, (lmm.heads, -1))
        conv = lmm.get_submodule(f"{name}_conv")
        assert isinstance(conv, ShortConv)
        past = state[f"{name}_conv"].to(y.dtype)
        first = on.int().argmax(1)  # 0 where there is no token
        end = first + on.sum(1)
        n, w = past.shape[1], y.shape[1]
        rows = torch.cat([past, y], 1)
        at = torch.arange(n + w, device=y.device).expand(len(y), -1)
        source = torch.where(at >= first[:, None] + n, at, (at - first[:, None]).clamp_min(0))
        which = torch.arange(len(y), device=y.device)[:, None]
        rows = rows[which, source]
        z, _ = conv(rows[:, n:], rows[:, :n])
        new[f"{name}_conv"] = rows[which, end[:, None] + torch.arange(n, device=y.device)]
        return z.unflatten(-1, (lmm.heads, -1))

    def state_bytes(self, lmm: NeuralMemory, dtype: torch.dtype) -> int:
        """The segment's keys and values twice, the weights before it, a convolution's inputs."""
        kept = self.segment * 4 * self.attention.heads * self.attention.head_dim
        asked = max(lmm.conv_size - 1, 0) * lmm.heads * lmm.head_dim
        return (kept + asked) * dtype.itemsize + 4 * lmm.heads * lmm.size

    def flops(self, T: int, front: int, lmm: NeuralMemory) -> int:
        """The projections (k and v twice), the recall, and attention over twice the segment."""
        soft = self.attention
        whole, rest = divmod(T, self.segment)
        pairs = whole * ramp(self.segment, self.segment) + ramp(rest, rest)
        sizes = {n: m.weight.numel() for n, m in soft.named_modules() if isinstance(m, nn.Linear)}
        weights = sum(sizes.values()) + sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
        recall = 2 * T * (lmm.heads * lmm.size + 3 * lmm.q_proj.weight.numel())
        return 2 * T * weights + recall + 4 * (2 * pairs + T * front) * soft.heads * soft.head_dim


def _plain(x: Tensor, positions: Tensor | None) -> Context:
    """Rows without a past, at given places."""
    seen = x.new_zeros(len(x), dtype=torch.int64)
    return Context(None, None, None, seen, positions, None, x.shape[1])
