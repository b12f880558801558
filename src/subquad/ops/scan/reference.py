"""The definition of the scan, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.layout import segments


def scan(
    x: Tensor, decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _scan(x, decay, state)
    parts = [
        _scan(x[:, rows], decay[:, rows], None if state is None else state[n : n + 1])
        for n, rows in enumerate(segments(cu_seqlens))
    ]
    return torch.cat([h for h, _ in parts], 1), torch.cat([last for _, last in parts])


def _scan(x: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) h_{t-1} + x_t."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if state is None else state.to(wide)
    hs = []
    for t in range(x.shape[1]):
        h = decay[:, t].to(wide).exp() * h + x[:, t].to(wide)
        hs.append(h)
    return (torch.stack(hs, 1).to(x.dtype) if hs else x), h
