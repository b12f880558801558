"""The neural memory block: projections around the memory operation.

Legend: B batch, T tokens, C dim, H heads, d head width, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.decay import exempt, widen
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm
from subquad.ops import checks
from subquad.ops.layer.activation import ACTIVATIONS
from subquad.ops.layer.torch import over_windows
from subquad.ops.memory import MemoryState, cost, memory

FLOAT32_EPS = torch.finfo(torch.float32).eps  # of the library's norms


class MovingMean(ShortConv):
    """The mean of the last ``size`` inputs of every channel: a convolution without weights."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        checks.positive("step", size)
        self.size = size

    def _convolve(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        def mean(rows: Tensor) -> Tensor:
            return rows.unfold(1, self.size, 1).mean(-1)

        return over_windows(x, past, cu_seqlens, self.size, mean)


class NeuralMemory(nn.Module):
    """``(rms_norm(y) * sigmoid(Wg x)) Wo`` around the memory's reads y, or the library's form.

    Args: those of :class:`~subquad.mixers.titans.Titans`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        depth: int,
        expand: int,
        residual: bool,
        chunk: int | None,
        step: int,
        read: str,
        lr_max: float,
        gain_lr: float,
        momentum: bool,
        forget: bool,
        conv_size: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.expand = heads, head_dim, expand
        self.chunk, self.step, self.read, self.lr_max = chunk, step, read, lr_max
        self.gain_lr = gain_lr
        self.momentum, self.forget, self.residual = momentum, forget, residual
        inner = heads * head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.conv_size = conv_size
        if conv_size:
            self.q_conv = ShortConv(inner, conv_size)
            self.k_conv = ShortConv(inner, conv_size)
            self.v_conv = ShortConv(inner, conv_size)
        self._gates(dim, heads)
        self.memory = nn.ParameterList(_network(heads, head_dim, depth, expand, residual))
        self._output(dim, inner, norm_eps)

    def _gates(self, dim: int, heads: int) -> None:
        """The step size, the momentum and the forgetting, a number a head.

        theta starts low, since alike tokens of a chunk add up. So does alpha: at a half a few
        tokens would forget everything, and a normed network whose weights fade has gradients that
        grow as they do.
        """
        self.lr_proj = _gate(dim, heads, -2.0)
        if self.momentum:
            self.momentum_proj = _gate(dim, heads, 0.0)
        if self.forget:
            self.forget_proj = _gate(dim, heads, -7.0)

    def _output(self, dim: int, inner: int, norm_eps: float) -> None:
        self.g_proj = nn.Linear(dim, inner, bias=False)
        self.norm = GatedRMSNorm(self.head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(inner, dim, bias=False)

    @property
    def weights(self) -> list[Tensor]:
        """The learned first weights of the network, ``[H,...]``."""
        return list(self.memory)

    def forward(
        self, x: Tensor, context: Context, past: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write and read every token of ``x [B,T,C]``; the new state's tensors, for ``past``."""
        state: dict[str, Tensor] = {}
        q, k, v = self.qkv(x, context, past, state)
        y, after = self.learn(q, k, v, self.gates(x), context, past)
        return self.out(y, x), {**state, **after}

    def learn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, Tensor, Tensor],
        context: Context,
        past: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lr, momentum, decay = gates
        y, after = memory(
            q,
            k,
            v,
            self.weights,
            lr=lr,
            momentum=momentum,
            decay=decay,
            chunk=self.chunk,
            step=self.step,
            when=self.read,  # type: ignore[arg-type]
            gain_lr=self.gain_lr,
            state=None if past is None else MemoryState.of(past, len(self.memory)),
            padding=context.padding,
            cu_seqlens=context.cu_seqlens,
        )
        return y, after.named()

    def qkv(
        self,
        x: Tensor,
        context: Context,
        past: Mapping[str, Tensor] | None,
        state: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[B,T,H,d]`` each, q and k of norm 1; the convolutions' inputs enter ``state``."""
        x = context.zero_padding(x)
        q, k, v = (self.project(name, x, context, past, state) for name in "qkv")
        return l2_norm(q), l2_norm(k), v

    def project(
        self,
        name: str,
        x: Tensor,
        context: Context,
        past: Mapping[str, Tensor] | None,
        state: dict[str, Tensor],
        entry: str | None = None,
    ) -> Tensor:
        """``silu(conv(W x))`` in heads; ``entry`` is the convolution's name in the state."""
        y = self.get_submodule(f"{name}_proj")(x)
        if not self.conv_size:
            return F.silu(y).unflatten(-1, (self.heads, -1))
        entry = entry or f"{name}_conv"
        before = None if past is None else past[entry]
        conv = self.get_submodule(f"{name}_conv")
        y, state[entry] = conv(y, before, context.cu_seqlens)
        return y.unflatten(-1, (self.heads, -1))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, log eta and log (1 - alpha), ``[B,T,H]`` in float32 at least."""
        lr = self.lr_max * torch.sigmoid(widen(self.lr_proj(x)))
        none = torch.full_like(lr, -math.inf)
        momentum = F.logsigmoid(widen(self.momentum_proj(x))) if self.momentum else none
        decay = F.logsigmoid(-widen(self.forget_proj(x))) if self.forget else torch.zeros_like(lr)
        return lr, momentum, decay

    def out(self, y: Tensor, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.g_proj(x)).view_as(y)
        return self.o_proj((self.norm(y) * gate).flatten(-2))

    @property
    def size(self) -> int:
        """Weights of one head's network."""
        return sum(w[0].numel() for w in self.memory)

    def state_bytes(self, dtype: torch.dtype) -> int:
        held = cost.state_bytes(H=self.heads, size=self.size, chunk=self.chunk, step=self.step)
        inputs = max(self.conv_size - 1, 0) * 3 * self.heads * self.head_dim
        return held + inputs * dtype.itemsize

    def flops(self, T: int) -> int:
        """Projections, convolutions and the memory; norms and gates are left out."""
        sizes: dict[str, Any] = {
            "H": self.heads,
            "d": self.head_dim,
            "size": self.size,
            "chunk": self.chunk,
        }
        kinds = ("_proj.weight", "_conv.weight")
        weights = sum(p.numel() for name, p in self.named_parameters() if name.endswith(kinds))
        return 2 * T * weights + cost.flops(B=1, T=T, **sizes)


class LibraryMemory(NeuralMemory):
    """titans-pytorch's form: norms in front, gates a step, a mean instead of a sum in the loss.

    Keys and values come from one norm of x, queries and the output's gates (one a head) from
    another; momentum and forgetting are read from the mean of a step's tokens.
    """

    def __init__(
        self, *, activation: str | None, qk_norm: bool, gate_heads: bool, **options: Any
    ) -> None:
        self.qk_norm, self.gate_heads = qk_norm, gate_heads
        super().__init__(**options)
        self.activation = ACTIVATIONS[activation or "identity"]
        self.mean = MovingMean(self.step)

    def _output(self, dim: int, inner: int, norm_eps: float) -> None:
        self.store_norm = GatedRMSNorm(dim, eps=FLOAT32_EPS)
        self.retrieve_norm = GatedRMSNorm(dim, eps=FLOAT32_EPS)
        if self.qk_norm:
            self.q_norm = nn.Parameter(torch.zeros(self.heads, self.head_dim))
            self.k_norm = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        if self.gate_heads:
            self.g_proj = nn.Linear(dim, self.heads, bias=False)
            self.o_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, context: Context, past: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = context.zero_padding(x)
        stored, asked = self.store_norm(x), self.retrieve_norm(x)
        q, k, v = (
            self.activation(p(t)).unflatten(-1, (self.heads, -1))
            for p, t in ((self.q_proj, asked), (self.k_proj, stored), (self.v_proj, stored))
        )
        if self.qk_norm:
            q = F.rms_norm(q, q.shape[-1:]) * (1 + self.q_norm)
            k = F.rms_norm(k, k.shape[-1:]) * (1 + self.k_norm)
        q, k = q.to(v.dtype), k.to(v.dtype)
        lr = self.lr_max / self.head_dim * torch.sigmoid(widen(self.lr_proj(stored)))
        logits = [widen(p(stored)) for p in self._steps()]
        state: dict[str, Tensor] = {}
        momentum, decay = torch.full_like(lr, -math.inf), torch.zeros_like(lr)
        if logits:
            before = None if past is None else past["gates"]
            means, state["gates"] = self.mean(torch.cat(logits, -1), before, context.cu_seqlens)
            found = list(means.unflatten(-1, (len(logits), -1)).unbind(-2))
            if self.momentum:
                momentum = F.logsigmoid(found.pop(0))
            if self.forget:
                decay = F.logsigmoid(-found.pop(0))
        y, after = self.learn(q, k, v, (lr, momentum, decay), context, past)
        if self.gate_heads:
            y = self.o_proj((y * torch.sigmoid(self.g_proj(asked))[..., None]).flatten(-2))
        else:
            y = y.flatten(-2)
        return y, {**state, **after}

    def _steps(self) -> list[nn.Linear]:
        """The projections of the gates that belong to a step."""
        named = (("momentum_proj", self.momentum), ("forget_proj", self.forget))
        return [self.get_submodule(name) for name, on in named if on]  # type: ignore[misc]

    def state_bytes(self, dtype: torch.dtype) -> int:
        gates = (self.step - 1) * (self.momentum + self.forget) * self.heads
        return super().state_bytes(dtype) + gates * max(4, dtype.itemsize)


def _gate(dim: int, heads: int, bias: float) -> nn.Linear:
    """A gate a head, whose bias is set here and so left by a model's own initialisation."""
    proj = nn.Linear(dim, heads)
    nn.init.constant_(proj.bias, bias)
    proj.bias._no_weight_decay = True  # type: ignore[attr-defined]
    return proj


def _network(heads: int, d: int, depth: int, expand: int, residual: bool) -> list[nn.Parameter]:
    """Xavier-uniform layers, and the gain that makes the network a residual one."""
    widths = [d, *[expand * d] * (depth - 1), d]
    layers = [torch.empty(heads, a, b) for a, b in pairwise(widths)]
    for layer in layers:
        for matrix in layer:
            nn.init.xavier_uniform_(matrix)
    gain = [torch.zeros(heads, d)] if residual else []
    return [exempt(t) for t in (*layers, *gain)]
