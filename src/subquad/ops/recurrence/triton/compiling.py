"""All kernels of a call are compiled at once, before the first of them is launched.

Triton compiles a kernel when it is first launched, seconds each and one after the other. To
:func:`rehearse` a call is to go through its launches and only compile, in as many threads as the
process has cores (most of a compiler's work is done outside Python's lock).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, FutureKernel

from subquad.ops.backend import interpreted
from subquad.ops.recurrence.triton.parts import SIZES


class _Rehearsal(threading.local):
    kernels: list[Any] | None = None  # those asked for; None outside a rehearsal


_rehearsal = _Rehearsal()
_met: set[Hashable] = set()


class Kernel:
    """A Triton kernel, launched as ``kernel[grid](...)``, that a rehearsal only compiles."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.jit = triton.jit(do_not_specialize=SIZES)(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._compile, grid) if _rehearsal.kernels is not None else self.jit[grid]

    def _compile(self, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
        types = (a.dtype if isinstance(a, Tensor) else a for a in arguments)
        assert _rehearsal.kernels is not None
        _rehearsal.kernels.append(self.jit.warmup(*types, grid=grid, **more))


def met(kind: Hashable) -> bool:
    """Whether a call of this kind came before, or is a rehearsal, or needs none."""
    if kind in _met or _rehearsal.kernels is not None:
        return True
    _met.add(kind)
    return interpreted()


def rehearse(run: Callable[[], object]) -> None:
    """Compile every kernel that ``run`` launches, and launch none."""
    # In a context of its own: AsyncCompileMode stays in it where a compilation fails (Triton 3.6).
    copy_context().run(_rehearse, run)


def _rehearse(run: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        with AsyncCompileMode(threads):
            kernels = _rehearsal.kernels = []
            try:
                run()
            finally:
                _rehearsal.kernels = None
        list(threads.map(partial(_load, torch.cuda.current_device()), set(kernels)))


def _load(device: int, kernel: Any) -> None:
    """Bring a kernel to the device; Triton 3.6 also compiles what launches it, in C."""
    with torch.cuda.device(device):
        kernel = kernel.result() if isinstance(kernel, FutureKernel) else kernel
        _ = kernel.run
