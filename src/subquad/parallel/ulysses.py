"""DeepSpeed-Ulysses: heads are dealt out for tokens before an operation, and back after it.

Every rank then runs the ordinary operation over the whole sequence on its share of the heads, so
any mask, and any operation that works head by head, does.

Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme
Long Sequence Transformer Models", arXiv 2309.14509, section 3.

Legend: B batch, C tokens of a rank, T = W C, H query heads, G key/value heads, W ranks, h = H / W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.mask import Mask
from subquad.ops.attention import attention
from subquad.ops.layout import repeat_heads
from subquad.ops.recurrence import recurrence
from subquad.parallel.collectives import exchange, gather
from subquad.parallel.gather import check_attention
from subquad.parallel.lasp2 import check_recurrence
from subquad.parallel.mesh import Split, place


def scatter_heads(x: Tensor, here: Split) -> Tensor:
    """``[B,C,H,...]``, all heads of these tokens, to ``[B,T,h,...]``, these heads of all tokens."""
    B, C, H = x.shape[:3]
    pieces = x.unflatten(2, (here.size, H // here.size)).movedim(2, 0)  # [W,B,C,h,...]
    got = exchange(pieces, here, "ulysses")
    return got.transpose(0, 1).reshape(B, here.size * C, *got.shape[3:])


def gather_heads(x: Tensor, here: Split) -> Tensor:
    """The other way round."""
    pieces = x.unflatten(1, (here.size, -1)).movedim(1, 0)  # [W,B,C,h,...]
    got = exchange(pieces, here, "ulysses")
    return got.movedim(0, 2).flatten(2, 3)


def dealt(name: str, x: Tensor, here: Split) -> Tensor:
    """``x [B,C,G,...]`` with heads that the ranks can share: fewer than ranks are repeated.

    Raises:
        ValueError: where neither divides the other.
    """
    G, W = x.shape[2], here.size
    if G % W == 0:
        return x
    if W % G == 0:
        return repeat_heads(x, W)
    raise ValueError(f"heads of {name} must be a multiple or a divisor of the {W} ranks, got {G}")


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    offset: int | None = None,
    cu_seqlens: Tensor | None = None,
    mesh: Any = None,
    **options: Any,
) -> Any:
    """Softmax attention over a split sequence, a share of the heads on every rank.

    Args:
        q: ``[B,C,H,K]``, this rank's tokens, H a multiple of W; k: ``[B,C,G,K]``; v: ``[B,C,G,V]``,
            G a multiple or a divisor of W (then heads are sent to several ranks).
        mask: any mask over the whole sequence whose heads agree; None keeps everything.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all T tokens.
        offset: None or 0, the whole sequence's queries stand at its keys.
        mesh: one-dimensional mesh or process group; the one that is set where None.
        **options: scale, return_lse, backend of :func:`subquad.ops.attention.attention`.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens (and ``lse [B,C,H]``).

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    if q.shape[2] % here.size:
        raise ValueError(
            f"heads of q must be a multiple of the {here.size} ranks, got {q.shape[2]}"
        )
    if mask is not None and isinstance(mask, Mask) and mask.planes[1] != 1:
        raise ValueError(f"mask must be the same for all heads, got one for {mask.planes[1]}")
    k, v = dealt("k", k, here), dealt("v", v, here)
    check_attention(q, k, v, mask, offset, cu_seqlens, here, "ulysses")
    q, k, v = (scatter_heads(x, here) for x in (q, k, v))
    found = attention(q, k, v, mask, cu_seqlens=cu_seqlens, **options)
    if isinstance(found, tuple):
        return tuple(gather_heads(t, here) for t in found)
    return gather_heads(found, here)


def ulysses_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mesh: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The (gated, delta) linear recurrence over a split sequence, a share of the heads on every
    rank.

    Args:
        q: ``[B,C,H,K]``, this rank's tokens; so k, v, beta and a decay with a time axis. Every head
            count is a multiple or a divisor of W, the largest one a multiple.
        decay, beta: as in :func:`subquad.ops.recurrence.recurrence`.
        state: ``[N,H,K,V]`` before the whole sequences, the same on every rank.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all T tokens.
        mesh: one-dimensional mesh or process group; the one that is set where None.
        **options: scale, form, backend of that operation.

    Returns:
        ``o [B,C,H,V]`` of this rank's tokens, and the state ``[N,H,K,V]`` after the whole sequences
        on every rank (of no sequence under ``sequence(mesh, states=False)``).

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    check_recurrence(q, k, v, cu_seqlens, here)
    timed = {"q": q, "k": k, "v": v, "beta": beta}
    timed["decay"] = None if decay is None or decay.dim() == 1 else decay
    H = max(t.shape[2] for t in timed.values() if t is not None)
    if H % here.size:
        raise ValueError(f"heads must be a multiple of the {here.size} ranks, got {H}")
    timed = {name: None if t is None else dealt(name, t, here) for name, t in timed.items()}
    here.agree("ulysses", state=state, cu_seqlens=cu_seqlens, constant=decay, **timed)
    mine = slice(here.rank * H // here.size, (here.rank + 1) * H // here.size)
    got = {name: None if t is None else scatter_heads(t, here) for name, t in timed.items()}
    if decay is not None and decay.dim() == 1:
        got["decay"] = decay.repeat_interleave(H // len(decay))[mine]
    o, last = recurrence(
        **got,  # type: ignore[arg-type]
        state=None if state is None else state[:, mine],
        cu_seqlens=cu_seqlens,
        **options,
    )
    o = gather_heads(o, here)
    if not here.states:
        return o, last[:0]
    return o, torch.cat(tuple(gather(last, here, "ulysses")), 1)
