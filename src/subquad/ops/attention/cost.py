"""What attention costs, as formulas of the shape and the mask's area."""

from __future__ import annotations


def flops(*, area: int, K: int, V: int, backward: bool = False) -> int:
    """Multiply-adds (counted as 2) over ``area`` kept pairs, summed over batch rows and heads.

    Forward: scores and values, 2 (K + V) a pair. Backward, on top: the scores and dP again, dq,
    dk and dv, 2 (3 K + 2 V) a pair.
    """
    return 2 * area * (K + V + (3 * K + 2 * V if backward else 0))


def bytes_moved(
    *, B: int, T: int, S: int, H: int, G: int, K: int, V: int, itemsize: int, lse: bool = False
) -> int:
    """Compulsory bytes of the forward pass: q, k and v read, o (and float32 lse) written."""
    return B * (itemsize * (T * H * (K + V) + S * G * (K + V)) + (4 * T * H if lse else 0))


def cache_bytes(*, S: int, G: int, K: int, V: int, itemsize: int, B: int = 1) -> int:
    """Bytes of the keys and values of S tokens: what decoding reads at every step."""
    return B * S * G * (K + V) * itemsize
