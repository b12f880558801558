"""Who may see whom, as an algebra of small immutable masks.

    from subquad import mask
    m = mask.causal() & (mask.window(511) | mask.sinks(4))
    m.dense(8, 8)            # bool [8,8], for the reference and for pictures
    m.tiles(T, T, 128)       # empty, full and partial tiles, without a dense tensor
    m.area(T, T)             # pairs kept: what attention costs

Positions: query ``i`` of T queries over S keys stands at key position ``p = i + offset``, where
``offset`` is S - T unless said otherwise. Every mask is a statement about ``p`` and the key ``j``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.mask.algebra import Band, First, Mask, Stairs, Strided
from subquad.mask.data import Blocks, Documents, Packed, PerHead, Spans, choice
from subquad.mask.grid import Neighborhood, axes
from subquad.mask.placed import Placed
from subquad.mask.table import Table, positive, readable
from subquad.mask.tiles import Tiles

__all__ = [
    "Band",
    "Mask",
    "Tiles",
    "block_band",
    "blocks",
    "causal",
    "choice",
    "documents",
    "full",
    "neighborhood",
    "packed",
    "per_head",
    "placed",
    "prefix",
    "sinks",
    "spans",
    "strided",
    "window",
]


def full() -> Mask:
    """Everything is visible."""
    return Band(None, None)


def causal() -> Mask:
    """``j <= p``: nothing from the future."""
    return Band(0, None)


def window(left: int, right: int = 0) -> Mask:
    """``p - left <= j <= p + right``: ``left + 1 + right`` keys, the query's own included.

    Raises:
        ValueError: if a side is negative.
    """
    positive("left", left, zero=True)
    positive("right", right, zero=True)
    return Band(-right, left)


def sinks(n: int) -> Mask:
    """``j < n``: the first n keys, for everyone (join with ``causal()``)."""
    positive("n", n, zero=True)
    return First(None, n)


def prefix(n: int) -> Mask:
    """``p < n`` and ``j < n``: the first n tokens see each other; a prefix LM is
    ``causal() | prefix(n)``."""
    positive("n", n, zero=True)
    return First(n, n)


def strided(stride: int, width: int = 1) -> Mask:
    """``(p - j) mod stride < width``: every stride-th key back from the query (Child et al. 2019).

    Raises:
        ValueError: unless ``1 <= width <= stride``.
    """
    positive("stride", stride)
    positive("width", width)
    if width > stride:
        raise ValueError(f"width must be at most stride={stride}, got {width}")
    return Strided(stride, width)


def block_band(
    low: int | None,
    high: int | None,
    size: int,
    keys: int | None = None,
    *,
    shift: int = 0,
    key_shift: int | None = None,
) -> Mask:
    """``low <= (p + shift) // size - (j + key_shift) // keys <= high``: a band of blocks.

    ``block_band(0, 0, n)`` keeps a token's own block, ``block_band(0, 1, n)`` the one before too;
    with ``keys=1`` the keys may be summaries of which one is made every ``size`` tokens.

    Args:
        low: least distance in blocks, None for none (join with ``causal()``).
        high: most, None for none.
        size: queries in a block; keys: keys in a block, ``size`` where None.
        shift: moves the boundaries of the blocks of queries to the left; key_shift: those of the
            keys, ``shift`` where None.
    """
    positive("size", size)
    keys = size if keys is None else keys
    positive("keys", keys)
    return Stairs(low, high, size, keys, shift, shift if key_shift is None else key_shift)


def neighborhood(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    tile: Sequence[int] | None = None,
) -> Neighborhood:
    """The nearest tokens on a grid (Hassani et al., arXiv 2403.04690 and 2504.16922).

    On each axis a token sees ``window`` keys, ``dilation`` apart: centred on it, ``window // 2`` of
    them before, and pushed inward at the ends; where ``causal``, itself and those before it.
    ``stride`` neighbors share the window of one of them. A key is seen that is on all axes.

    Args:
        grid: the lengths of one to three axes; tokens are in row-major order.
        window, stride, dilation, causal: one value, or one per axis.
        tile: order the tokens by tiles instead (see ``Neighborhood.order``), so that a kernel's
            tiles hold neighbors.

    Raises:
        ValueError: unless 2 <= window, 1 <= stride <= window, window * dilation <= length.
    """
    made = axes(grid, window, stride, dilation, causal)
    if tile is not None:
        tile = tuple(tile)
        if len(tile) != len(made) or min(tile) < 1:
            raise ValueError(f"tile must be {len(made)} positive sizes, got {tile}")
    return Neighborhood(made, tile)


def placed(part: Mask, queries: Tensor, keys: Tensor | None = None) -> Mask:
    """``part`` counted from each row's own start: for rows padded on the left, and for a state that
    forgot its first tokens.

    Args:
        part: over tokens counted from 0.
        queries: int ``[B]`` or ``[1]``, the position that counts as the query 0 of each row. What
            lies before it is padding, which sees nothing and is seen by nobody; it is negative
            where the row's first tokens are no longer there.
        keys: the same for keys; as queries where None.
    """
    keys = queries if keys is None else keys
    for name, t in (("queries", queries), ("keys", keys)):
        if t.dim() != 1 or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"{name} must be int [B], got {t.dtype} of {list(t.shape)}")
    if len(queries) != len(keys):
        raise ValueError(f"keys must place {len(queries)} rows, got {len(keys)}")
    return Placed(part, Table(queries), Table(keys))


def documents(ids: Tensor | Sequence[int]) -> Mask:
    """Tokens of one document see each other.

    Args:
        ids: int ``[S]`` or ``[B,S]``, the document of every key; -1 is padding, which sees nothing
            and is seen by nobody.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be int [S] or [B,S], got {ids.dtype} of {list(ids.shape)}")
    return Documents(Table(ids[0] if ids.dim() == 2 and len(ids) == 1 else ids))


