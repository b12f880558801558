"""LASP-2H's softmax layers: keys and values are gathered.

Source: Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
arXiv 2502.07563, section 3.4.

Legend: B batch, C tokens of a rank, H query heads, G key/value heads, K key dim, V value dim,
W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.parallel.collectives import gather
from subquad.parallel.mesh import Split, place


def gathered(
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
    """LASP-2H's softmax layers: keys and values are gathered, this rank's queries see them all.

    Args:
        q: ``[B,C,H,K]``; k: ``[B,C,G,K]``; v: ``[B,C,G,V]``, this rank's tokens.
        mask: any mask over the whole sequence; None keeps everything.
        cu_seqlens: int32 ``[N+1]``, the boundaries among all W C tokens.
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
    B, C = check_attention(q, k, v, mask, offset, cu_seqlens, here, "gather")
    if cu_seqlens is not None:
        mask = masks.packed(mask, cu_seqlens)
    sizes = [k.shape[3], v.shape[3]]
    everyone = gather(torch.cat([k, v], -1), here, "gather")
    k, v = everyone.transpose(0, 1).reshape(B, -1, k.shape[2], sum(sizes)).split(sizes, -1)
    return attention(q, k, v, mask, offset=here.rank * C, **options)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    offset: int | None,
    cu_seqlens: Tensor | None,
    here: Split,
    op: str,
) -> tuple[int, int]:
    """B and C, once the arguments are known to fit, here and on all ranks."""
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B T G K"), "v": (v, "B T G V")})
    checks.same_dtype({"q": q, "k": k, "v": v})
    checks.divides("heads of k", k.shape[2], "heads of q", q.shape[2])
    checks.cu_seqlens(cu_seqlens, B=q.shape[0], T=q.shape[1] * here.size)
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask must be a Mask or None, got {type(mask).__name__}")
    if offset not in (None, 0):
        raise ValueError(f"offset must be None where the sequence is split, got {offset}")
    if q.shape[1] < 1:
        raise ValueError("every rank must hold a token, got T=0")
    here.agree(op, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    return q.shape[0], q.shape[1]
