"""Functions that launch kernels as PyTorch operations: opaque to autograd, compile and export.

``torch.library.custom_op`` does the same, but its first call imports PyTorch's compiler, seconds
that a program which compiles nothing would wait for. And its every call goes through the
dispatcher several times in Python, which takes longer than a short kernel: where nothing looks on
(no compiler, mode, transform or tensor subclass), an :class:`Operation` calls its function itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What calls may hold that need no dispatcher; subclasses of tensors (fakes among them) do.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = frozenset({NoneType, bool, int, float, str, list})


class Operation:
    """The operation ``subquad::name``. A call gives all inputs, by place.

    Attributes:
        overload: what compilers see, ``torch.ops.subquad.name.default``.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        whole = f"subquad::{name}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(whole, schema, tags=(torch.Tag.pt2_compliant_tag,))
        untraced = torch._disable_dynamo(function)  # at its first call it imports the compiler

        def run(*inputs: Any) -> Any:
            return (untraced if "torch._dynamo" in sys.modules else function)(*inputs)

        torch.library.impl(whole, "default", run)
        self.overload = getattr(torch.ops.subquad, name).default
        self._run = run
        self._node: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*inputs)
        refuse_tangents(f"{self.overload}", inputs)
        if not _alone(inputs):
            return self.overload(*inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return self._run(*inputs)
        return self._node.apply(*inputs) if self._node else self.overload(*inputs)

    def fake(self, function: Callable[..., Any]) -> None:
        """Decorates the function that gives results without values."""
        torch.library.register_fake(self.overload, function)

    def differentiable(self, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
        """``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` needs."""
        torch.library.register_autograd(self.overload, backward, setup_context=save)
        run = self._run

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        names = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(f"{self.overload}", (torch.autograd.Function,), names)

    def without_derivative(self) -> None:
        """A backward pass through it raises RuntimeError (else it would find no gradient)."""

        def derive(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(f"{self.overload} has no derivative")

        self.differentiable(derive, lambda ctx, inputs, output: None)


def operation(
    name: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Operation]:
    """Make a function the operation ``subquad::name``; it may change only the inputs that it
    ``mutates``."""
    return lambda function: Operation(name, function, mutates)


def refuse_tangents(name: str, inputs: Iterable[Any]) -> None:
    """Raise where forward-mode differentiation follows an input: a kernel would end it, and the
    derivative would be 0.

    Raises:
        NotImplementedError: in ``torch.func.jvp`` and what is made of it.
    """
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} has no derivative in forward mode; differentiate in reverse mode, "
                'or run backend("reference")'
            )


def _alone(inputs: tuple[Any, ...]) -> bool:
    """Whether neither a mode, a transform, a trace nor an input's type asks to see the call."""
    for x in inputs:
        kind = type(x)
        if kind in _TENSORS:
            if x.is_meta:
                return False
        elif kind not in _PLAIN:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )
