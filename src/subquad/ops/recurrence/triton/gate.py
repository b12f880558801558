"""Whether the kernels take a request, and why not. Light: imports no kernel."""

from __future__ import annotations

import torch

from subquad.ops.backend import Request, refusal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256


def verify(request: Request) -> tuple[bool, str]:
    sizes, traits = request.sizes, request.traits
    if why := refusal(request.device):
        return False, why
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
