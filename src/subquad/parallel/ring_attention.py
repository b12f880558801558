"""Ring attention: keys and values travel around the ranks, the parts of a softmax are merged.

Rank r attends to the block it holds, sends it on to r + 1 and takes that of r - 1, W - 1 times.
Parts are merged by their log-sum-exp. Backward, with the lse of the whole, every block gives its
own gradients; those of keys and values travel after their block and return home after W hops.

Sources: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
Context", arXiv 2310.01889; the striped layout, Brandon et al., arXiv 2311.09431.

Legend: B batch, C tokens of a rank, H query heads, G key/value heads, K key dim, V value dim,
W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops import checks
from subquad.ops.attention import merge
from subquad.ops.backend import without_autocast
from subquad.parallel import blocks
from subquad.parallel.collectives import Hop, exchange
from subquad.parallel.gather import check_attention, gathered
from subquad.parallel.mesh import Split, place

LAYOUTS = ("contiguous", "zigzag", "striped")


def layout_index(T: int, W: int, layout: str) -> Tensor:
    """int64 ``[W, T / W]``: which tokens each rank holds, in which order.

    "contiguous": a run each. "zigzag": of 2W runs, rank r holds r and 2W - 1 - r, so that causal
    work is equal. "striped": rank r holds r, r + W, ...

    Raises:
        ValueError: for an unknown layout, or where the ranks cannot share the tokens.
    """
    checks.one_of("layout", layout, LAYOUTS)
    parts = 2 * W if layout == "zigzag" else W
    if T % parts:
        raise ValueError(f"tokens must be a multiple of {parts} in layout {layout!r}, got {T}")
    tokens = torch.arange(T)
    if layout == "striped":
        return tokens.view(-1, W).T.contiguous()
    runs = tokens.view(parts, -1)
    return runs if layout == "contiguous" else torch.cat([runs[:W], runs[W:].flip(0)], 1)


@dataclass(frozen=True)
class Work:
    """A block product of one step: which local queries meet which of the keys held, and how."""

    q: slice
    k: slice
    mask: Mask | None

    def pairs(self, C: int) -> int:
        """Visible pairs."""
        T, S = (len(range(C)[s]) for s in (self.q, self.k))
        return T * S if self.mask is None else self.mask.area(T, S, 0)


def schedule(
    rank: int, source: int, C: int, layout: str, causal: bool, bounds: list[int] | None = None
) -> list[Work]:
    """What ``rank`` computes while it holds the keys of ``source``.

    Args:
        bounds: of packed sequences among all tokens (not in the striped layout).
    """
    every, half = slice(0, C), C // 2
    if bounds is not None:
        return list(_packed(rank, source, C, layout, causal, bounds))
    if not causal:
        return [Work(every, every, None)]
    if source == rank:
        return [Work(every, every, masks.causal())]
    earlier = source < rank
    if layout == "contiguous":
        return [Work(every, every, None)] if earlier else []
    if layout == "zigzag":
        return [Work(every, slice(0, half), None) if earlier else Work(slice(half, C), every, None)]
    if earlier:
        return [Work(every, every, masks.causal())]
    return [Work(slice(1, C), slice(0, C - 1), masks.causal())] if C > 1 else []


def _packed(
    rank: int, source: int, C: int, layout: str, causal: bool, bounds: list[int]
) -> Iterator[Work]:
    """Run by run: two runs share one sequence at most, unless they are the same."""
    for at, low in _runs(rank, C, layout, bounds[-1]):
        for to, start in _runs(source, C, layout, bounds[-1]):
            n = at.stop - at.start
            if start == low:
                inside = sorted({min(max(b, low), low + n) - low for b in bounds})
                yield Work(at, to, masks.packed(masks.causal() if causal else None, inside))
            elif start < low or not causal:
                yield from _rectangle(at, low, to, start, bounds)


def _rectangle(at: slice, low: int, to: slice, start: int, bounds: list[int]) -> Iterator[Work]:
    """Queries from ``low`` on and keys from ``start`` on meet in the one sequence that has both."""
    n = at.stop - at.start
    near = start + n if start < low else low + n  # between the runs, or where they touch
    far = low if start < low else start
    for first, last in pairwise(bounds):
        if first < near and far < last:
            q0, q1 = max(first - low, 0), min(last - low, n)
            k0, k1 = max(first - start, 0), min(last - start, n)
            yield Work(
                slice(at.start + q0, at.start + q1), slice(to.start + k0, to.start + k1), None
            )


def _runs(rank: int, C: int, layout: str, T: int) -> list[tuple[slice, int]]:
    """The runs of consecutive tokens of a rank: where they lie, and their first token."""
    if layout == "contiguous":
        return [(slice(0, C), rank * C)]
    half = C // 2
    return [(slice(0, half), rank * half), (slice(half, C), T - (rank + 1) * half)]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    offset: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    layout: str = "contiguous",
    mesh: Any = None,
) -> Any:
    """Softmax attention over a split sequence whose keys travel: memory of a rank is O(C).

    Args:
        q: ``[B,C,H,K]``; k: ``[B,C,G,K]``; v: ``[B,C,G,V]``, this rank's tokens in ``layout``,
            rotated by their places in the whole sequence.
        mask: ``mask.causal()``, or None for all pairs.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all W C tokens.
        scale, return_lse, backend: as in :func:`subquad.ops.attention.attention`.
        offset: None or 0, the whole sequence's queries stand at its keys.
        layout: "contiguous", "zigzag" (equal work on all ranks under a causal mask) or "striped";
            see :func:`layout_index`.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens (and ``lse [B,C,H]``).

    Raises:
        ValueError: for other masks, for arguments that do not fit, or that differ in shape between
            ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    checks.one_of("layout", layout, LAYOUTS)
    causal = mask is not None and mask != masks.full()
    if causal and mask != masks.causal():
        raise ValueError(f"mask must be causal() or None in a ring, got {mask}: use gather")
    if layout == "zigzag" and (q.shape[1] % 2 or not causal):
        raise ValueError(
            f"layout 'zigzag' takes an even number of tokens a rank and a causal mask, got "
            f"{q.shape[1]} and {mask}"
        )
    if layout == "striped" and cu_seqlens is not None:
        raise ValueError("cu_seqlens takes the layouts 'contiguous' and 'zigzag', got 'striped'")
    check_attention(q, k, v, mask, offset, cu_seqlens, here, f"ring_attention {layout}")
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    plan = [
        schedule(here.rank, (here.rank - step) % here.size, q.shape[1], layout, causal, bounds)
        for step in range(here.size)
    ]
    with without_autocast(q.device.type):
        o, lse = _Ring.apply(q, k, v, here, plan, scale, backend)
    return (o, lse) if return_lse else o


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, here, plan, scale, backend):
        wide = torch.promote_types(q.dtype, torch.float32)
        o = v.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        held = [k, v]
        for step, works in enumerate(plan):
            hop = Hop(held, here, "ring_attention") if step + 1 < here.size else None
            for work in works:
                part = blocks.forward(q[:, work.q], held[0][:, work.k], held[1][:, work.k],
                                      work.mask, scale, backend)  # fmt: skip
                o[:, work.q], lse[:, work.q] = merge([(o[:, work.q], lse[:, work.q]), part])
            held = held if hop is None else hop.wait()
        o = o.to(v.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = here, plan, scale, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        here, plan, scale, backend = ctx.rest
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        with without_autocast(q.device.type):
            grads = _backward(do, dlse, q, k, v, o, lse, here, plan, scale, backend)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v))), None, None, None, None


