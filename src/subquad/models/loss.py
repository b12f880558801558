"""Next-token cross-entropy, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad import parallel
from subquad.ops.layer import token_losses

IGNORED = -100
# Logits that exist at once in float32: 64 MiB.
CHUNK_ELEMENTS = 2**24


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """``[B,T]`` labels moved one to the left, so that place t holds the token after t.

    The last place of every sequence, packed ones included, is ignored. Where the sequences are
    split over several devices, the labels are this one's.
    """
    here, T = parallel.current(), labels.shape[1]
    if here is None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        shifted = parallel.shift_left(labels, IGNORED, mesh=here)
    if cu_seqlens is None:
        return shifted
    ends = (cu_seqlens[1:] - 1).clamp_min(0).long()
    if here is not None:
        ends = ends - here.rank * T
        ends = ends[(ends >= 0) & (ends < T)]
    return shifted.index_fill(1, ends, IGNORED)


def count_labels(labels: Tensor) -> Tensor:
    """How many labels count, over all devices that share the sequences; 1 at least."""
    here, count = parallel.current(), (labels != IGNORED).sum()
    return (count if here is None else parallel.total(count, here)).clamp_min(1)


def cross_entropy(
    x: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    head: Callable[[Tensor], Tensor] | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy in float32 without a float32 copy of all logits.

    Rows are taken in chunks; each chunk's logits are made again for the backward pass.

    Args:
        x: ``[B,T,vocab_size]`` logits, or ``[B,T,C]`` hidden states with ``head``.
        labels: ``[B,T]``, the token to predict at each place; -100 is ignored.
        vocab_size: width of the logits.
        head: makes logits from hidden states.
        count: divides the sum; the number of labels that are not ignored where None.

    Returns:
        a float32 scalar (float64 for float64 inputs); 0 where no label counts.
    """

    def total(x: Tensor, labels: Tensor) -> Tensor:
        logits = x if head is None else head(x)
        return token_losses(logits, labels, ignored=IGNORED).sum()

    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    flat, targets = x.flatten(0, 1), labels.flatten().to(x.device)
    if flat.shape[0] <= rows:
        loss = total(flat, targets)
    else:
        chunks = zip(flat.split(rows), targets.split(rows), strict=True)
        loss = torch.stack([checkpoint(total, *c, use_reentrant=False) for c in chunks]).sum()
    if count is None:
        count = (targets != IGNORED).sum().clamp_min(1)
    return loss / count
