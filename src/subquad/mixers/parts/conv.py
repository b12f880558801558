"""The causal depthwise short convolution in front of q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad.mixers.parts.activation import ACTIVATIONS
from subquad.ops import checks
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
            return self._convolve(x), x.new_zeros(rows, 0, x.shape[2])
        before = Before(x, past, cu_seqlens, self.size - 1, here)
        return before.finish(*self._alone(x, before.past, before.cu_seqlens))

    def _alone(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is not None:
            return self._packed(x, past, cu_seqlens)
        if past is None:
            past = x.new_zeros(x.shape[0], self.size - 1, x.shape[2])
        rows = torch.cat([past.to(x.dtype), x], 1)
        return self._convolve(rows), rows[:, rows.shape[1] - self.size + 1 :].clone()

    def _convolve(self, rows: Tensor) -> Tensor:
        """Shifted products: on a CPU they beat F.conv1d, which wants the channels first."""
        weight = self.weight[:, 0].to(rows.dtype)
        T = rows.shape[1] - self.size + 1
        y = rows[:, :T] * weight[:, 0]
        if self.bias is not None:
            y = y + self.bias.to(rows.dtype)
        for j in range(1, self.size):
            y = torch.addcmul(y, rows[:, j : j + T], weight[:, j])
        return ACTIVATIONS[self.activation](y)

    def _packed(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Put each sequence's past before it, convolve all at once, drop the seams."""
        N, pad = cu_seqlens.numel() - 1, self.size - 1
        if past is None:
            past = x.new_zeros(N, pad, x.shape[2])
        steps = torch.arange(x.shape[1], device=x.device)
        which = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
        place = steps + (which + 1) * pad
        starts = cu_seqlens[:-1, None] + torch.arange(N, device=x.device)[:, None] * pad
        seams = (starts + torch.arange(pad, device=x.device)).flatten()
        rows = x.new_empty(x.shape[1] + N * pad, x.shape[2])
        rows = rows.index_copy(0, place, x[0]).index_copy(0, seams, past.to(x.dtype).flatten(0, 1))
        y = self._convolve(rows[None])[:, place - pad]
        return y, rows[seams.view(N, pad) + cu_seqlens.diff()[:, None]]
