"""Blocks of keys (or queries) as one vector each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import uses_kernels

KINDS = ("mean", "max", "min", "sum")


def pool(x: Tensor, size: int, *, stride: int | None = None, kind: str = "mean") -> Tensor:
    """Pool windows of tokens.

    Args:
        x: ``[B,S,G,K]``.
        size: tokens in a window.
        stride: tokens from window to window. None: blocks of ``size`` that cover every token, the
            last one pooled over the tokens that there are. An int: complete windows only.
        kind: "mean", "max", "min" or "sum", by element.

    Returns:
        ``[B,n,G,K]``, n = ceil(S / size), or floor((S - size) / stride) + 1 (0 where S < size).
        Differentiable.
    """
    checks.one_of("kind", kind, KINDS)
    checks.positive("size", size)
    if x.dim() != 4:
        raise ValueError(f"x must be [B,S,G,K], got shape {list(x.shape)}")
    S = x.shape[1]
    if stride is not None:
        checks.positive("stride", stride)
        if size > S:
            return x[:, :0]
        return _reduce(x.unfold(1, size, stride), -1, kind)
    whole = S // size * size
    blocks = _reduce(x[:, :whole].unflatten(1, (-1, size)), 2, kind) if whole else x[:, :0]
    if whole == S:
        return blocks
    return torch.cat([blocks, _reduce(x[:, whole:], 1, kind)[:, None]], 1)


def means(x: Tensor, size: int, lead: int = 0) -> Tensor:
    """Blocks of ``size`` tokens as their sums over ``size``, what fills up the first and the last
    block counted as zeros.

    Args:
        x: ``[B,T,G,K]``.
        lead: places in the first block before token 0.

    Returns:
        ``[B,ceil((lead + T) / size),G,K]``. Not differentiable.
    """
    with torch.no_grad():
        if by_kernels(x):
            from subquad.ops.select import triton_best

            return triton_best.means(x, size, lead)
        x = F.pad(x, (0, 0, 0, 0, lead, -(lead + x.shape[1]) % size))
        return x.unflatten(1, (-1, size)).mean(2)


def by_kernels(x: Tensor) -> bool:
    """Whether kernels take x ``[B,T,G,K]``: they know no float64."""
    fits = x.dtype in (torch.float16, torch.bfloat16, torch.float32) and x.shape[-1] <= 256
    return fits and x.numel() > 0 and uses_kernels(x)


def _reduce(x: Tensor, dim: int, kind: str) -> Tensor:
    if kind == "max":
        return x.amax(dim)
    if kind == "min":
        return x.amin(dim)
    return x.mean(dim) if kind == "mean" else x.sum(dim)
