"""Whether a model's attention rotates last, so that a policy can do it in its place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.ops.attention import attention
from subquad.policies.base import Call

if TYPE_CHECKING:
    from subquad.policies.hook import Applied

TOKENS = 4  # the second is turned by a radian already
NEAR = 0.02  # of the largest value: what half precision rounds


@torch.no_grad()
def rotating(applied: Applied) -> list[bool]:
    """For each layer, whether it rotates queries and keys at all.

    A few tokens go through the model as it is, and again with its rotation left to us: what enters
    attention must be the same, rotated or, in layers without positions, as it is.

    Raises:
        ValueError: for a layer of which neither holds, as one that norms after the rotation.
    """
    own: dict[int, Call] = {}
    found: list[bool] = []

    def note(call: Call) -> Call:
        own[call.site.index] = call
        return call

    def compare(call: Call) -> Call:
        wanted = own[call.site.index]
        for rotates in (True, False):
            try:
                q, k = (call.rotate(x, call.positions) if rotates else x for x in (call.q, call.k))
            except (RuntimeError, TypeError):  # it is rotated in parts, or in a way of its own
                continue
            if _near(q, wanted.q) and _near(k, wanted.k):
                found.append(rotates)
                return dataclasses.replace(call, q=q, k=k)
        raise ValueError(
            f"layer {call.site.index} of {type(applied.model).__name__} must rotate whole queries "
            f"and keys, last of all, for {type(applied.policy).__name__} to renumber them"
        )

    for late, probe in ((False, note), (True, compare)):
        applied.run(torch.arange(TOKENS)[None], probe, late)
    return found


def attend(call: Call) -> Tensor:
    """Attention of the few tokens alone, without a cache."""
    return attention(call.q, call.k, call.v, call.mask(), scale=call.scale).contiguous()


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= NEAR * b.abs().max())
