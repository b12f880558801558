"""What the recurrence costs, as formulas of the shape."""

from __future__ import annotations

CHUNK = 64


def flops(
    *, B: int, T: int, H: int, K: int, V: int, delta: bool = False, chunk: int = CHUNK
) -> int:
    """Multiply-adds (counted as 2) of the chunked forward pass.

    Each token meets its chunk's keys (c K) and values (c V) and the state twice (read and write,
    2 K V); the delta rule adds W and U, c (K + V), the solve, c^2, and the correction, K V.
    """
    plain = chunk * (K + V) + 2 * K * V
    extra = chunk * (2 * K + V) + chunk * chunk + K * V if delta else 0
    return 2 * B * T * H * (plain + extra)


def bytes_moved(*, B: int, T: int, H: int, K: int, V: int, itemsize: int, gates: int = 0) -> int:
    """Compulsory bytes: q, k, v and ``gates`` float32 gates a head and token read, o written."""
    return B * T * H * ((2 * K + 2 * V) * itemsize + 4 * gates)


def state_bytes(*, H: int, K: int, V: int, B: int = 1) -> int:
    """Bytes of the float32 state."""
    return 4 * B * H * K * V
