"""Whether the kernels take a request, and why not. Light: imports no kernel."""

from __future__ import annotations

from subquad.ops.backend import Request, unfit

WIDEST = 256


def verify(request: Request) -> tuple[bool, str]:
    sizes, traits = request.sizes, request.traits
    if why := unfit(request):
        return False, why
    if max(sizes["K"], sizes["V"]) > WIDEST:
        return False, f"takes K and V up to {WIDEST}, not K={sizes['K']}, V={sizes['V']}"
    if min(sizes["B"], sizes["T"]) < 1:
        return False, "needs a token"
    if "form:parallel" in traits:
        return False, "has no quadratic form"
    if "form:recurrent" in traits and "grad" in traits:
        return False, "its recurrent form has no backward pass"
    return True, "fused kernels"
