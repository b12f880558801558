"""Facts of policies and caches: the checks of the sheets and the vectors of the authors."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from policy_kit import close
from subquad.caches.paged import PagedLayer
from subquad.caches.ring import RingLayer
from subquad.policies.base import Call, Site
from subquad.policies.quest import Quest
from subquad.policies.streaming_llm import StreamingLLM


@pytest.fixture
def golden(shared):
    return lambda key: load_file(shared / "golden" / f"{key}.safetensors")


def _rope(x, positions, base=10_000.0):
    K = x.shape[-1]
    angle = positions[..., None] * base ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)
    cos, sin = (f(torch.cat([angle, angle], -1))[:, :, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _project(golden):
    """x through the golden projections: q ``[2,70,4,8]``, k and v ``[2,70,2,8]``."""
    return (
        nn.functional.linear(golden["x"], golden[f"w.{n}_proj"]).unflatten(-1, (-1, 8))
        for n in "qkv"
    )


@pytest.mark.parametrize("sizes", [(1,) * 70, (70,), (5, 30, 1, 1, 33)], ids=len)
def test_streaming_golden(golden, sizes):
    """The authors' stream, fed token by token, at once, and in pieces."""
    golden = golden("streaming_llm")
    q, k, v = _project(golden)
    policy = StreamingLLM(sinks=4, window=12)
    site = Site(0, 1, heads=4, kv_heads=2, head_dim=8, window=None)
    layer, outs = policy.layer(site), []
    for now in torch.arange(70).split(sizes):
        qs, ks, vs = q[:, now], k[:, now], v[:, now]
        layer.update(ks.transpose(1, 2), vs.transpose(1, 2))
        call = Call(site, qs, ks, vs, layer, 8**-0.5, None, now[None], _rope)
        outs.append(policy.decode(call) if len(now) == 1 else policy.prefill(call))
        policy.settle(call)
    out = nn.functional.linear(torch.cat(outs, 1).flatten(2), golden["w.o_proj"])
    close(out, golden["out"], 1e-5)
    close(layer.keys.transpose(1, 2), golden["k_cache"], 1e-6)
    close(layer.values.transpose(1, 2), golden["v_cache"], 1e-6)


def test_ring_is_slicing():
    """The ring holds what slicing sinks and window would, and never grows."""
    ring, x = RingLayer(3, 5), torch.randn(2, 2, 40, 4)
    sizes = []
    for t in range(40):
        ring.update(x[:, :, t : t + 1], x[:, :, t : t + 1])
        kept = [j for j in range(t + 1) if j < 3 or t - j < 5]
        close(ring.keys, x[:, :, kept].transpose(1, 2))
        sizes.append(ring.nbytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * 2 * 2 * 9 * 4 * 4


def _paged(k, page):
    """A layer that was fed ``k [B,S,G,K]`` in three pieces."""
    layer = PagedLayer(page)
    for part in k.split([50, 26, k.shape[1] - 76], 1):
        layer.update(part.transpose(1, 2), part.transpose(1, 2))
    return layer


def test_quest_golden(golden):
    """Bounds, pages and outputs of the authors' code."""
    golden = golden("quest")
    q, k, v = (golden[n].transpose(1, 2) for n in "qkv")
    policy = Quest(budget=32, page=8, dense_layers=0)
    layer = _paged(k, 8)
    close(policy.bounds(q[:, 0], layer.low, layer.high), golden["U"], 1e-5)
    pages = policy.select(q[:, 0], layer.low, layer.high, torch.tensor([77, 77]))
    kept = (torch.arange(77) // 8 == pages[..., None]).any(2)
    assert kept.equal(golden["mask"][:, :, 0].bool())

    layer._values.replace(v)
    site = Site(3, 8, heads=2, kv_heads=2, head_dim=16, window=None)
    call = Call(site, q, k[:, -1:], v[:, -1:], layer, 0.25, None, torch.tensor([[76]]), _rope)
    close(policy.decode(call), golden["out"].transpose(1, 2), 1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_quest_golden_frontier(golden, share):
    golden = golden("quest")
    layer = _paged(torch.cat([golden["f.k"], golden["f.k_new"]])[None], 8)
    close(layer.low[0], golden["f.page_min"], 0)
    close(layer.high[0], golden["f.page_max"], 0)
    policy = Quest(budget=32, page=8, variant="frontier", share=share)
    pages = policy.select(golden["f.q"], layer.low, layer.high, torch.tensor([78]))
    pages = pages.repeat_interleave(4 // pages.shape[1], 1)[0]
    want = golden[f"f.pages.share{int(share)}"]
    assert pages[:, -1].equal(want[:, -1].long())
    assert pages.sort().values.equal(want.long().sort().values)
    tokens = 8 * (pages >= 0).sum(1) - (8 - 78 % 8)
    assert tokens.equal(golden[f"f.seqlen.share{int(share)}"].long())


def test_quest_bounds_hold():
    """No key of a page scores above its bound; with pages of one token the bound is the score."""
    q, k = torch.randn(2, 4, 8), torch.randn(2, 77, 2, 8)
    scores = torch.einsum("bhk,bshk->bhs", q, k.repeat_interleave(2, 2))
    for page in (1, 7):
        layer = _paged(k, page)
        bound = Quest(budget=7, page=page).bounds(q, layer.low, layer.high)
        per_token = bound.repeat_interleave(page, 2)[..., :77]
        assert (per_token >= scores - 1e-5).all()
        if page == 1:
            close(bound, scores, 1e-5)
