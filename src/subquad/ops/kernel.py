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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops.backend import interpreted
from subquad.ops.driver import Binary, Submit
from subquad.ops.tape import addresses, record, recording, repeatable

MOST_LAUNCHES = 256  # that a kernel keeps
MOST_REPEATS = 128  # of all calls of one kind: of other lengths, or of other scales


def _begin() -> None:
    """What Triton does once before its first compilation: it hashes its own files, and compiles its
    calls of CUDA's driver."""
    if torch.version.cuda and not interpreted():
        # What fails comes again, where it is needed.
        with suppress(Exception), ThreadPoolExecutor(1) as beside:
            beside.submit(triton.runtime.cache.triton_key)
            _ = triton.runtime.driver.active


# Mostly outside Python's lock, while kernels are imported.
_beginning = threading.Thread(target=_begin, daemon=True)
_beginning.start()


class _Rehearsal(threading.local):
    # Who asked for what, by what tells kernels apart; None outside a rehearsal.
    wanted: dict[tuple[Any, ...], tuple[Launch, Callable[[], Any]]] | None = None


_rehearsal = _Rehearsal()
_threads = threading.local()
_met: set[Hashable] = set()


class Kernel:
    """A Triton kernel whose arguments are tensors, then numbers, then constants.

    One compilation serves all values of the numbers named in ``sizes``; ``jit`` is Triton's
    decorator or Gluon's; those whose compilation has the greatest ``length`` are begun first.
    """

    def __init__(
        self,
        function: Callable[..., None],
        sizes: Sequence[str] = (),
        jit: Any = triton.jit,
        length: int = 1,
    ) -> None:
        self.length = length
        self.jit = jit(do_not_specialize=list(sizes))(function)
        self.interpreted = not isinstance(self.jit, triton.runtime.JITFunction)
        self.binaries: dict[Hashable, dict[Hashable, Binary | Future[Binary | None]]] = {}
        self.launches: dict[Hashable, Launch] = {}

    def bind(self, grid: tuple[int, ...], *numbers: Any, **more: Any) -> Launch:
        """A launch on the current device: ``numbers`` follow the tensors, ``more`` are named."""
        return Launch(self, grid, numbers, more)

    def launch(
        self, grid: tuple[int, ...], tensors: Sequence[Any], *numbers: Any, **more: Any
    ) -> None:
        """Launch on the current device, with tensors (descriptors, None) that start anywhere."""
        if self.interpreted or any(isinstance(t, Tensor) and t.data_ptr() % 16 for t in tensors):
            if recording.tape is not None:
                recording.tape.launches.append((None, tensors))
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
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.numbers, self.more = numbers, more
        self.rare = self.asked = False
        if kernel.interpreted:
            return
        names = kernel.jit.arg_names
        named = [n for n in names if n in more]
        self.rest = (*numbers, *(more[n] for n in named))
        params = kernel.jit.params[len(names) - len(self.rest) :]
        kinds = [_kind(x, p) for x, p in zip(self.rest, params, strict=True)]
        options = sorted((n, x) for n, x in more.items() if n not in named)
        self.form = (_device(), *kinds, *options)
        self.binaries = kernel.binaries.setdefault(self.form, {})
        # What the compiled kernel still asks for.
        self.given = [x for x, p in zip(self.rest, params, strict=True) if not _is_constant(x, p)]
        self.ready: dict[Hashable, tuple[Submit | None, Any]] = {}

    def __call__(self, *tensors: Any) -> None:
        if self.kernel.interpreted:
            self.kernel.jit[self.grid](*tensors, *self.numbers, **self.more)
            return
        forms = _forms(tensors)
        found = self.ready.get(forms)
        if found is None or _rehearsal.wanted is not None:
            found = self._prepare(forms, tensors)
            if found is None:
                return
        submit, compiled = found
        if recording.tape is not None:
            recording.tape.launches.append((submit, tensors))
        device = _device()
        places = addresses(tensors, device)
        if submit is None:
            compiled[self.grid](*tensors, *self.rest)
        else:
            submit(places, triton.runtime.driver.active.get_current_stream(device))

    def where(self, flags: Tensor, *tensors: Any) -> None:
        """As a call, of a kernel that has work only where some of ``flags``, which it reads itself,
        are not 0. That is rare, so a rehearsal does not wait for its compilation, and where the
        first launch would, the device is asked first."""
        self.rare = True
        if not self.asked and _rehearsal.wanted is None:
            self.asked = True
            waits = self._comes(tensors) and not torch.cuda.is_current_stream_capturing()
            if waits and not flags.any():
                if recording.tape is not None:
                    recording.tape.whole = False
                return
        self(*tensors)

    def _comes(self, tensors: Sequence[Any]) -> bool:
        """Whether it is being compiled."""
        if self.kernel.interpreted:
            return False
        binary = self.binaries.get(_dtypes(_forms(tensors)))
        return isinstance(binary, Future) and not binary.done()

    def _prepare(
        self, forms: tuple[Any, ...], tensors: Sequence[Any]
    ) -> tuple[Submit | None, Any] | None:
        """What launches the kernel for tensors of these forms; None in a rehearsal."""
        dtypes = _dtypes(forms)
        binary = self.binaries.get(dtypes)
        kinds = [t.dtype if isinstance(t, Tensor) else t for t in tensors]
        if _rehearsal.wanted is not None:
            if binary is None:
                key = self.kernel, self.form, dtypes
                _rehearsal.wanted[key] = self, lambda: self.compile(kinds)
            return None
        if isinstance(binary, Future):
            binary = None if binary.exception() else binary.result()
            self.binaries.pop(dtypes, None)
        binary = binary or self.compile(kinds)
        if binary is None:
            return None
        self.binaries[dtypes] = binary
        given = [t for t in tensors if t is not None]
        found = binary.submit(self.grid, given, self.given), binary.compiled
        self.ready[forms] = found
        return found

    def compile(self, kinds: Sequence[Any]) -> Binary | None:
        """The kernel for tensors of such kinds (a dtype, a descriptor or None), on the device."""
        found = self.kernel.jit.warmup(*kinds, *self.numbers, grid=self.grid, **self.more)
        return None if found is None else Binary(found)  # None: Triton's hook has it


