"""Golden vectors of operations: what a system's authors computed without a layer around it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import subquad
from kit import close
from subquad.mixers.infllm_v2 import block_scores
from subquad.mixers.parts.head_map import HeadMap
from subquad.mixers.power_attention import pattern
from subquad.ops import select
from subquad.ops.attention import attention
from subquad.ops.attention.chosen import chosen
from subquad.ops.kernel_attention import How, Near, mixed_attention
from subquad.ops.kernel_attention.reference import mixed_weights
from subquad.ops.probe import probe

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


def parallax(golden: Golden) -> None:
    for prefix, options in (
        ("", {}),
        ("win16.", {"window": 16}),
        ("noncausal.", {"causal": False}),
    ):
        for backend in ("torch", "reference"):
            inputs = {n: golden[n].clone().requires_grad_() for n in "qkvr"}
            o = probe(**inputs, **options, backend=backend)
            close(o, golden[prefix + "out"], 1e-5)
            if f"{prefix}g.q" in golden:
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


def lolcats(golden: Golden) -> None:
    """Both layouts. The authors' terraces end with the text, so token 0 stands 10 tokens late."""
    for prefix, layout, starts in (
        ("sw.", "sliding", None),
        ("tk.", "terraced", torch.tensor([-10])),
    ):
        g = {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
        q, k, v = ({n: g[n].transpose(1, 2).clone().requires_grad_() for n in "qkv"}).values()
        maps = [HeadMap(2, 16, 8) for _ in "qk"]
        for name, m in zip("qk", maps):
            m.load_state_dict({"weight": g[f"w.feature_map_{name}"]})
        omega = g["w.window_factors"].clone().requires_grad_()
        phi_q, phi_k = maps[0](q), maps[1](k)
        close(phi_q, g["phi_q"].transpose(1, 2), 1e-6)
        close(phi_k, g["phi_k"].transpose(1, 2), 1e-6)
        near, weight = Near(16, layout), omega.flatten().sigmoid()
        shared = {"near": near, "scale": 0.25, "weight": weight, "starts": starts}
        close(mixed_weights(q, k, phi_q, phi_k, How(**shared)), g["attn"], 1e-5)
        for backend in ("reference", None):
            o, _ = mixed_attention(q, k, v, phi_q, phi_k, backend=backend, **shared)
            close(o.transpose(1, 2), g["out"], 1e-5)
            loss = 1000 * (o - g["teacher_out"].transpose(1, 2)).square().mean()
            close(loss, g["transfer_loss"], 1e-4)
            learned = [omega, maps[0].weight, maps[1].weight]
            got = torch.autograd.grad(loss, learned, retain_graph=True)
            for name, grad in zip(("window_factors", "feature_map_q", "feature_map_k"), got):
                close(grad, g[f"gL.w.{name}"], 2e-4)
            got = torch.autograd.grad(o.square().mean(), (q, k, v), retain_graph=True)
            for name, grad in zip("qkv", got):
                close(grad, g[f"g.{name}"].transpose(1, 2), 2e-4)
