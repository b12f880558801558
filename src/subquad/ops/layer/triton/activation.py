"""Activations and their slopes inside kernels, by the names of
:data:`~subquad.ops.layer.activation.ACTIVATIONS`."""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    """exp2() is one instruction, exp(), which minds the smallest numbers, four."""
    return 1 / (1 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def activate(z, NAME: tl.constexpr):
    if NAME == "silu":
        return z * _sigmoid(z)
    elif NAME == "sigmoid":
        return _sigmoid(z)
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
        s = _sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    elif NAME == "sigmoid":
        s = _sigmoid(z)
        return s, s * (1 - s)
    elif NAME == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0, 1.0, 0.0)
    elif NAME == "elu":
        e = tl.exp(tl.minimum(z, 0.0))
        return tl.where(z > 0, z + 1, e), e
    else:
        return z, tl.full(z.shape, 1.0, z.dtype)