def packed(part: Mask | None, cu_seqlens: Tensor | Sequence[int]) -> Mask:
    """``part`` inside each packed sequence, at positions counted from its start; nothing between.

    Args:
        part: None where a sequence's tokens all see each other.
        cu_seqlens: int ``[N+1]``, from 0, never falling.
    """
    bounds = torch.as_tensor(cu_seqlens).tolist()
    if len(bounds) < 2 or bounds[0] != 0 or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 without falling, got {bounds}")
    return Packed(full() if part is None else part, tuple(bounds))


def blocks(index: Tensor, size: int, rows: int | None = None) -> Mask:
    """Chosen key blocks: query block ``r = p // rows`` sees the key blocks ``index[..., r, :]``.

    An index made on an accelerator stays there: nothing waits for it (and its values are checked
    only with SUBQUAD_CHECK=1).

    Args:
        index: int ``[R,n]``, ``[H,R,n]`` or ``[B,H,R,n]``, blocks of ``size`` keys, rising in each
            row, with -1 at the end of shorter ones. H may be the number of query heads, of key
            heads (shared within a group), or 1.
        size: keys in a block.
        rows: queries in a block; ``size`` where None, 1 for a choice of each token's own.

    Raises:
        ValueError: for an index that is not int, not rising, or below -1.
    """
    positive("size", size)
    rows = size if rows is None else rows
    positive("rows", rows)
    return Blocks(Table(_listed("index", index, 1)), size, rows)


def spans(starts: Tensor, columns: Tensor, size: int, rows: int | None = None) -> Mask:
    """Chosen runs of keys that start anywhere, and single keys beside them (as vertical-slash
    attention finds them): query block ``r = p // rows`` sees ``size`` keys from each
    ``starts[..., r, :]`` on (as far as there are any) and the keys ``columns[..., r, :]``.

    Args:
        starts: int ``[R,n]``, ``[H,R,n]`` or ``[B,H,R,n]``, rising by at least ``size``, with -1 at
            the end of shorter rows.
        columns: int, the same but for the last axis, rising, none of them inside a run.
        size: keys in a run.
        rows: queries in a block; ``size`` where None.

    Raises:
        ValueError: as :func:`blocks`.
    """
    positive("size", size)
    rows = size if rows is None else rows
    positive("rows", rows)
    starts, columns = _listed("starts", starts, size), _listed("columns", columns, 1)
    if starts.shape[:-1] != columns.shape[:-1]:
        raise ValueError(
            f"columns must be {[*starts.shape[:-1], 'm']} as starts, got {list(columns.shape)}"
        )
    return Spans(Table(starts), Table(columns), size, rows)


def _listed(name: str, index: Tensor, apart: int) -> Tensor:
    """The lists without leading axes of 1, once they are known to rise by ``apart``."""
    if index.dim() not in (2, 3, 4) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"{name} must be int [R,n], [H,R,n] or [B,H,R,n], got {index.dtype} of "
            f"{list(index.shape)}"
        )
    if readable(index):
        here, after = index[..., :-1], index[..., 1:]
        if int(index.min()) < -1:
            raise ValueError(f"{name} must be >= -1, got {int(index.min())}")
        if bool(((after >= 0) & ((here < 0) | (after - here < apart))).any()):
            raise ValueError(f"{name} must rise by {apart} or more in each row, -1 at the end")
    while index.dim() > 2 and index.shape[0] == 1:
        index = index[0]
    return index


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask for each head, in order (each may itself differ over the batch)."""
    masks = tuple(masks)
    if not masks or not all(isinstance(m, Mask) and m.planes[1] == 1 for m in masks):
        raise ValueError(f"masks must be Masks without heads of their own, got {masks}")
    return PerHead(masks)
