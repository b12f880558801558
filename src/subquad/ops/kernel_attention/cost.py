"""What mixed attention costs, as formulas of the shape."""

from __future__ import annotations

from subquad.ops.kernel_attention.near import Near


def flops(*, T: int, H: int, K: int, V: int, F: int, near: Near) -> int:
    """Multiply-adds (counted as 2) of the forward pass over one sequence of T tokens: the exact
    pairs, and a write to and a read of the state (its key sum included) a token."""
    return 2 * H * (near.pairs(T) * (K + V) + 2 * T * F * (V + 1))


def state_bytes(*, H: int, F: int, V: int, B: int = 1) -> int:
    """Bytes of the float32 state (S, z)."""
    return 4 * B * H * F * (V + 1)
