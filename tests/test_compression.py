"""Facts of SnapKV and Ada-SnapKV and of their caches: the checks of the papers, the authors' kept
tokens."""

import pytest
import torch
from safetensors.torch import load_file

from policy_kit import applied, close, read, tiny, tokens
from subquad.policies import AdaSnapKV, Policy, SnapKV
from subquad.policies.base import Site
from subquad.policies.parts.compress import weights

SITE = Site(index=0, layers=4, heads=4, kv_heads=2, head_dim=16, window=None)
S, SCALE = 96, 16**-0.5


@pytest.fixture
def golden(shared):
    return load_file(shared / "golden" / "snapkv.safetensors")


def _qk(seed=0, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(S, 4, 16, generator=generator, dtype=torch.float64)
    return sharp * q, torch.randn(S, 2, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_golden(golden, pool):
    """The authors' tokens in the authors' order, and what a query reads of them."""
    policy = SnapKV(capacity=32, window=8, kernel=5, pool=pool, share="none")
    q, k = (golden[name].transpose(1, 2) for name in "qk")
    for b in range(2):
        kept = torch.stack(policy.select(SITE, q[b, -8:], k[b], SCALE))
        assert torch.equal(kept, golden[f"index.{pool}pool"][b].long())


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_golden_cache(golden, pool):
    """The compressed cache is the authors', and a token reads from it what theirs does."""
    from subquad.caches.evicting import EvictingLayer
    from subquad.ops.attention import attention

    policy = SnapKV(capacity=32, window=8, kernel=5, pool=pool, share="none")
    layer, q = EvictingLayer(), golden["q"].transpose(1, 2)
    layer.update(golden["k"], golden["v"])
    layer.evict([policy.select(SITE, q[b, -8:], layer.keys[b], SCALE) for b in range(2)])
    assert torch.equal(layer.keys.transpose(1, 2), golden[f"k_cache.{pool}pool"])
    assert torch.equal(layer.values.transpose(1, 2), golden[f"v_cache.{pool}pool"])
    if pool == "avg":
        o = attention(golden["q_dec"].transpose(1, 2), layer.keys, layer.values, scale=SCALE)
        close(o.transpose(1, 2), golden["out_dec"], 1e-5)


def test_golden_frontier(golden):
    policy = SnapKV(variant="frontier", capacity=40, window=16, kernel=7, local=12, prefix=4)
    kept = torch.stack(policy.select(SITE, golden["f.q"][-16:], golden["f.k"], SCALE))
    assert torch.equal(kept.sort(-1).values, golden["f.index"].long())


def test_votes_are_whole():
    """Each of w tokens casts one vote."""
    q, k = _qk()
    for a in weights(q[-7:], k, SCALE):
        close(a.sum((1, 2)), torch.full((2,), 7.0))


def test_a_needle_survives_with_its_neighbours():
    q, k = _qk()
    k[40] = 4 * q[-1, [0, 2]]
    for policy in (SnapKV(capacity=16, window=4, kernel=5), AdaSnapKV(capacity=16, window=4)):
        for kept in policy.select(SITE, q[-4:], k, SCALE):
            assert set(range(38, 43)) <= set(kept.tolist())


def test_length_is_the_capacity_and_grows_by_one():
    model, ids = tiny(), tokens(2)
    with applied(model, SnapKV(capacity=20, window=8)) as on:
        for new in range(3):
            _, cache = read(model, on, ids, new=new)
            assert {layer.keys.shape[1] for layer in cache.layers} == {20 + new}
            assert cache.get_seq_length() == 75 + new


@pytest.mark.parametrize("kind", [SnapKV, AdaSnapKV])
def test_memory_is_freed(kind):
    """Bytes in the cache fall as the budget does."""
    policy = kind(capacity=20, window=8)
    model, ids = tiny(), tokens(2)
    with applied(model, Policy()) as on:
        whole = read(model, on, ids, new=0)[1].nbytes
    with applied(model, policy) as on:
        kept = read(model, on, ids, new=0)[1].nbytes
    assert kept < 1.1 * 20 / 75 * whole


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma3"])
@pytest.mark.parametrize("policy", [SnapKV, AdaSnapKV])
def test_a_models_own_window(kind, policy):
    """Tokens that were kept go out of sight as the model's window moves on, in any family."""
    changes = {} if kind == "Llama" else {"sliding_window": 78}
    if kind == "Gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    if kind == "Qwen3":
        changes |= {"use_sliding_window": True, "max_window_layers": 0}
    model, ids = tiny(kind, **changes), tokens(2)
    # All but a handful are kept: what the window hides must be hidden, not what was dropped.
    with applied(model, policy(capacity=75, window=8)) as on:
        want, _ = read(model, on, ids, new=12)
    model_whole = tiny(kind, **changes)
    with applied(model_whole, Policy()) as on:
        close(read(model_whole, on, ids, new=12)[0], want)


def test_floor_of_one_is_snapkv():
    q, k = _qk()
    ada = AdaSnapKV(capacity=24, window=6, kernel=5, pool="avg", floor=1.0)
    snap = SnapKV(capacity=24, window=6, kernel=5)
    for a, b in zip(*(p.select(SITE, q[-6:], k, SCALE) for p in (ada, snap)), strict=True):
        assert set(a.tolist()) == set(b.tolist())


def test_without_a_floor_the_budget_is_whole():
    q, k = _qk(1)
    for share, heads in (("mean", 2), ("none", 4)):
        kept = AdaSnapKV(capacity=24, window=6, floor=0.0, share=share).select(
            SITE, q[-6:], k, SCALE
        )
        assert sum(len(index) - 6 for index in kept) == heads * 18


def test_spread_heads_get_more():
    q, k = _qk(2)
    q[:, :2], q[:, 2:] = 4 * k[40, 0], 0.05 * q[:, 2:]  # the first key head looks at one token
    peaked, spread = AdaSnapKV(capacity=24, window=6, floor=0.2).select(SITE, q[-6:], k, SCALE)
    assert len(spread) > len(peaked)


def test_alike_heads_get_alike():
    q, k = _qk(3)
    q[:, 2:], k[:, 1] = q[:, :2], k[:, 0]
    one, other = AdaSnapKV(capacity=24, window=6, kernel=1).select(SITE, q[-6:], k, SCALE)
    assert abs(len(one) - len(other)) <= 1


def test_the_frontier_spends_exactly():
    q, k = _qk(4, sharp=2.0)
    policy = AdaSnapKV(variant="frontier", capacity=30, window=16, local=8, prefix=2, kernel=5)
    kept = policy.select(SITE, q[-16:], k, SCALE)
    assert sum(map(len, kept)) == 2 * 30
    assert min(map(len, kept)) >= 10
    for index in kept:
        assert {0, 1, *range(S - 8, S)} <= set(index.tolist())


def test_no_less_attention_is_kept():
    """Of the last tokens' attention Ada-SnapKV keeps at least what SnapKV does."""
    for seed in range(5):
        q, k = _qk(seed, sharp=1.5)
        options = {"capacity": 20, "window": 6, "kernel": 1, "share": "none"}
        mass = []
        for policy in (AdaSnapKV(floor=0.0, **options), SnapKV(**options)):
            kept = policy.select(SITE, q[-6:], k, SCALE)
            all_weights = torch.cat(list(weights(q[-6:], k, SCALE)))
            mass.append(sum(a[:, i].sum() for a, i in zip(all_weights, kept, strict=True)))
        assert mass[0] >= mass[1] - 1e-9


def test_pyramid_falls_with_the_depth():
    policy = AdaSnapKV(capacity=120, window=20, pyramid=20)
    budgets = [policy.budget(Site(i, 5, 4, 2, 16, None)) for i in range(5)]
    assert budgets == [195, 148, 100, 52, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 32}, "capacity must exceed window=32, got 32"),
        ({"capacity": 0}, "capacity must be a positive int, got 0"),
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"variant": "frontier", "capacity": 132}, "capacity must exceed local \\+ prefix=132"),
        ({"pool": "sum"}, "pool must be one of"),
    ],
)
@pytest.mark.parametrize("policy", [SnapKV, AdaSnapKV])
def test_bad_options(policy, options, message):
    with pytest.raises(ValueError, match=message):
        policy(**options)
