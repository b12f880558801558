"""Parts of a softmax put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the union of disjoint key sets, from each set's ``(o, lse)``.

    Args:
        parts: pairs ``o [B,T,H,V]``, ``lse [B,T,H]``; a row without keys (lse = -inf) adds nothing.

    Returns:
        ``o`` in the dtype of the first part's, ``lse`` in float32 (float64 for float64).
        Differentiable.
    """
    if not parts:
        raise ValueError("merge needs at least one part, got none")
    for o, lse in parts:
        if o.shape[:-1] != lse.shape or o.shape != parts[0][0].shape:
            raise ValueError(
                f"parts must be o [B,T,H,V] and lse [B,T,H] of one shape, "
                f"got {[(list(o.shape), list(lse.shape)) for o, lse in parts]}"
            )
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0).nan_to_num(neginf=0.0)
    weights = (lses - top).exp()
    total = weights.sum(0)
    seen = total > 0
    share = weights / torch.where(seen, total, 1.0)
    o = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(share, parts, strict=True))
    lse = torch.where(seen, top + torch.where(seen, total, 1.0).log(), -torch.inf)
    return o.to(parts[0][0].dtype), lse
