"""The launches of a call, kept, to be made again with other tensors of the same kinds.

What a call of known shapes does on the host is the same every time but for the tensors' addresses.
So a function that only allocates (by :func:`empty`) and launches is recorded once: every address
that a launch was given lies in an input, an output or scratch memory. To repeat it is to allocate
the outputs and one block for all scratch memory, and to submit the launches.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops.driver import Submit

ALIGNED = 256  # bytes, as PyTorch's allocator gives

Repeat = Callable[..., list[Any]]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class _Recording(threading.local):
    tape: Tape | None = None


recording = _Recording()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, in a function that may be recorded."""
    made = like.new_empty(shape, dtype=dtype or like.dtype)
    if recording.tape is not None:
        recording.tape.made.append(made)
    return made


def zeros(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """``like.new_zeros``, in a function that may be recorded."""
    made = like.new_zeros(shape, dtype=dtype)
    if recording.tape is not None:
        recording.tape.zeros.append(made)
    return made


def size(shapes: Shapes) -> int:
    """Bytes of tensors in one block."""
    return sum(_rounded(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes.values())


def pieces(block: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors in a block of :func:`size` bytes, by name."""
    found, start = {}, 0
    for name, (shape, dtype) in shapes.items():
        n = math.prod(shape) * dtype.itemsize
        found[name] = block[start : start + n].view(dtype).view(shape)
        start += _rounded(n)
    return found


def _rounded(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


def addresses(tensors: Sequence[Any], device: int) -> list[int]:
    """Where the tensors (descriptors) that are given begin.

    Raises:
        ValueError: for a tensor that is elsewhere, which a kernel cannot read.
    """
    found = []
    for t in tensors:
        if t is not None:
            t = t if isinstance(t, Tensor) else t.base
            if t.get_device() != device:
                raise ValueError(f"tensors must be on cuda:{device} as others are, got {t.device}")
            found.append(t.data_ptr())
    return found


class Tape:
    """What a function did: the tensors ``made``, those of ``zeros``, and the ``launches``, each
    with its tensors (and None for its :data:`Submit` where Triton must launch); ``whole`` unless a
    launch was left out."""

    def __init__(self) -> None:
        self.whole = True
        self.made: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.launches: list[tuple[Submit | None, Sequence[Any]]] = []


def record(function: Callable[[], Any]) -> tuple[Any, Tape]:
    """What the function returns, and what it did."""
    tape = recording.tape = Tape()
    try:
        return function(), tape
    finally:
        recording.tape = None


def repeatable(
    tape: Tape,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    constants: Sequence[Tensor] = (),
) -> Repeat | None:
    """The recorded function: from such inputs (the first is none of the None) to new outputs.

    None where it cannot be repeated: a launch is Triton's, an output was not made by
    :func:`empty`, or an address lies in none of the tensors, or in two inputs. ``constants`` are
    tensors that stay where they are, as long as the function.
    """
    results = [t for t in outputs if t is not None]
    kept = {id(t) for t in results}
    if not kept <= {id(t) for t in tape.made}:
        return None
    # In the order of _repeat's bases, the first of which is 0.
    moving = [*(t for t in inputs if t is not None), *results, *tape.zeros]
    known = [(n, 0, t) for n, t in enumerate(moving, 1)]
    block, total = len(known) + 1, 0
    for t in tape.made:
        if id(t) not in kept:
            known.append((block, total, t))
            total += _rounded(t.nbytes)
    known += [(0, t.data_ptr(), t) for t in constants]

    def place(t: Any) -> tuple[int, int] | None:
        at = (t if isinstance(t, Tensor) else t.base).data_ptr()
        whole = [(n, start) for n, start, x in known if x.data_ptr() == at]
        parts = [
            (n, start + at - x.data_ptr())
            for n, start, x in known
            if x.data_ptr() <= at < x.data_ptr() + x.nbytes
        ]
        found = whole or parts
        return found[0] if len(found) == 1 else None

    places: dict[tuple[int, int], int] = {}
    steps: list[tuple[Submit, Any]] = []
    for submit, tensors in tape.launches:
        picks = []
        for t in tensors:
            found = None if t is None or submit is None else place(t)
            if found is not None:
                picks.append(places.setdefault(found, len(places)))
            elif t is not None:
                return None
        if submit is None or len(picks) < 2:
            return None
        steps.append((submit, itemgetter(*picks)))
    forms = [t if t is None else (t.shape, t.stride(), t.dtype) for t in outputs]
    zeros = [(t.shape, t.dtype) for t in tape.zeros]
    return _repeat(forms, zeros, total, list(places), steps, constants)


def _repeat(
    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None],
    zeros: list[tuple[torch.Size, torch.dtype]],
    total: int,
    places: list[tuple[int, int]],
    steps: list[tuple[Submit, Any]],
    constants: Sequence[Tensor],
) -> Repeat:
    make = torch.empty_strided  # takes half as long as torch.empty

    def repeat(*inputs: Tensor | None, _kept: Sequence[Tensor] = constants) -> list[Any]:
        device: Any = inputs[0].device  # type: ignore[union-attr]
        index = inputs[0].get_device()  # type: ignore[union-attr]
        given = addresses(inputs, index)
        results = [f and make(f[0], f[1], dtype=f[2], device=device) for f in forms]
        more = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zeros]
        bases = [0, *given, *[t.data_ptr() for t in (*results, *more) if t is not None]]
        if total:
            block = make((total,), (1,), dtype=torch.uint8, device=device)
            bases.append(block.data_ptr())
        at = [bases[n] + start for n, start in places]
        stream = triton.runtime.driver.active.get_current_stream(index)
        for submit, pick in steps:
            submit(pick(at), stream)
        return results

    return repeat
