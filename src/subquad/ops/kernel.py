"""A Triton kernel, its launches, and how all kernels of a call are compiled at once.

Triton finds out at every launch which compiled kernel the arguments ask for, which takes longer
than many a kernel. A :class:`Launch` is a kernel with its grid and everything that is not a tensor;
it keeps what was compiled for its tensors' dtypes.

Triton compiles a kernel when it is first launched, seconds each and one after the other. To
:func:`rehearse` a call is to go through its launches and only compile, in as many threads as the
process has cores (most of a compiler's work is done outside Python's lock).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, FutureKernel

from subquad.ops.backend import interpreted


class _Rehearsal(threading.local):
    kernels: list[Any] | None = None  # those asked for; None outside a rehearsal


_rehearsal = _Rehearsal()
_met: set[Hashable] = set()


class Kernel:
    """A Triton kernel whose arguments are tensors, then numbers, then constants.

    One compilation serves all values of the numbers named in ``sizes``.
    """

    def __init__(self, function: Callable[..., None], sizes: tuple[str, ...] = ()) -> None:
        self.jit = triton.jit(do_not_specialize=sizes)(function)
        self.interpreted = not isinstance(self.jit, triton.runtime.JITFunction)
        self.compiled: dict[Hashable, dict[Hashable, Any]] = {}

    def bind(self, grid: tuple[int, ...], *numbers: Any, **more: Any) -> Launch:
        """A launch on the current device: ``numbers`` follow the tensors, ``more`` are named."""
        return Launch(self, grid, numbers, more)


class Launch:
    """A kernel with its grid, numbers and constants; a call gives the tensors (or None).

    Tensors must start at a multiple of 16 bytes, as :func:`dense` makes them.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, ...], numbers: tuple[Any, ...], more: dict[str, Any]
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, *(1,) * (3 - len(grid)))
        self.numbers, self.more = numbers, more
        if kernel.interpreted:
            return
        named = [n for n in kernel.jit.arg_names if n in more]
        self.rest = (*numbers, *(more[n] for n in named))
        places = range(len(kernel.jit.arg_names) - len(self.rest), len(kernel.jit.arg_names))
        params = [kernel.jit.params[i] for i in places]
        kinds = [_kind(x, p) for x, p in zip(self.rest, params, strict=True)]
        options = sorted((n, x) for n, x in more.items() if n not in named)
        device = triton.runtime.driver.active.get_current_device()
        self.compiled = kernel.compiled.setdefault((device, *kinds, *options), {})

    def __call__(self, *tensors: Tensor | None) -> None:
        if self.kernel.interpreted:
            self.kernel.jit[self.grid](*tensors, *self.numbers, **self.more)
            return
        dtypes = tuple([None if t is None else t.dtype for t in tensors])
        found = self.compiled.get(dtypes)
        if found is None:
            found = self._compile(dtypes)
        if _rehearsal.kernels is None and found is not None:
            found[self.grid](*tensors, *self.rest)

    def _compile(self, dtypes: tuple[torch.dtype | None, ...]) -> Any:
        found = self.kernel.jit.warmup(*dtypes, *self.numbers, grid=self.grid, **self.more)
        if _rehearsal.kernels is not None:
            _rehearsal.kernels.append(found)
        else:
            self.compiled[dtypes] = found
        return found


def _kind(x: Any, parameter: Any) -> Hashable:
    """What of an argument decides which compiled kernel is asked for."""
    if parameter.is_constexpr:
        return x
    if isinstance(x, int) and not isinstance(x, bool):
        wide = x.bit_length() > 31
        return wide if parameter.do_not_specialize else (x == 1, x % 16 == 0, wide)
    return str(type(x))


def dense(t: Tensor) -> Tensor:
    """t, or a copy, without gaps and from a multiple of 16 bytes on."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """A block that launches on the device of t, which need not be the current one."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return nullcontext()


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
