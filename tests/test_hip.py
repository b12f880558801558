"""Facts of HiP's search, and the authors' vectors."""

import pytest
import torch
from safetensors.torch import load_file

from kit import in_the_interpreter
from policy_kit import close
from subquad.caches.kv import KVLayer
from subquad.ops.backend import interpreted
from subquad.ops.select import search
from subquad.policies.base import Call, Site
from subquad.policies.hip import HiP

PLAIN = {"block": 1, "rows": 1, "window": 1, "sinks": 0, "dense_layers": 0}


def _correlated(length, K=16, rho=0.95, seed=0):
    """An AR(1) sequence ``[1,length,1,K]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, K, generator=generator, dtype=torch.float64)
    out = [noise[0]]
    for x in noise[1:]:
        out.append(rho * out[-1] + (1 - rho**2) ** 0.5 * x)
    return torch.stack(out)[None, :, None]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("a", HiP(budget=32, rows=10, block=1, window=16, sinks=0)),
        ("b", HiP(budget=48, rows=25, block=4, window=20, sinks=0)),
    ],
)
def test_golden(shared, name, policy):
    golden = load_file(shared / "golden" / "hip.safetensors")
    q, k, v = (golden[x].transpose(0, 1)[None] for x in "qkv")
    found = policy.select(q, k)[0]
    for head, row in torch.cartesian_prod(torch.arange(2), torch.arange(found.shape[1])):
        want = golden[f"indices.{name}"][head, row, : golden[f"ks.{name}"][head, row]]
        got = found[head, row]
        assert torch.equal(got[got >= 0], want.long())
    layer = policy.layer(Site(5, 8, 2, 2, 16, None))
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    site, places = Site(5, 8, 2, 2, 16, None), torch.arange(250)[None]
    call = Call(site, q, k, v, layer, 16**-0.5, None, places, lambda x, _: x)
    close(policy.prefill(call)[0].transpose(0, 1), golden[f"out.{name}"], 1e-5)


def test_a_single_peak_is_found():
    """Where the score rises to one peak and falls again, its block is found."""
    for peak in range(0, 190, 7):
        k = -(torch.arange(200, dtype=torch.float64) - peak).square()[None, :, None, None]
        found = HiP(budget=4, **PLAIN).select(torch.ones(1, 1, 1, 1).double(), k)
        assert peak in found


def _recall(budget, rho, seed):
    k = _correlated(1024, rho=rho, seed=seed)
    q = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(seed + 100)).double()
    best = (k[0, :1023, 0] @ q[0, 0, 0]).topk(budget).indices.tolist()
    found = HiP(budget=budget, **PLAIN).select(q, k)[0, 0, 0].tolist()
    return len(set(best) & set(found)) / budget


def test_recall_needs_locality_and_grows_with_the_budget():
    """Nearly all for keys like their neighbours; a few, those scored on the way, for others."""
    small, large, lone = (
        sum(_recall(budget, rho, seed) for seed in range(12)) / 12
        for budget, rho in ((32, 0.95), (128, 0.95), (32, 0.0))
    )
    assert small > 0.7
    assert large > small
    assert lone < 0.3


def test_found_keys_rise_and_lie_before_the_window():
    q, k = _correlated(300, seed=1), _correlated(300, seed=2)
    policy = HiP(budget=24, block=3, rows=16, window=20, sinks=0)
    for m, row in enumerate(policy.select(q, k)[0, 0]):
        found = row[row >= 0]
        assert bool((found.diff() > 0).all())
        assert bool((found < max(16 * (m + 1) - 20, 1)).all())


def test_products_are_few(monkeypatch):
    """At most 2 n log2(B / n) blocks are scored for a row; fewer where a half is known already."""
    scored = []
    honest = search.peaks
    monkeypatch.setattr(
        search, "peaks", lambda q, k, blocks, n: scored.append(blocks) or honest(q, k, blocks, n)
    )
    for representative, most in (("center", 2 * 7), ("first", 1 + 7)):
        policy = HiP(budget=32, representative=representative, **PLAIN)
        policy.select(_correlated(1)[:, :1], _correlated(4097))
        assert sum(blocks.numel() for blocks in scored) == 32 * most
        scored.clear()


def test_the_future_does_not_matter():
    q, k = _correlated(160, seed=3), _correlated(160, seed=4)
    policy = HiP(budget=24, block=2, rows=16, window=20, sinks=0)
    changed = k.clone()
    changed[:, 100:] = 7.0
    assert torch.equal(policy.select(q, k)[:, :, :6], policy.select(q, changed)[:, :, :6])


def test_first_layers_are_dense():
    policy = HiP(dense_layers=2)
    kinds = [type(policy.layer(Site(i, 4, 4, 2, 8, None))) is KVLayer for i in range(4)]
    assert kinds == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be a positive int, got 0"),
        ({"rows": -1}, "rows must be a positive int, got -1"),
        ({"representative": "last"}, "representative must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HiP(**options)


def test_kernels_in_the_interpreter():
    in_the_interpreter(__file__, "-k", "by_kernel")


inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")


@inside
@pytest.mark.parametrize(
    ("T", "S", "policy"),
    [
        (40, 70, HiP(budget=16, rows=8, block=2, window=9, sinks=3)),
        (33, 90, HiP(budget=12, rows=8, block=2, window=10, sinks=4)),
        (50, 50, HiP(budget=8, rows=16, block=1, window=7, sinks=0)),
        (40, 70, HiP(budget=16, rows=8, block=2, window=16, sinks=4)),
        (40, 200, HiP(budget=80, rows=16, block=4, window=7, sinks=9)),
        (35, 90, HiP(budget=15, rows=10, block=3, window=1, sinks=70, share=True)),
        (1, 90, HiP(budget=8, rows=1, block=2, window=7, sinks=3)),
        (35, 91, HiP(budget=16, rows=8, block=2, window=8, sinks=2, share=True)),
        (20, 30, HiP(budget=16, rows=8, block=1, window=10, sinks=0)),
        (9, 9, HiP(budget=4, rows=4, block=1, window=12, sinks=0)),
    ],
)
def test_attention_by_kernels(T, S, policy):
    """Blocks, windows and sinks where they are = the same keys copied."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, S, n, 16) for n in (4, 2, 2))
    site = Site(5, 8, 4, 2, 16, None)
    layer = policy.layer(site)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    places, new = torch.arange(S - T, S)[None], (x[:, -T:] for x in (q, k, v))
    call = Call(site, *new, layer, 0.25, None, places, lambda x, p: x)
    found = policy.search(call.q, k)
    rows, window = policy.rows, policy.window
    want = policy._gathered(call, found, rows, window)
    torch.testing.assert_close(policy._attend(call, found, rows, window), want)


