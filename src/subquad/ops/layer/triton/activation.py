"""Activations and their slopes inside kernels, by the names of
:data:`~subquad.ops.layer.activation.ACTIVATIONS`."""

import triton
import triton.language as tl


@triton.jit
def activate(z, NAME: tl.constexpr):
    if NAME == "silu":
        return z * tl.sigmoid(z)
    elif NAME == "sigmoid":
        return tl.sigmoid(z)
    elif NAME == "relu":
        return tl.maximum(z, 0.0)
    elif NAME == "elu":
        return tl.where(z > 0, z + 1, tl.exp(z))
    else:
        return z


@triton.jit
def with_slope(z, NAME: tl.constexpr):
    """The activation of z and its derivative there."""
    if NAME == "silu":
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    elif NAME == "sigmoid":
        s = tl.sigmoid(z)
        return s, s * (1 - s)
    elif NAME == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0, 1.0, 0.0)
    elif NAME == "elu":
        e = tl.exp(tl.minimum(z, 0.0))
        return tl.where(z > 0, z + 1, e), e
    else:
        return z, tl.full(z.shape, 1.0, z.dtype)
