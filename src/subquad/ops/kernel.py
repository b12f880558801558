"""A Triton kernel, its launches, and how all kernels of a call are compiled at once.

Triton finds out at every launch which compiled kernel the arguments ask for, which takes longer
than many a kernel. A :class:`Launch` is a kernel with its grid and everything that is not a tensor;
it keeps what was compiled for its tensors' dtypes.

Triton compiles a kernel when it is first launched, seconds each and one after the other. To
:func:`rehearse` a call is to go through its launches without a launch, and then to compile all
that they ask for in as many threads as the process has cores (most of a compiler's work is done
outside Python's lock).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops.backend import interpreted

MOST_LAUNCHES = 256  # that a kernel keeps


class _Rehearsal(threading.local):
    # What was asked for, by what tells kernels apart; None outside a rehearsal.
    wanted: dict[Hashable, Callable[[], Any]] | None = None


_rehearsal = _Rehearsal()
_threads = threading.local()
_met: set[Hashable] = set()


class Kernel:
    """A Triton kernel whose arguments are tensors, then numbers, then constants.

    One compilation serves all values of the numbers named in ``sizes``; ``jit`` is Triton's
    decorator or Gluon's.
    """

    def __init__(
        self, function: Callable[..., None], sizes: Sequence[str] = (), jit: Any = triton.jit
    ) -> None:
        self.jit = jit(do_not_specialize=list(sizes))(function)
        self.interpreted = not isinstance(self.jit, triton.runtime.JITFunction)
        self.compiled: dict[Hashable, dict[Hashable, Any]] = {}
        self.launches: dict[Hashable, Launch] = {}

    def bind(self, grid: tuple[int, ...], *numbers: Any, **more: Any) -> Launch:
        """A launch on the current device: ``numbers`` follow the tensors, ``more`` are named."""
        return Launch(self, grid, numbers, more)

    def launch(
        self, grid: tuple[int, ...], tensors: Sequence[Any], *numbers: Any, **more: Any
    ) -> None:
        """Launch on the current device, with tensors (descriptors, None) that start anywhere."""
        if self.interpreted or any(isinstance(t, Tensor) and t.data_ptr() % 16 for t in tensors):
            if _rehearsal.wanted is None:
                self.jit[grid](*tensors, *numbers, **more)
            return
        key = (_device(), grid, numbers, *more.values())
        found = self.launches.get(key)
        if found is None:
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
            found = self.launches[key] = self.bind(grid, *numbers, **more)
        found(*tensors)


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
        names = kernel.jit.arg_names
        named = [n for n in names if n in more]
        self.rest = (*numbers, *(more[n] for n in named))
        params = kernel.jit.params[len(names) - len(self.rest) :]
        kinds = [_kind(x, p) for x, p in zip(self.rest, params, strict=True)]
        options = sorted((n, x) for n, x in more.items() if n not in named)
        self.form = (_device(), *kinds, *options)
        self.compiled = kernel.compiled.setdefault(self.form, {})

    def __call__(self, *tensors: Any) -> None:
        if self.kernel.interpreted:
            self.kernel.jit[self.grid](*tensors, *self.numbers, **self.more)
            return
        dtypes = tuple([getattr(t, "dtype", None) for t in tensors])
        found = self.compiled.get(dtypes)
        if _rehearsal.wanted is not None:
            if found is None:
                kinds = [t.dtype if isinstance(t, Tensor) else t for t in tensors]
                key = self.kernel, self.form, dtypes
                _rehearsal.wanted[key] = lambda: self.compile(dtypes, kinds)
            return
        if found is None:
            kinds = [t.dtype if isinstance(t, Tensor) else t for t in tensors]
            found = self.compile(dtypes, kinds)
        if found is not None:
            found[self.grid](*tensors, *self.rest)

    def compile(self, dtypes: Hashable, kinds: Sequence[Any]) -> Any:
        """The kernel for tensors of such kinds (a dtype, a descriptor or None)."""
        found = self.kernel.jit.warmup(*kinds, *self.numbers, grid=self.grid, **self.more)
        self.compiled[dtypes] = found
        return found


def _device() -> int:
    return triton.runtime.driver.active.get_current_device()


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


def ready_to_describe(device: torch.device) -> None:
    """See that this thread may describe tensors to the copy engine: the driver asks for a context,
    and a thread of autograd's has none until PyTorch has worked in it."""
    seen = _threads.__dict__.setdefault("seen", set())
    if device.type == "cuda" and device not in seen:
        torch.zeros(1, device=device)
        seen.add(device)


def met(kind: Hashable) -> bool:
    """Whether a call of this kind came before, or is a rehearsal, or needs none."""
    if kind in _met or _rehearsal.wanted is not None:
        return True
    _met.add(kind)
    return interpreted()


def rehearsing() -> bool:
    """Whether nothing is launched, so that what kernels should have written is not to be kept."""
    return _rehearsal.wanted is not None


def rehearse(run: Callable[[], object]) -> None:
    """Compile every kernel that ``run`` launches, and launch none."""
    wanted = _rehearsal.wanted = {}
    try:
        run()
    finally:
        _rehearsal.wanted = None
    device = torch.cuda.current_device()

    def ready(compile: Callable[[], Any]) -> None:
        with torch.cuda.device(device):
            found = compile()
            _ = found and found.run  # brings it to the device

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        # From the last on: those of a backward pass take longest, and none should be left alone.
        list(threads.map(ready, reversed(wanted.values())))
