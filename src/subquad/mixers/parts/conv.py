"""The causal depthwise short convolution in front of q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad.ops import checks
from subquad.ops.layer import ACTIVATIONS, short_conv
from subquad.parallel.mesh import current
from subquad.parallel.tokens import Before


class ShortConv(nn.Module):
    """Causal depthwise convolution over the tokens, then an activation.

    ``y[t] = act(b + sum_j w[:, 0, j] x[t - size + 1 + j])``, with zeros before the start of each
    sequence. The weight is ``[D,1,size]``, as ``nn.Conv1d`` keeps it.

    Args:
        channels: D.
        size: kernel size (4 in most systems).
        bias: whether to add a bias.
        activation: a key of ``ACTIVATIONS``.
    """

    def __init__(
        self, channels: int, size: int = 4, *, bias: bool = False, activation: str = "silu"
    ) -> None:
        super().__init__()
        checks.positive("conv_size", size)
        checks.one_of("activation", activation, ACTIVATIONS)
        self.size = size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        bound = size**-0.5  # nn.Conv1d's own initialisation
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, past: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x [B,T,D]`` after ``past [N,size-1,D]`` (zeros where None).

        Returns:
            ``y [B,T,D]`` and the last ``size - 1`` inputs of each sequence, ``[N,size-1,D]``, in
            memory of their own. Where the sequences are split over several devices, ``x`` are this
            one's tokens and the rest is said of the whole sequences.
        """
        here = current()
        if here is None:
            return self._alone(x, past, cu_seqlens)
        if self.size == 1:
            rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            return self._convolve(x, None, None), x.new_zeros(rows, 0, x.shape[2])
        before = Before(x, past, cu_seqlens, self.size - 1, here)
        return before.finish(*self._alone(x, before.past, before.cu_seqlens))

    def _alone(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        last = last_inputs(x, past, cu_seqlens, self.size - 1)
        return self._convolve(x, past, cu_seqlens), last

    def _convolve(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return short_conv(
            x, self.weight[:, 0], self.bias, past=past, cu_seqlens=cu_seqlens,
            activation=self.activation,
        )  # fmt: skip


def last_inputs(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs ``[N,count,D]`` of each sequence of ``x [B,T,D]``, those of its
    ``past [N,count,D]`` (zeros where None) before them, in memory of their own."""
    B, T, D = x.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is None and count <= T:
        return x[:, T - count :].clone()
    if past is None:
        past = x.new_zeros(N, count, D)
    if cu_seqlens is None:
        return torch.cat([past[:, T:].to(x.dtype), x], 1)
    # Where a sequence is shorter, token -1 before it is the last of its past.
    at = cu_seqlens[1:, None] + torch.arange(-count, 0, device=x.device)
    token = at - cu_seqlens[:-1, None]
    place = (token + count).clamp(0, count - 1).long()[..., None]
    older = past.to(x.dtype).gather(1, place.expand(-1, -1, D))
    if T == 0:
        return older
    return torch.where(token[..., None] >= 0, x[0, at.clamp(0)], older)
