"""Which implementation of an operation runs, and why the others do not.

Every operation lists its implementations, fastest first, each with a verifier that looks at a
:class:`Request` (device, dtype, sizes, traits; no tensors) and answers ``(ok, reason)``. The first
that says yes runs. ``explain`` shows all the answers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

import subquad


class _Forced(threading.local):
    """The implementation asked for in this thread (torch.compile cannot trace a ContextVar)."""

    name: str | None = None


_forced = _Forced()


@dataclass(frozen=True)
class Request:
    """What an operation is asked to do, without the tensors.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of q, k and v.
        sizes: the axes by their letters, e.g. ``{"B": 1, "T": 4096, "H": 8, "K": 64, "V": 64}``.
        traits: what else matters, e.g. ``"grad"``, ``"packed"``, ``"state"``, ``"delta"``,
            ``"decay:head"``, ``"decay:channel"``.
    """

    device: str
    dtype: torch.dtype
    sizes: Mapping[str, int]
    traits: frozenset[str] = field(default_factory=frozenset)


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.complex128,  # of scans
)  # fmt: skip
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEADS = 65535  # what CUDA allows
Verifier = Callable[[Request], tuple[bool, str]]
F = TypeVar("F", bound=Callable[..., Any])


def assumed_constant(function: F) -> F:
    """While compiling, run the function, untraced, and take its result for a constant.

    ``torch.compiler.assume_constant_result`` sets the same mark, but imports the compiler to do so:
    seconds of a first call.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assumed_constant  # an import cannot be traced, the look-up of the attributes after it can
def _imported(module: str) -> bool:
    import_module(module)
    return True


@dataclass(frozen=True)
class Backend:
    """One implementation: its name, its verifier, and where it lives (``"module:function"``)."""

    name: str
    verify: Verifier
    home: str

    def load(self) -> Any:
        module, _, function = self.home.partition(":")
        _imported(module)
        found: Any = subquad
        for name in [*module.split(".")[1:], function]:
            found = getattr(found, name)
        return found


@dataclass(frozen=True)
class Verdict:
    backend: str
    ok: bool
    reason: str
    chosen: bool


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (so they run on the CPU)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _examined() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed"
    nvidia = torch.version.cuda and torch.cuda.is_available()
    if nvidia and torch.cuda.get_device_capability()[0] < 8:
        return "needs a GPU of compute capability 8.0 or newer"
    return ""


@assumed_constant  # a cached function would be traced
def _machine() -> str:
    return _examined()


def refusal(device: str) -> str:
    """Why Triton kernels do not run on a type of device, or ""."""
    if device == "cuda":
        return _machine()
    if device == "cpu" and interpreted():
        return ""
    return f"runs on cuda (on the CPU under TRITON_INTERPRET=1), not on {device}"


def unfit(request: Request) -> str:
    """Why no Triton kernel takes a request, by its device and dtype, or ""."""
    if why := refusal(request.device):
        return why
    if request.dtype not in KERNEL_DTYPES:
        return f"takes {', '.join(map(str, KERNEL_DTYPES))}, not {request.dtype}"
    return ""


def crowded(request: Request) -> str:
    """Why kernels with a program for each head of each row along a grid's second axis cannot be
    launched, or ""."""
    heads = request.sizes["B"] * request.sizes["H"]
    return f"takes up to {MOST_HEADS} heads in all, not {heads}" if heads > MOST_HEADS else ""


def uses_kernels(t: Tensor) -> bool:
    """Whether an operation on t without a list of implementations runs on Triton kernels: where
    they run, unless another implementation is asked for."""
    asked = _forced.name or os.environ.get("SUBQUAD_BACKEND") or "triton"
    return asked == "triton" and not refusal(t.device.type)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every operation inside the block with the implementation ``name``, or raise.

    ``None`` gives the choice back to the verifiers. ``SUBQUAD_BACKEND`` in the environment does
    the same for a whole process.
    """
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def _answer(b: Backend, request: Request) -> tuple[bool, str]:
    if request.dtype not in DTYPES:  # such as float8, in which nothing can be added
        return False, f"computes in no {request.dtype}"
    return b.verify(request)


def verdicts(
    backends: Sequence[Backend], request: Request, name: str | None = None
) -> list[Verdict]:
    """The answers of all implementations; ``chosen`` marks the one that runs."""
    name = name or _forced.name or os.environ.get("SUBQUAD_BACKEND")
    out: list[Verdict] = []
    for b in backends:
        ok, reason = _answer(b, request)
        if name and b.name != name:
            ok, reason = False, f"{name!r} was asked for"
        out.append(Verdict(b.name, ok, reason, ok and not any(v.chosen for v in out)))
    return out


def choose(
    op: str, backends: Sequence[Backend], request: Request, name: str | None = None
) -> Backend:
    """The implementation that runs.

    Raises:
        ValueError: if ``name`` is none of the op's implementations, or none takes the request.
    """
    name = name or _forced.name or os.environ.get("SUBQUAD_BACKEND")
    names = [b.name for b in backends]
    if name and name not in names:
        raise ValueError(f"backend of {op} must be one of {names}, got {name!r}")
    for b in backends:
        if (not name or b.name == name) and _answer(b, request)[0]:
            return b
    why = "; ".join(f"{b.name}: {_answer(b, request)[1]}" for b in backends)
    raise ValueError(f"no implementation of {op} takes this request ({why})")


def signature(*tensors: Any) -> tuple[Any, ...] | None:
    """What checks and verifiers look at in a call with these tensors (or None): where it came
    before they need not look again. None where something traces, whose sizes may be symbols."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    try:
        seen = [t if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    except AttributeError:  # no tensor
        return None
    grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    return _forced.name or os.environ.get("SUBQUAD_BACKEND"), grad, *seen


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A block in which an operation keeps its own precision where the caller's is automatic."""
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


# The operations that explain() knows: their packages export BACKENDS and request(**shape).
OPS = ("attention", "kernel_attention", "layer", "memory", "probe", "recurrence", "scan")


def explain(op: str, **shape: Any) -> list[Verdict]:
    """Who would run ``op`` for this shape, and why the rest would not.

    Args:
        op: one of ``OPS``.
        **shape: sizes by their letters (``T=4096, H=8, K=64``), ``device``, ``dtype``, and the
            op's own switches; see each op's ``request``.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {list(OPS)}, got {op!r}")
    module = import_module(f"subquad.ops.{op}")
    return verdicts(module.BACKENDS, module.request(**shape))
