"""Golden vectors of operations: what a system's authors computed without a layer around it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import subquad
from kit import close
from subquad.mixers.infllm_v2 import block_scores
from subquad.mixers.power_attention import pattern
from subquad.ops import select
from subquad.ops.attention import attention
from subquad.ops.attention.chosen import chosen

Golden = Mapping[str, Tensor]


def check_gradients(inputs: Mapping[str, Tensor], out: Tensor, golden: Golden, prefix: str) -> None:
    """Of ``out.square().mean()``."""
    out.square().mean().backward()
    for name, t in inputs.items():
        close(t.grad, golden[f"{prefix}g.{name}"].view_as(t), 2e-4)


def power_attention(golden: Golden) -> None:
    for prefix, block, window in (("t90.", 8, 2), ("t96.", 4, 3)):
        inputs = {n: golden[prefix + n].clone().requires_grad_() for n in "qkv"}
        T = inputs["q"].shape[1]
        m = pattern(T, block, window)
        assert torch.equal(m.dense(T, T), golden[prefix + "mask"].bool())
        o = attention(*inputs.values(), m)
        close(o, golden[prefix + "out"], 1e-5)
        check_gradients(inputs, o, golden, prefix)


def infllm_v2(golden: Golden) -> None:
    mixer = subquad.create_mixer(
        "infllm_v2", dim=64, heads=4, kv_heads=2, init=1, local=1, topk=3, dense_len=0
    )
    inputs = {n: golden[n][None].clone().requires_grad_() for n in "qkv"}
    q, k = inputs["q"].detach(), inputs["k"].detach()
    fine, coarse = select.pool(k, 32, stride=16), select.pool(k, 128, stride=64)
    close(fine[0], golden["k1"], 1e-6)
    close(coarse[0], golden["k2"], 1e-6)
    close(select.window_mass(q, fine, 32, 16)[0], golden["score_exact"], 1e-5)
    mass = select.window_mass(q, fine, 32, 16, by=(coarse, 128, 64))
    close(mass[0], golden["score_lse_approx"], 1e-5)
    forced = golden["block_score"].isinf()
    got = block_scores(mass, 6)[0]
    close(got[~forced], golden["block_score"][~forced], 1e-5)
    # Neighboring blocks tie where one window reaches into both and is the best of both; the vectors
    # take either then. Elsewhere the choice is theirs.
    index, theirs = mixer.choose(q, fine, q.shape[1])[0], golden["topk_idx"]
    scores = golden["block_score"]

    def taken(lists: Tensor) -> Tensor:
        found = scores.gather(-1, lists.long().clamp_min(0)).masked_fill(lists < 0, -torch.inf)
        return found.sort(-1)[0]

    assert torch.equal(taken(index), taken(theirs))
    assert (index != theirs).any(-1).sum() <= 2
    o = chosen(*inputs.values(), theirs[None], 64)
    close(o[0], golden["out"], 1e-5)
    check_gradients(inputs, o, golden, "")
