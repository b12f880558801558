"""The causal depthwise short convolution in front of q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import checks


class ShortConv(nn.Module):
    """Causal depthwise convolution over the tokens, then an activation.

    ``y[t] = act(b + sum_j w[:, j] x[t - size + 1 + j])``, with zeros before the start of each
    sequence.

    Args:
        channels: D.
        size: kernel size (4 in most systems).
        bias: whether to add a bias.
        activation: "silu" or None.
    """

    def __init__(
        self, channels: int, size: int = 4, *, bias: bool = False, activation: str | None = "silu"
    ) -> None:
        super().__init__()
        checks.positive("conv_size", size)
        checks.one_of("activation", activation, ("silu", None))
        self.size = size
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(
        self, x: Tensor, past: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x [B,T,D]`` after ``past [N,size-1,D]`` (zeros where None).

        Returns:
            ``y [B,T,D]`` and the last ``size - 1`` inputs of each sequence, ``[N,size-1,D]``.
        """
        if cu_seqlens is not None:
            return self._packed(x, past, cu_seqlens)
        if past is None:
            past = x.new_zeros(x.shape[0], self.size - 1, x.shape[2])
        rows = torch.cat([past.to(x.dtype), x], 1)
        return self._convolve(rows), rows[:, rows.shape[1] - self.size + 1 :]

    def _convolve(self, rows: Tensor) -> Tensor:
        weight = self.weight.to(rows.dtype)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        y = F.conv1d(rows.mT, weight[:, None], bias, groups=weight.shape[0]).mT
        return F.silu(y) if self.activation == "silu" else y

    def _packed(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Put each sequence's past before it, convolve all at once, drop the seams."""
        N, pad = cu_seqlens.numel() - 1, self.size - 1
        if past is None:
            past = x.new_zeros(N, pad, x.shape[2])
        steps = torch.arange(x.shape[1], device=x.device)
        which = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
        place = steps + (which + 1) * pad
        starts = cu_seqlens[:-1, None] + torch.arange(N, device=x.device)[:, None] * pad
        rows = x.new_empty(x.shape[1] + N * pad, x.shape[2])
        rows = rows.index_copy(0, place, x[0])
        if pad:
            seams = (starts + torch.arange(pad, device=x.device)).flatten()
            rows = rows.index_copy(0, seams, past.to(x.dtype).flatten(0, 1))
        y = self._convolve(rows[None])[:, place - pad]
        ends = cu_seqlens[1:, None] + (torch.arange(N, device=x.device)[:, None] + 1) * pad
        last = (ends - pad + torch.arange(pad, device=x.device)).flatten()
        return y, rows[last].view(N, pad, -1)
