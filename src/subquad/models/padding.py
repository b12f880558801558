"""From an attention mask to what the mixers take: padding on the left, or none."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.caches.states import StateCache


def left_padding(mask: Tensor | None, x: Tensor, cache: StateCache) -> tuple[Tensor | None, bool]:
    """bool ``[B,T]`` of the padding on the left, None without any, and whether it is on the right.

    Where every sequence has begun, no padding can follow and a single token is not looked at.
    """
    if mask is None:
        if cache.pending is not None:
            raise ValueError("attention_mask must be given until every sequence has begun")
        return None, False
    B, T = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"attention_mask must be [B,T] or [B,past+T], got {list(mask.shape)}")
    padding = mask[:, -T:] == 0
    if torch.compiler.is_compiling():
        return padding, False
    if (cache.states and T == 1) or not padding.any():
        return None, False
    right = bool((padding[:, 1:] & ~padding[:, :-1]).any()) and not bool(padding[:, 0].any())
    return None if right else padding, right


def unstarted(padding: Tensor | None) -> bool:
    """Whether some sequence has had nothing but padding so far."""
    if padding is None or torch.compiler.is_compiling():
        return False
    return bool(padding[:, -1].any())