def _dtypes(forms: Sequence[Any]) -> tuple[Any, ...]:
    # Of a descriptor its tile, not the sizes of its tensor.
    return tuple([f[0] if isinstance(f, tuple) else f for f in forms])


def _forms(tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([t.dtype if isinstance(t, Tensor) else _form(t) for t in tensors])


def _form(x: Any) -> Hashable:
    """What of a descriptor (or None) a launch keeps, first what decides the compiled kernel."""
    if x is None:
        return None
    return (x.base.dtype, *x.block_shape, x.padding), *x.shape, *x.strides


def _device() -> int:
    if _beginning.is_alive():
        _beginning.join()
    return triton.runtime.driver.active.get_current_device()


def _kind(x: Any, parameter: Any) -> Hashable:
    """What of an argument decides which compiled kernel is asked for."""
    if parameter.is_constexpr:
        return x
    if isinstance(x, int) and not isinstance(x, bool):
        wide = x.bit_length() > 31
        return wide if parameter.do_not_specialize else (x == 1, x % 16 == 0, wide)
    return str(type(x))


def _is_constant(x: Any, parameter: Any) -> bool:
    return parameter.is_constexpr or (not parameter.do_not_specialize and type(x) is int and x == 1)


def ready(t: Tensor) -> bool:
    """Whether t has no gaps and starts at a multiple of 16 bytes."""
    return t.is_contiguous() and not t.data_ptr() % 16


def dense(t: Tensor) -> Tensor:
    """t, or a copy that is ready."""
    return t if ready(t) else t.clone(memory_format=torch.contiguous_format)


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
    """Whether nothing is launched."""
    return _rehearsal.wanted is not None


def writing() -> bool:
    """Whether kernels write now, so that later calls may read it: neither in a rehearsal, nor while
    a CUDA graph is captured."""
    if rehearsing():
        return False
    return interpreted() or not torch.cuda.is_current_stream_capturing()


def rehearse(run: Callable[[], object], later: Callable[[], object] | None = None) -> None:
    """Compile every kernel that ``run`` launches, and launch none; those of ``later`` as well, for
    which nothing waits before it launches them."""
    wanted = _rehearsal.wanted = {}
    soon: set[tuple[Any, ...]] = set()
    try:
        # The backward pass, which may never come, may need memory that there is not.
        with suppress(torch.OutOfMemoryError):
            run()
            soon = {*wanted}
            if later is not None:
                later()
    finally:
        _rehearsal.wanted = None

    def ready(device: int, compile: Callable[[], Any]) -> Any:
        with torch.cuda.device(device):
            return compile()

    # The longest first, none of which should be left alone: by what is known of them, else those
    # of a backward pass, which come last. Those that nothing waits for after all others.
    order = [*reversed(wanted)]
    order.sort(key=lambda key: (wanted[key][0].rare, key not in soon, -key[0].length))
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    awaited = []
    for key in order:
        (kernel, form, dtypes), (launch, compile) = key, wanted[key]
        coming = kernel.binaries[form][dtypes] = threads.submit(ready, form[0], compile)
        if key in soon and not launch.rare:
            awaited.append(coming)
    threads.shutdown(wait=False)
    for coming in awaited:
        coming.result()


def repeated(
    known: dict[Hashable, Any],
    key: Hashable,
    run: Callable[..., Any],
    *inputs: Tensor | None,
    constants: Callable[[], Sequence[Tensor]] = tuple,
) -> Any:
    """``run(*inputs)``, recorded (:mod:`~subquad.ops.tape`) at its first call of a ``key`` and from
    then on repeated; ``known`` keeps what was recorded, None for what cannot be repeated."""
    if _rehearsal.wanted is not None:
        return run(*inputs)
    found = known.get(key)
    if found:
        return found(*inputs)
    if key in known or interpreted():
        return run(*inputs)
    out, did = record(lambda: run(*inputs))
    if len(known) >= MOST_REPEATS:
        known.clear()
    if did.whole:
        known[key] = repeatable(did, inputs, out, constants())
    return out
