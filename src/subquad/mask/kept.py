"""Tensors that are made once, for whoever asks again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def kept(maxsize: int) -> Callable[[F], F]:
    """``lru_cache`` for functions that make tensors of constants.

    They run in a thread of their own, where no mode of the first caller's is on: a tensor made in
    inference mode cannot be saved for a backward pass, one made while something traces is a fake,
    one of a default device lies there, and one from a compiled graph's pool goes with it. Tensors
    on a GPU must be copied from the CPU, which waits for them, so that any stream may read them;
    while a CUDA graph is captured PyTorch refuses that. Where something traces, nothing is kept.
    """

    def decorate(function: F) -> F:
        @lru_cache(maxsize)
        def made(*given: Any) -> Any:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                return function(*given)  # elsewhere the copy would end the capture, less plainly
            with ThreadPoolExecutor(1) as alone:
                return alone.submit(function, *given).result()

        @wraps(function)
        def find(*given: Any) -> Any:
            return function(*given) if traced() else made(*given)

        find.cache_clear = made.cache_clear  # type: ignore[attr-defined]
        return find  # type: ignore[return-value]

    return decorate


def traced() -> bool:
    """Whether something traces: a compiler, or fakes."""
    fakes = torch._C._TorchDispatchModeKey.FAKE
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(fakes) is not None
