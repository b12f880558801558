"""Titans: a memory that learns while reading, alone (LMM) or beside attention (MAC, MAG, MAL).

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663,
sections 3 and 4; the "library" form is that of lucidrains' titans-pytorch.

Legend: B batch, T tokens, C dim, H heads, d head width, N sequences, P persistent tokens.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.neural_memory import LibraryMemory, NeuralMemory
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.segments import SegmentAttention
from subquad.mixers.softmax import Softmax
from subquad.ops import checks
from subquad.ops.layer.activation import ACTIVATIONS
from subquad.state import State

VARIANTS = ("lmm", "mac", "mag", "mal", "library")


class Titans(Mixer):
    """The memory, and where it stands.

    ``lmm``: ``y = M(x~)``, ``x~ = [P, x]``. ``mag``: ``y = SWA(x~) (x) M(x~)``, P always visible.
    ``mal``: ``y = SWA(M(x~))``. ``mac``, in segments: ``y = a (x) M(a)`` with ``a`` attention over
    P, what the memory of the earlier segments holds for each token so far, and the tokens
    themselves. ``a (x) b = rms_norm(a) * sigmoid(rms_norm(b))``. All are causal.

    Args:
        dim: C, the model's width.
        variant: one of the above, or "library" (titans-pytorch's layer).
        heads: H of the memory and of attention; head_dim: d, C / H where None.
        depth: layers of the memory network (1 is a matrix); expand: its inner width, in d.
        residual: whether the network is ``z + layer_norm(layers(z))``; where None, if it is deep.
        chunk: tokens whose gradients are taken at the same weights; None takes all at the first.
        step: tokens that make one step of momentum and forgetting; divides ``chunk``.
        read: whether a token reads the memory "after" or "before" it is written.
        lr_max: the largest step size (it starts at 0.12 of it); where None, 0.1, and 0.01 for a
            residual network, whose norm makes its gradients steeper.
        gain_lr: what of it the norm's gain has. At 1, as published, alike tokens of a chunk can
            make the gain grow without end; 1/d is steadier, and reads less far.
        momentum, forget: whether there are such gates.
        conv_size: kernel of the short convolutions of q, k and v; 0 for none.
        persistent: learned tokens in front (not in "library").
        window: of attention in mag and mal; segment: of mac.
        rope_theta: base of attention's rotary frequencies; None rotates nothing.
        activation, qk_norm, gate_heads: of the "library" form: of q, k and v, a key of
            ``ACTIVATIONS``; a norm of q and k; whether each head's read is gated and the heads are
            mixed, as the library does with more than one.
        norm_eps: of the norms.
    """

    def __init__(
        self,
        *,
        dim: int,
        variant: str = "lmm",
        heads: int = 4,
        head_dim: int | None = None,
        depth: int = 2,
        expand: int = 2,
        residual: bool | None = None,
        chunk: int | None = 16,
        step: int = 1,
        read: str = "after",
        lr_max: float | None = None,
        gain_lr: float = 1.0,
        momentum: bool = True,
        forget: bool = True,
        conv_size: int = 4,
        persistent: int = 4,
        window: int = 64,
        segment: int = 64,
        rope_theta: float | None = 10000.0,
        activation: str | None = None,
        qk_norm: bool = False,
        gate_heads: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim)
        checks.one_of("variant", variant, VARIANTS)
        for name, size in {"heads": heads, "depth": depth, "expand": expand, "step": step}.items():
            checks.positive(name, size)
        for name, size in {"conv_size": conv_size, "persistent": persistent}.items():
            checks.positive(name, size, zero=True)
        if head_dim is None:
            checks.divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        checks.positive("head_dim", head_dim)
        if chunk is not None:
            checks.positive("chunk", chunk)
            checks.divides("step", step, "chunk", chunk)
        checks.one_of("read", read, ("after", "before"))
        residual = depth > 1 if residual is None else residual
        lr_max = (0.01 if residual else 0.1) if lr_max is None else lr_max
        if not lr_max > 0:
            raise ValueError(f"lr_max must be positive, got {lr_max}")
        if not 0 <= gain_lr < math.inf:
            raise ValueError(f"gain_lr must be finite and not negative, got {gain_lr}")
        if activation is not None:
            checks.one_of("activation", activation, ACTIVATIONS)
        if variant == "library" and not gate_heads and heads * head_dim != dim:
            raise ValueError(f"gate_heads must be true where heads * head_dim is not dim={dim}")
        self.variant, library = variant, variant == "library"
        options: dict[str, Any] = {
            "dim": dim, "heads": heads, "head_dim": head_dim, "depth": depth, "expand": expand,
            "residual": residual, "chunk": chunk, "step": step,
            "read": read, "lr_max": lr_max, "gain_lr": gain_lr,
            "momentum": momentum, "forget": forget,
            "conv_size": 0 if library else conv_size, "norm_eps": norm_eps,
        }  # fmt: skip
        if library:
            extra = {"activation": activation, "qk_norm": qk_norm, "gate_heads": gate_heads}
            options |= extra
        self.lmm = LibraryMemory(**options) if library else NeuralMemory(**options)
        self.persistent = None
        if persistent and not library:
            self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim))
        attends: dict[str, Any] = {
            "dim": dim,
            "heads": heads,
            "head_dim": head_dim,
            "rope_theta": rope_theta,
        }
        if variant == "mac":
            self.segments = SegmentAttention(segment=segment, **attends)
        elif variant in ("mag", "mal"):
            checks.positive("window", window)
            sinks = self.tokens_in_front if variant == "mag" else 0
            self.swa = Softmax(window=window, sinks=sinks, **attends)
        if variant in ("mag", "mac"):
            self.attention_norm = GatedRMSNorm(dim, eps=norm_eps)
            self.memory_norm = GatedRMSNorm(dim, eps=norm_eps)

    @property
    def tokens_in_front(self) -> int:
        """N_p, persistent tokens."""
        return 0 if self.persistent is None else len(self.persistent)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """titans-pytorch's names (of NeuralMemory) under ours; there the gain comes first."""
        out, network = {}, []
        for name, t in sorted(weights.items()):
            if name.startswith("memory_model_parameters."):
                network.append(t)
            elif not name.startswith("memory_model."):
                head, _, rest = name.partition(".")
                new = _LIBRARY.get(head)
                tail = rest.removeprefix("0.")
                if head in ("q_norm", "k_norm"):
                    out[f"lmm.{head}"] = t.flatten(0, -2)
                else:
                    out[f"lmm.{new or head}.{tail}"] = t
        network.sort(key=lambda t: t.dim(), reverse=True)
        return out | {f"lmm.memory.{i}": t for i, t in enumerate(network)}

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        past = None if context.state is None else context.state.tensors
        if self.variant == "mac":
            a, m, state = self.segments(x, context, past, self.lmm, self.persistent)
            return self._gated(a, m), state
        opened = Opened(x, context, self.persistent)
        inner = opened.context
        m, state = self.lmm(opened.x, inner, past)
        if self.variant in ("lmm", "library"):
            return opened.close(m), state
        names = ("k", "v", "pad")
        if past is not None:
            kept = {n: past[n] for n in names if n in past}
            inner = replace(inner, state=State(kept, inner.seen))
        a, window = self.swa.mix(m if self.variant == "mal" else opened.x, inner)
        y = opened.close(a if self.variant == "mal" else self._gated(a, m))
        return y, ChainMap(state, window)  # type: ignore[arg-type]

    def _gated(self, a: Tensor, m: Tensor) -> Tensor:
        return self.attention_norm(a) * torch.sigmoid(self.memory_norm(m))

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        held = self.lmm.state_bytes(dtype)
        if self.variant == "mac":
            return held + self.segments.state_bytes(self.lmm, dtype)
        if self.variant in ("mag", "mal"):
            held += self.swa.state_bytes(T + self.tokens_in_front, dtype)
        return held

    def flops(self, T: int) -> int:
        if self.variant == "mac":
            return self.lmm.flops(T) + self.segments.flops(T, self.tokens_in_front, self.lmm)
        whole = T + self.tokens_in_front
        attention = self.swa.flops(whole) if self.variant in ("mag", "mal") else 0
        return self.lmm.flops(whole) + attention


_LIBRARY = {
    "to_queries": "q_proj", "to_keys": "k_proj", "to_values": "v_proj",
    "to_adaptive_step": "lr_proj", "to_momentum": "momentum_proj",
    "to_decay_factor": "forget_proj", "retrieve_gate": "g_proj", "combine_heads": "o_proj",
}  # fmt: skip


class Opened:
    """``x`` with the persistent tokens at the start of each sequence (where x is one), and its
    context; ``close`` takes their outputs away.

    They stand behind the padding, count as tokens seen and have the first positions.
    """

    def __init__(self, x: Tensor, context: Context, front: Tensor | None) -> None:
        self._places: Tensor | None = None
        self.x, self.context = x, context
        if front is None:
            return
        B, T, _ = x.shape
        n = len(front)
        given = None if context.given is None else context.given + n
        if context.state is not None:
            self.context = replace(context, seen=context.seen + n, given=given)
            return
        steps = torch.arange(T, device=x.device)
        padding, cu = context.padding, context.cu_seqlens
        if cu is not None:
            which = torch.searchsorted(cu[1:].contiguous(), steps, right=True)
            self._places = (steps + (which + 1) * n)[None]
            longer = torch.arange(cu.numel(), device=cu.device, dtype=cu.dtype) * n
            cu, total = cu + longer, T + (cu.numel() - 1) * n
        else:
            self._places = (steps + n).expand(B, -1)
            if padding is not None:
                self._places = torch.where(padding, steps, self._places)
            padding = None if padding is None else F.pad(padding, (0, n))
            total = T + n
        source = self._places.new_full((len(self._places), total), -1)
        source = source.scatter(1, self._places, steps.expand_as(self._places))
        holes = source < 0
        rank = (holes.cumsum(1) - 1) % n
        self.x = torch.where(holes[..., None], front.to(x.dtype)[rank], _taken(x, source))
        if given is not None:
            given = torch.where(holes, rank, _taken(given.expand(B, -1), source))
        self.context = replace(context, padding=padding, cu_seqlens=cu, given=given, tokens=total)

    def close(self, y: Tensor) -> Tensor:
        return y if self._places is None else _taken(y, self._places)


def _taken(t: Tensor, index: Tensor) -> Tensor:
    """``t [B,S,...]`` at the places ``index [B,S']``, -1 as 0."""
    rows = torch.arange(len(t), device=t.device)[:, None]
    return t[rows, index.clamp_min(0)]