@inside
@pytest.mark.parametrize(
    ("T", "S", "policy"),
    [
        (30, 90, HiP(budget=16, rows=8, block=2, window=9)),
        (30, 90, HiP(budget=16, rows=8, block=2, window=9, representative="center")),
        (37, 37, HiP(budget=5, rows=10, block=1, window=4)),  # the last row is cut short
        (61, 200, HiP(budget=28, rows=16, block=4, window=16, share=True)),
        (41, 200, HiP(budget=21, rows=20, block=3, window=7, share=True)),
        (41, 200, HiP(budget=21, rows=20, block=3, window=7, share=True, representative="center")),
        (1, 300, HiP(budget=7, rows=1, block=1, window=16)),
    ],
    ids=str,
)
def test_search_by_kernels(T, S, policy, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, T, 6, 24), torch.randn(2, S, 2, 24)
    found = policy.search(q, k)
    monkeypatch.setattr(search, "_kernels", lambda *_: False)
    assert torch.equal(found, policy.search(q, k))


@inside
def test_of_equals_the_earlier_by_kernels(monkeypatch):
    q, k = torch.ones(1, 20, 2, 16), torch.randint(2, (1, 90, 2, 16)).float()
    found = HiP(budget=10, rows=4, block=1, window=3).search(q, k)
    monkeypatch.setattr(search, "_kernels", lambda *_: False)
    assert torch.equal(found, HiP(budget=10, rows=4, block=1, window=3).search(q, k))
