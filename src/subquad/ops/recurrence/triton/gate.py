"""Whether the kernels take a request, and why not. Light: imports no kernel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from subquad.ops.backend import Request, assumed_constant, interpreted

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256


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
    """Why this machine runs no kernel, or ""."""
    return _examined()


def verify(request: Request) -> tuple[bool, str]:
    sizes, traits = request.sizes, request.traits
    if request.device != "cuda" and not (request.device == "cpu" and interpreted()):
        return False, f"runs on cuda (on the CPU under TRITON_INTERPRET=1), not on {request.device}"
    if request.device == "cuda" and _machine():
        return False, _machine()
    if request.dtype not in DTYPES:
        return False, f"takes {', '.join(str(d) for d in DTYPES)}, not {request.dtype}"
    if max(sizes["K"], sizes["V"]) > WIDEST:
        return False, f"takes K and V up to {WIDEST}, not K={sizes['K']}, V={sizes['V']}"
    if min(sizes["B"], sizes["T"]) < 1:
        return False, "needs a token"
    if "form:parallel" in traits:
        return False, "has no quadratic form"
    if "form:recurrent" in traits and "grad" in traits:
        return False, "its recurrent form has no backward pass"
    return True, "fused kernels"
