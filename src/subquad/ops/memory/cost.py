"""What the memory costs, as formulas of the shape."""

from __future__ import annotations

from subquad.ops.memory.chunk import WIDEST, slab_width


def net_size(*, d: int, depth: int, expand: int, gain: bool) -> int:
    """Weights of one head's network: d to d in ``depth`` layers, ``expand`` d wide inside."""
    inner = d if depth == 1 else expand * d
    layers = d * d if depth == 1 else 2 * d * inner + (depth - 2) * inner * inner
    return layers + (d if gain else 0)


def flops(*, B: int, T: int, H: int, d: int, size: int, chunk: int | None) -> int:
    """Multiply-adds (counted as 2) of the chunked forward pass.

    A token meets every weight six times (the loss's forward and backward, the read of W and of S,
    the updates of W and of S) and every layer's inputs and gradients in its slab of w tokens; the
    gates are products of matrices ``[w,w]``.
    """
    w = slab_width(chunk) if chunk is None or chunk <= T else max(1, min(T, WIDEST))
    widths = 2 * size // d  # inputs and outputs of the layers, about
    return 2 * B * T * H * (6 * size + w * widths + w * w)


def state_bytes(*, H: int, size: int, chunk: int | None, step: int = 1, B: int = 1) -> int:
    """Bytes of the float32 state: W and S, the base where chunks are longer than a token, the
    pending gradients where steps are, and the count of tokens."""
    copies = 2 + (chunk != 1) + (step > 1)
    return B * (4 * copies * H * size + 8)