def _backward(do, dlse, q, k, v, o, lse, here: Split, plan, scale, backend):
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    held, gone = [k, v], cast("Hop | None", None)
    for step, works in enumerate(plan):
        hop = Hop(held, here, "ring_attention (backward)") if step + 1 < here.size else None
        own = [torch.zeros_like(x, dtype=lse.dtype) for x in held] if step else [dk, dv]
        for work in works:
            rows: Any = [None if x is None else x[:, work.q] for x in (do, dlse, q, o, lse)]
            keys = held[0][:, work.k], held[1][:, work.k]
            got = blocks.backward(rows, keys, work.mask, scale, backend)
            dq[:, work.q] += got[0]
            own[0][:, work.k] += got[1]
            own[1][:, work.k] += got[2]
        if gone is not None:  # what earlier ranks made of this block comes a hop behind it
            own = [mine + theirs for mine, theirs in zip(own, gone.wait())]
        gone = Hop(own, here, "ring_attention (backward)")
        held = held if hop is None else hop.wait()
    assert gone is not None
    dk, dv = gone.wait()
    return dq, dk, dv


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    mesh: Any = None,
    **options: Any,
) -> Any:
    """:func:`ring_attention` of consecutive tokens, dealt out anew so that causal work is equal.

    An odd number of tokens a rank stays where it is. A mask other than the causal one needs only
    some of the keys, or does not say where: they are gathered.
    """
    here = place(mesh)
    if mask is None or mask == masks.full():
        return ring_attention(q, k, v, mask, mesh=here, **options)
    if mask != masks.causal():
        return gathered(q, k, v, mask, mesh=here, **options)
    if q.shape[1] % 2:
        return ring_attention(q, k, v, mask, mesh=here, **options)
    lse = options.get("return_lse", False)
    q, k, v = _swap([q, k, v], here, to_zigzag=True)
    found = ring_attention(q, k, v, mask, mesh=here, layout="zigzag", **options)
    back = _swap(list(found) if lse else [found], here, to_zigzag=False)
    return tuple(back) if lse else back[0]


def _swap(tensors: list[Tensor], here: Split, *, to_zigzag: bool) -> list[Tensor]:
    """From two consecutive runs of tokens a rank to the two of the zigzag layout, or back."""
    W, rank = here.size, here.rank
    kept = (2 * rank, 2 * rank + 1)
    homes = [run if run < W else 2 * W - 1 - run for run in kept]
    order = sorted(range(2), key=lambda i: homes[i])
    out = [homes.count(peer) for peer in range(W)]
    owners = [rank // 2, (2 * W - 1 - rank) // 2]
    back = [owners.count(peer) for peer in range(W)]
    found = []
    by_dtype = {t.dtype: [x for x in tensors if x.dtype == t.dtype] for t in tensors}
    for group in by_dtype.values():
        flat = torch.cat([t.flatten(2) for t in group], -1)
        runs = flat.unflatten(1, (2, -1)).movedim(1, 0)
        if to_zigzag:
            runs = exchange(runs[order], here, "ring", out, back)
        else:
            runs = exchange(runs, here, "ring", back, out)[order]
        parts = runs.movedim(0, 1).flatten(1, 2).split([t[0, 0].numel() for t in group], -1)
        found += [part.reshape(t.shape) for part, t in zip(parts, group)]
    return found
