"""Attention over neighborhoods on a grid of one to three axes, with tokens that everyone sees.

Sources: Hassani et al., arXiv 2403.04690 (neighborhood attention) and 2504.16922 (stride, and the
order of tokens by tiles).

Legend: B batch, L1..Ln grid, H query heads, G key/value heads, K key dim, V value dim, M additional
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from torch import Tensor

from subquad import mask as masks
from subquad.mask.grid import Axis, Neighborhood
from subquad.mask.kept import kept
from subquad.mask.simulate import simulate
from subquad.ops import checks
from subquad.ops.attention import attention, merge

# Tiles that the torch form and the GPU kernel walk, by the number of axes.
TILES = {"cpu": {1: (32,), 2: (4, 8), 3: (2, 4, 4)}, "cuda": {1: (128,), 2: (8, 16), 3: (4, 4, 8)}}
LEAST = 8192  # tokens from which sorting may pay
GAIN = 1.5  # and by how much fewer the visited tiles must then be


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: Sequence[int] | str | None = "auto",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each token over its neighborhood.

    Args:
        q: ``[B,L1..Ln,H,K]``; k: ``[B,L1..Ln,G,K]``; v: ``[B,L1..Ln,G,V]``, n = 1, 2 or 3.
        window, stride, dilation, causal: one value or one per axis, see
            :func:`subquad.mask.neighborhood`.
        extra: ``k' [B,M,G,K]`` and ``v' [B,M,G,V]``: tokens that every query sees beside its
            neighbors, in one softmax.
        scale: multiplies the scores; K**-0.5 where None.
        tile: the order that the tokens are brought into (it changes the cost, not the result): a
            tile's sizes, None to leave them, "auto" to sort where it saves work.
        return_lse: return ``lse [B,L1..Ln,H]`` too.
        backend: see :func:`subquad.ops.attention.attention`.

    Returns:
        ``o [B,L1..Ln,H,V]`` in the dtype of v, and lse where asked.

    Raises:
        ValueError: for shapes that do not fit, and windows that do not fit the grid.
    """
    grid = tuple(q.shape[1:-2])
    for name, t in (("k", k), ("v", v)):
        if t.dim() != q.dim() or t.shape[1:-2] != grid:
            raise ValueError(f"{name} must lie on the grid {grid} of q, got {list(t.shape)}")
    mask = masks.neighborhood(grid, window, stride, dilation, causal)
    if isinstance(tile, str):
        checks.one_of("tile", tile, ("auto",))
        tile = best_tile(mask.axes, q.device.type)
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    everyone = None
    if extra is not None:
        everyone = attention(q, *extra, scale=scale, return_lse=True, backend=backend)
    if tile is not None:
        mask = masks.neighborhood(grid, window, stride, dilation, causal, tile=tile)
        order, back = (index.to(q.device) for index in _orders(mask))
        q, k, v = (t.index_select(1, order) for t in (q, k, v))
    o, lse = attention(q, k, v, mask, scale=scale, return_lse=True, backend=backend)
    if tile is not None:
        o, lse = o.index_select(1, back), lse.index_select(1, back)
    if everyone is not None:
        o, lse = merge([(o, lse), everyone])
    o, lse = o.unflatten(1, grid), lse.unflatten(1, grid)
    return (o, lse) if return_lse else o


@kept(64)
def _orders(mask: Neighborhood) -> tuple[Tensor, Tensor]:
    """The token that stands at each place (any at padding), and each token's place."""
    order = mask.order()
    places = (order >= 0).nonzero().squeeze(1)
    return order.clamp_min(0), places[order[places].argsort()]


@lru_cache(maxsize=256)
def best_tile(axes: tuple[Axis, ...], device: str) -> tuple[int, ...] | None:
    """The tile to sort the tokens by, None where row-major order does as well."""
    if prod(axis.length for axis in axes) < LEAST:
        return None
    tile = TILES.get(device, TILES["cuda"])[len(axes)]
    left, sorted_ = simulate(axes, tile, mode="flat"), simulate(axes, tile)
    return tile if left.mean >= GAIN * sorted_.mean else None
