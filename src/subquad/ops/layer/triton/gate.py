"""Whether the kernels take a request, and why not. Light: imports no kernel."""

from __future__ import annotations

from subquad.ops.backend import Request, unfit

LONGEST = 8  # rows of a convolution that a program holds
WIDEST = 16384  # channels that a norm's program holds


def verify(request: Request) -> tuple[bool, str]:
    sizes, traits = request.sizes, request.traits
    if why := unfit(request):
        return False, why
    if "transformed" in traits:
        return False, "has no rules for torch.func's transforms"
    if "part:short_conv" in traits and not 2 <= sizes["size"] <= LONGEST:
        return False, f"takes convolutions of 2 to {LONGEST} tokens, not {sizes['size']}"
    if "part:gated_rms_norm" in traits or "part:l2_norm" in traits:
        width = sizes["D"] // sizes["groups"]
        if not 1 <= width <= WIDEST:
            return False, f"norms up to {WIDEST} channels, not {width}"
    return True, "one fused kernel"
