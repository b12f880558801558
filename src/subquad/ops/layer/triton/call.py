"""What the operations' launches share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from subquad.ops import kernel


def compiled(kind: tuple[Hashable, ...], run: Callable[[], object]) -> None:
    """See that the kernels of a call of this kind are compiled, those of its backward pass too."""
    if not kernel.met(kind):
        kernel.rehearse(run)


def trains(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def rows(t: Tensor, width: int) -> Tensor:
    """``[n,width]``, each row without gaps."""
    flat = t.reshape(math.prod(t.shape) // width, width)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def together(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of what tensors make together."""
    first, *more = [t.dtype for t in tensors if t is not None]
    for dtype in more:
        first = torch.promote_types(first, dtype)
    return first


def alike(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Tensors of the same shapes and dtypes, empty ones for None: fakes of gradients."""
    one = next(t for t in tensors if t is not None)
    return tuple(one.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)
