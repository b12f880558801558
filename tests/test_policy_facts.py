"""Facts of policies and caches: the checks of the sheets and the vectors of the authors."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from policy_kit import close, masked
from subquad import mask
from subquad.caches.paged import PagedLayer
from subquad.caches.ring import RingLayer
from subquad.ops.attention import attention
from subquad.ops.select.pages import bounds
from subquad.policies.base import Call, Site, Tally
from subquad.policies.block_topk import BlockTopK
from subquad.policies.flexprefill import FlexPrefill, cover
from subquad.policies.parts import lines
from subquad.policies.quest import Quest
from subquad.policies.streaming_llm import StreamingLLM
from subquad.policies.vertical_slash import VerticalSlash


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
    close(bounds(q[:, 0], layer.low, layer.high), golden["U"], 1e-5)
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
        bound = bounds(q, layer.low, layer.high)
        per_token = bound.repeat_interleave(page, 2)[..., :77]
        assert (per_token >= scores - 1e-5).all()
        if page == 1:
            close(bound, scores, 1e-5)


def _call(q, k, v, policy):
    """A prompt's call over a layer of the policy's, by hand."""
    H, G = q.shape[2], k.shape[2]
    site = Site(1, 2, heads=H, kv_heads=G, head_dim=q.shape[3], window=None)
    layer = policy.layer(site)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    places = torch.arange(q.shape[1]).expand(len(q), -1)
    return Call(site, q, k, v, layer, q.shape[3] ** -0.5, None, places, _rope, Tally())


def _random(T=200, H=2, K=16):
    return (torch.randn(1, T, H, K) for _ in range(3))


def _dense(q, k, v):
    return attention(q, k, v, mask.causal())


def test_sinks_carry_a_planted_sink():
    """Where every query looks at the first token, a window without it errs far more."""
    q, k, v = _random()
    common = nn.functional.normalize(torch.randn(16), dim=-1)
    q, k[:, 0] = q + 4 * common, 8 * common
    error = {}
    for sinks in (0, 4):
        policy = StreamingLLM(sinks=sinks, window=32, position="absolute")
        error[sinks] = (policy.prefill(_call(q, k, v, policy)) - _dense(q, k, v)).norm()
    assert error[0] > 3 * error[4]


def test_window_of_one_is_the_value():
    q, k, v = _random()
    for position in ("cache", "absolute"):
        policy = StreamingLLM(sinks=0, window=1, position=position)
        close(policy.prefill(_call(q, k, v, policy)), v, 1e-6)


def test_stream_does_not_know_its_length():
    """Once the cache is full, a stream that began later behind the same sinks gives the same."""
    policy, (q, k, v) = StreamingLLM(sinks=4, window=20), _random(T=90)
    late = [torch.cat([x[:, :4], x[:, 40:]], 1) for x in (q, k, v)]
    whole, short = (policy.prefill(_call(*x, policy)) for x in ((q, k, v), late))
    close(whole[:, 60:], short[:, 24:], 1e-5)


def test_block_topk_facts():
    """Three forced blocks are sinks and two local blocks; a planted block is found; the count of
    pairs is the closed form; nothing is read outside the chosen blocks."""
    q, k, v = _random(T=160)
    policy = BlockTopK(block=16, topk=3)
    keep = torch.arange(160)[:, None] // 16 - torch.arange(160) // 16
    keep = ((keep < 2) | (torch.arange(160) < 16)) & torch.ones(160, 160).tril().bool()
    want = masked(q, k, v, keep[None, None].expand(1, 2, -1, -1), 0.25)
    close(policy.prefill(_call(q, k, v, policy)), want, 1e-5)

    k[:, 64:80] = 3 * q[:, 128:144].mean(1, keepdim=True)
    for variant in BlockTopK.VARIANTS:
        policy = BlockTopK(block=16, topk=4, variant=variant)
        index = policy.select(q, k)
        assert (index[0, :, 8] == 4).any(-1).all()
        assert (index >= 0).sum(-1).equal(torch.arange(1, 11).clamp_max(4).expand(1, 2, -1))
    call = _call(q, k, v, policy)
    o = policy.prefill(call)
    blocks = 2 * (4 * 5 // 2 + 6 * 4)
    diagonal = 2 * 10 * 16 * 15 // 2  # what causality takes from the ten blocks of the diagonal
    assert call.tally.prefill.attended in range(blocks * 256 - diagonal, blocks * 256 + 1)
    unread = sorted(set(range(10)) - set(index[0, 0, 9].tolist()))
    changed = v.clone()
    changed[:, 16 * unread[0] : 16 * unread[0] + 16, 0] += 1
    close(policy.prefill(_call(q, k, changed, policy))[:, 144:], o[:, 144:], 1e-6)


def test_vertical_slash_finds_what_was_planted():
    """Columns with a common component, and a distance at which keys repeat queries."""
    q, k, _ = _random(T=256)
    planted, common = torch.tensor([70, 101, 180]), torch.randn(16)
    q, k[:, planted] = q + common, 3 * common
    policy = VerticalSlash(vertical=40, slash=50)
    columns, _ = policy.select(q, k, 0.25)
    assert torch.isin(planted, columns).all()

    q, _, _ = _random(T=256)
    k = torch.cat([q[:, 37:], torch.randn(1, 37, 2, 16)], 1)  # key t is query t + 37
    _, distances = VerticalSlash(slash=110, local=100).select(q, 4 * k, 1.0)
    assert (distances == 37).any(-1).all()
    _, distances = VerticalSlash(slash=60, local=10, variant="minference").select(q, 4 * k, 1.0)
    assert (distances == 37).any(-1).all()


@pytest.mark.parametrize("n", [30, 50, 64])
def test_fewer_diagonals_than_are_forced_are_the_nearest(n):
    """Distance 0 is among them, so that no query is left without a key."""
    score = torch.rand(1, 2, 400)
    assert torch.equal(lines.top(score, n, 100), torch.arange(n).expand(1, 2, -1))
    q, k, v = _random(T=400)
    policy = VerticalSlash(vertical=30, slash=n, local=100, block=16)
    o = policy.prefill(_call(q, k, torch.ones_like(v), policy))
    close(o, torch.ones_like(o), 1e-5)


def test_vertical_slash_is_a_superset():
    """What the blocks hold contains the chosen columns and diagonals, at any length."""
    for T in (65, 128, 200):
        columns, distances = (torch.randperm(T)[:9].sort().values[None, None] for _ in range(2))
        distances[..., 0] = 0
        starts, single = lines.blocks(columns, distances, T, T, 16)
        p, j = torch.arange(T)[:, None], torch.arange(T)
        ideal = (j <= p) & (torch.isin(j, columns) | torch.isin(p - j, distances))
        seen = mask.spans(starts, single, 16).dense(T, T)
        assert not (ideal & ~seen).any()


def test_vertical_slash_beats_a_window_of_its_size():
    """A planted column far back: less error than the last tokens of equal number."""
    q, k, v = _random(T=512)
    common = nn.functional.normalize(torch.randn(16), dim=-1)
    q, k[:, 40] = q + 4 * common, 8 * common
    policy = VerticalSlash(vertical=16, slash=20, local=16, sinks=2, variant="frontier")
    call = _call(q, k, v, policy)
    error = (policy.prefill(call) - _dense(q, k, v)).norm()
    width = round(call.tally.prefill.attended / (2 * 512))
    window = StreamingLLM(sinks=0, window=width, position="absolute")
    assert error < 0.5 * (window.prefill(_call(q, k, v, window)) - _dense(q, k, v)).norm()


def test_flexprefill_limits():
    """tau decides who is query-aware, gamma how much is taken, and every row keeps two blocks."""
    q, k, _ = _random(T=256)
    sizes = []
    for gamma in (0.3, 0.6, 0.9):
        index = FlexPrefill(gamma=gamma, tau=0, min_budget=0, block=16, unit=16).select(q, k, 0.25)
        sizes.append(int((index >= 0).sum()))
        row = torch.arange(16)[:, None]
        assert (index == 0).any(-1).all()
        assert (index == row).any(-1).all()
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    never, always = (
        FlexPrefill(gamma=0.5, tau=tau, min_budget=32, block=16, unit=16) for tau in (0, 0.8327)
    )
    p = torch.full((1, 2, 16), 1 / 16)
    means = torch.randn(1, 16, 2, 16)
    assert not never._query_aware(q[:, -16:], means, p, 0.25).any()
    assert always._query_aware(q[:, -16:], means, p, 0.25).all()
    policy = FlexPrefill(gamma=0.3, tau=0.8327, min_budget=0, block=16, unit=16)
    index = policy.select(q, k, 0.25)  # query-aware heads, too, keep the first block and their own
    assert (index == 0).any(-1).all()
    assert (index == row).any(-1).all()


def test_flexprefill_spends_what_the_text_asks_for():
    """Peaked attention takes little; flat attention about gamma of the tokens."""
    flat = torch.full((1, 1, 1000), 1e-3, dtype=torch.float64)
    peaked = torch.zeros(1, 1, 1000).index_fill(-1, torch.tensor([5]), 1.0)
    assert abs(int(cover(flat, 0.8)) - 800) <= 2
    assert int(cover(peaked, 0.8)) == 1


def test_quest_beats_sinks_and_window_on_far_needles():
    """At equal budgets: the best tokens err least, then Quest, then sinks and the last tokens."""
    error = {"best": 0.0, "quest": 0.0, "last": 0.0}
    for _ in range(5):
        q, k, v = _random(T=512)
        far = torch.randint(20, 300, (3,))
        k[:, far] = 4 * q[:, -1:]
        want = _dense(q, k, v)[:, -1:]
        quest = Quest(budget=64, page=16, dense_layers=0)
        layer, site = PagedLayer(16), Site(1, 2, heads=2, kv_heads=2, head_dim=16, window=None)
        layer.update(k.transpose(1, 2), v.transpose(1, 2))
        last = q[:, -1:], k[:, -1:], v[:, -1:]
        call = Call(site, *last, layer, 0.25, None, torch.tensor([[511]]), _rope)
        error["quest"] += float((quest.decode(call) - want).norm())
        scores = torch.einsum("hk,shk->hs", q[0, -1], k[0])
        best = torch.zeros_like(scores, dtype=torch.bool)
        best.scatter_(1, scores.topk(64).indices, True)
        error["best"] += float((masked(last[0], k, v, best[None, :, None], 0.25) - want).norm())
        window = StreamingLLM(sinks=4, window=60, position="absolute")
        error["last"] += float((window.prefill(_call(q, k, v, window))[:, -1:] - want).norm())
    assert error["best"] <= error["quest"] < 0.5 * error["last"]
