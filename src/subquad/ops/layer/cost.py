"""What the layer's short steps move through memory, as formulas of the shape: they are bound by it.

Every function counts elements, each input read and each output written once.
"""

from __future__ import annotations


def short_conv(*, tokens: int, D: int, size: int, backward: bool = False) -> int:
    """x and y; in the backward pass dy, x and dx."""
    return (3 if backward else 2) * (tokens * D + size * D)


def norm(*, tokens: int, D: int, gate: bool = False, backward: bool = False) -> int:
    """x and y, and the gate; in the backward pass dy, x, dx, the gate and its gradient."""
    return tokens * D * ((3 + 2 * gate) if backward else (2 + gate))


def gated(*, tokens: int, D: int, backward: bool = False) -> int:
    """x, gate and y; in the backward pass dy, x, gate and two gradients."""
    return tokens * D * (5 if backward else 3)
