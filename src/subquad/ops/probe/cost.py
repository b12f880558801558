"""What the probe costs, as formulas of the shape and of the visible pairs."""

from __future__ import annotations


def flops(*, area: int, K: int, V: int, backward: bool = False) -> int:
    """Multiply-adds (counted as 2) over ``area`` visible pairs, summed over batch rows and heads.

    Forward: scores, t, and two sums of values, 2 (2 K + 2 V) a pair, twice softmax attention.
    Backward, on top: both scores and do . v again, dq, dr, two parts of dk, and dv,
    2 (6 K + 2 V) a pair.
    """
    return 2 * area * (2 * K + 2 * V + (6 * K + 2 * V if backward else 0))


def local_linear_flops(*, area: int, K: int, V: int, steps: int, backward: bool = False) -> int:
    """Of local linear attention: a pass of the probe over the keys for their mean, ``steps`` for
    the solution, one over the values. Training adds the equation's pass with its backward,
    the values' backward, and ``steps`` passes for the gradient of the solution."""
    keys = flops(area=area, K=K, V=K)
    forward = (1 + steps) * keys + flops(area=area, K=K, V=V)
    if not backward:
        return forward
    grads = flops(area=area, K=K, V=K, backward=True) + flops(area=area, K=K, V=V, backward=True)
    return forward + steps * keys + grads - flops(area=area, K=K, V=V)


def bytes_moved(
    *, B: int, T: int, S: int, H: int, G: int, K: int, V: int, itemsize: int
) -> int:  # fmt: skip
    """Compulsory bytes of the forward pass: q, r, k and v read, o written."""
    return B * itemsize * (T * H * (2 * K + V) + S * G * (K + V))


def cache_bytes(*, S: int, G: int, K: int, V: int, itemsize: int, B: int = 1) -> int:
    """Bytes of the keys and values of S tokens: what decoding reads (once a pass)."""
    return B * S * G * (K + V) * itemsize
