"""What the operations share: what a call launched once is repeated (:mod:`subquad.ops.tape`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.ops import kernel

_known: dict[Hashable, dict[Hashable, Any]] = {}  # of each kind of call


def call(
    run: Callable[..., Any],
    options: tuple[Any, ...],
    inputs: Sequence[Tensor | None],
    backward: Callable[..., object] | None = None,
) -> Any:
    """``run(*options, *inputs)``, which only allocates by :func:`~subquad.ops.tape.empty` and
    launches; at the first call of a kind its kernels are compiled, and meanwhile those of
    ``backward``, which is given the outputs.

    The first input is given, and all are :func:`straight`.
    """
    x = inputs[0]
    assert x is not None
    forms = [None if t is None else (t.shape, t.stride(), t.dtype) for t in inputs]
    known, key = _known.setdefault((run, options, x.device), {}), tuple(forms)
    with kernel.on_device(x):
        if key not in known:
            kind = [f and (f[2], f[0][-1]) for f in forms]
            if not kernel.met((run, options, backward is None, x.device, *kind)):
                outputs: list[Any] = []
                kernel.rehearse(
                    lambda: outputs.append(run(*options, *inputs)),
                    None if backward is None else lambda: backward(outputs[0]),
                )
        return kernel.repeated(known, key, partial(run, *options), *inputs)


def straight(t: Tensor | None) -> Any:
    """t, or a copy, that starts at a multiple of 16 bytes and whose last axis has no gaps."""
    if t is None or (t.stride(-1) == 1 and not t.data_ptr() % 16):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def rows(t: Tensor | None, width: int) -> Any:
    """``[n,width]``, :func:`straight`."""
    return t if t is None else straight(t.reshape(math.prod(t.shape) // max(width, 1), width))


def trains(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def together(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of what tensors make together."""
    first, *more = [t.dtype for t in tensors if t is not None]
    for dtype in more:
        first = torch.promote_types(first, dtype)
    return first


def filled(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, an empty one for each that is not there: an operation returns no None."""
    one = next(t for t in tensors if t is not None)
    return tuple([one.new_empty(0) if t is None else t for t in tensors])
