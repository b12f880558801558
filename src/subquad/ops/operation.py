"""Functions that launch kernels as PyTorch operations: opaque to autograd, compile and export.

``torch.library.custom_op`` does the same, but its first call imports PyTorch's compiler, seconds
that a program which compiles nothing would wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload


def operation(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Make a function the operation ``subquad::name``; it must not change its inputs.

    ``torch.library.register_fake`` gives its fake, ``register_autograd`` its derivative, or
    :func:`without_derivative` says that it has none.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        whole = f"subquad::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(whole, schema, tags=(torch.Tag.pt2_compliant_tag,))
        untraced = torch._disable_dynamo(function)  # at its first call it imports the compiler

        def run(*inputs: Any) -> Any:
            return (untraced if "torch._dynamo" in sys.modules else function)(*inputs)

        torch.library.impl(whole, "default", run)
        found: OpOverload = getattr(torch.ops.subquad, name).default
        return found

    return define


def without_derivative(op: OpOverload) -> None:
    """A backward pass through ``op`` raises RuntimeError (else it would find no gradient)."""

    def derive(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{op} has no derivative")

    torch.library.register_autograd(op, derive, setup_context=lambda ctx, inputs, output: None)
