"""Whether a model's attention rotates last, so that a policy can do it in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.ops.attention import attention
from subquad.ops.attention.token import Rope
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


def table(rotate: Callable[[Tensor, Tensor], Tensor], n: int, like: Tensor) -> Rope | None:
    """A rotation to the places 0..n-1 in numbers, found by what it makes of some vectors; None for
    one that is not of that form.

    Args:
        rotate: as :class:`~subquad.policies.base.Call` has it; like: ``[...,K]``, for its dtype.
    """
    K, device = like.shape[-1], like.device
    feature, place = torch.arange(K, device=device), torch.arange(n, device=device)
    basis = torch.eye(K, dtype=like.dtype, device=device).expand(1, TOKENS, K, K)
    made = rotate(basis, torch.arange(TOKENS, device=device)[None])[0].abs().amax(0)
    made.fill_diagonal_(0)  # of feature i (a row) in j
    partner = torch.where(made.amax(1) > 0, made.argmax(1), feature)
    if not torch.equal(partner[partner], feature):
        return None
    lower = feature < partner
    halves = torch.stack([lower, ~lower]).to(like.dtype).expand(1, n, 2, K)
    low, high = rotate(halves, place[None])[0].unbind(1)  # what either half of the features makes
    cos, sin = torch.where(lower, low, high), torch.where(lower, high, low)
    found = Rope(cos, sin[:, partner], partner.int())
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(1, n, 2, K, generator=generator, device=device).to(like.dtype)
    return found if _near(found(noise, place), rotate(noise, place[None])) else None


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= NEAR * b.abs().max())
