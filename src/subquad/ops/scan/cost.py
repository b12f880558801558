"""What the scan costs, as formulas of the shape."""

from __future__ import annotations


def flops(*, B: int, T: int, D: int) -> int:
    """The gate's exponential, multiply and add in the chunk, the reach, multiply and add of the
    state, counted as 5 a token and channel."""
    return 5 * B * T * D


def state_bytes(*, D: int, B: int = 1) -> int:
    """Bytes of the float32 state."""
    return 4 * B * D
