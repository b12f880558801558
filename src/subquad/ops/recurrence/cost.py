"""What the recurrence costs, as formulas of the shape."""

from __future__ import annotations

from subquad.ops.recurrence.plan import chunk_limit


def flops(
    *, B: int, T: int, H: int, K: int, V: int, delta: bool = False, chunk: int | None = None
) -> int:
    """Multiply-adds (counted as 2) of the chunked forward pass.

    Each token meets the keys (c K) and the values (c V) of its chunk of c tokens, and the state
    twice, to read and to write (2 K V). The delta rule adds the products of the keys (c K), the
    triangular inverse (c^2 / 3) and its use (c V), and one more read of the state (K V).
    """
    c = chunk_limit(max(K, V)) if chunk is None else chunk
    plain = c * (K + V) + 2 * K * V
    extra = c * (K + V) + c * c // 3 + K * V if delta else 0
    return 2 * B * T * H * (plain + extra)


def bytes_moved(*, B: int, T: int, H: int, K: int, V: int, itemsize: int, gates: int = 0) -> int:
    """Compulsory bytes: q, k, v and ``gates`` float32 gates a head and token read, o written."""
    return B * T * H * ((2 * K + 2 * V) * itemsize + 4 * gates)


def state_bytes(*, H: int, K: int, V: int, B: int = 1) -> int:
    """Bytes of the float32 state."""
    return 4 * B * H * K * V


def saved_bytes(*, B: int, T: int, H: int, K: int, V: int) -> int:
    """Bytes of the float32 states that training keeps, one a chunk, beside the inputs."""
    return state_bytes(H=H, K=K, V=V, B=B) * -(-T // chunk_limit(max(K, V)))
