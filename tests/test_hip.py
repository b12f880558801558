"""Facts of HiP's search, and the authors' vectors."""

import pytest
import torch
from safetensors.torch import load_file

from policy_kit import close
from subquad.caches.kv import KVLayer
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
    """At most 2 n log2(B / n) blocks are scored for a row."""
    scored = []
    honest = HiP._score
    monkeypatch.setattr(
        HiP,
        "_score",
        lambda self, q, k, blocks: scored.append(blocks) or honest(self, q, k, blocks),
    )
    HiP(budget=32, **PLAIN).select(_correlated(1)[:, :1], _correlated(4097))
    assert sum(blocks.numel() for blocks in scored) == 2 * 32 * 7


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
