"""Policies on the block-sparse kernels = the same choice over copies of the keys."""

import pytest
import torch

from subquad.policies.base import Call, Site, create_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [
    ("vertical_slash", {"vertical": 60, "slash": 120}),
    ("vertical_slash", {"vertical": 60, "slash": 80, "variant": "frontier"}),
    ("block_topk", {"block": 16, "topk": 8}),
    ("block_topk", {"block": 64, "topk": 4, "variant": "minference"}),
    ("flexprefill", {"gamma": 0.5, "tau": 0.0, "min_budget": 128}),
    ("flexprefill", {"gamma": 0.5, "min_budget": 64, "variant": "frontier", "last_q": 64}),
    ("quest", {"budget": 128, "dense_layers": 0}),
    ("quest", {"budget": 128, "variant": "frontier"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1000, 1024])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda c: str(c))
def test_kernels_are_the_choice(name, options, T, dtype, monkeypatch):
    """Both paths attend to the keys that were chosen in the lower precision."""
    from subquad.policies.parts import chosen

    policy = create_policy(name, **options)
    torch.manual_seed(0)
    tensors = [torch.randn(1, T, n, 64, device="cuda").to(dtype) for n in (4, 2, 2)]
    site = Site(5, 8, heads=4, kv_heads=2, head_dim=64, window=None)

    def run():
        layer, outs, seen = policy.layer(site), [], 0
        for size in (T - 1, 1):
            q, k, v = (x[:, seen : seen + size] for x in tensors)
            layer.update(k.transpose(1, 2), v.transpose(1, 2))
            places = torch.arange(seen, seen + size, device="cuda")[None]
            call = Call(site, q, k, v, layer, 0.125, None, places, lambda x, p: x)
            outs.append(policy.decode(call) if size == 1 else policy.prefill(call))
            policy.settle(call)
            seen += size
        return torch.cat(outs, 1)

    by_kernels = run()
    monkeypatch.setattr(chosen, "_kernels", lambda *a: chosen._gathered(*a))
    monkeypatch.setattr(chosen, "_by_token", lambda *a: chosen._alone(*a, None))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(by_kernels, run(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(1000, 1000), (300, 1111), (300, 1068)])
@pytest.mark.parametrize(
    "shape", [(32, 2, 100, 16), (64, 4, 128, 16), (32, 1, 256, 16), (16, 1, 7, 0)], ids=str
)
def test_hip_by_kernels_is_the_choice(shape, T, S, dtype):
    """Blocks, windows and sinks where they are = the same keys copied."""
    rows, block, window, sinks = shape
    options = {"rows": rows, "block": block, "window": window, "sinks": sinks}
    policy = create_policy("hip", budget=128, dense_layers=0, **options)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, S, n, 64, device="cuda").to(dtype) for n in (4, 2, 2))
    site = Site(5, 8, heads=4, kv_heads=2, head_dim=64, window=None)
    layer = policy.layer(site)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    places = torch.arange(S - T, S, device="cuda")[None]
    q = q[:, -T:]
    call = Call(site, q, k[:, -T:], v[:, -T:], layer, 0.125, None, places, lambda x, p: x)
    found = policy.search(q, k)
    want = policy._gathered(call, found, rows, window)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(policy._attend(call, found, rows, window), want, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("representative", ["first", "center"])
@pytest.mark.parametrize(("rows", "block", "budget"), [(32, 2, 256), (64, 4, 300), (1, 1, 40)])
def test_hip_search_by_the_kernel(rows, block, budget, representative, share, dtype):
    """The blocks that the definition finds; products of such integers are exact anywhere."""
    T = 1 if rows == 1 else 3000
    generator = torch.Generator().manual_seed(rows)
    q = torch.randint(-64, 65, (2, T, 6, 128), generator=generator)
    k = torch.randint(-64, 65, (2, 4000, 2, 128), generator=generator)
    options = {"rows": rows, "block": block, "budget": budget}
    policy = create_policy("hip", representative=representative, share=share, **options)
    found = policy.search(q.cuda().to(dtype), k.cuda().to(dtype))
    assert torch.equal(found, policy.search(q.cuda().double(), k.cuda().double()))


@pytest.mark.parametrize(("T", "S"), [(4096, 4096), (777, 3001), (65, 70)])
def test_diagonals_by_the_kernels(T, S):
    """Runs and single columns are those that the CPU finds."""
    from subquad.policies.parts import lines

    generator = torch.Generator().manual_seed(S)

    def drawn(n):
        order = torch.rand(2, 3, S, generator=generator).argsort(-1)
        return order[..., :n].sort(-1).values

    columns, distances = drawn(min(S, 300)), drawn(min(S, 60))
    want = lines.blocks(columns, distances, T, S, 64)
    found = lines.blocks(columns.cuda(), distances.cuda(), T, S, 64)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(lines.trimmed(a.long()).cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("P", "K"), [(1, 64), (100, 128), (8192, 96)])
def test_bounds_by_the_kernel(P, K, dtype):
    from subquad.policies import Quest

    torch.manual_seed(0)
    q = torch.randn(2, 12, K, device="cuda").to(dtype)
    a, b = torch.randn(2, 2, P, 2, K, device="cuda").to(dtype)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    found = Quest().bounds(q, low, high)
    want = Quest().bounds(q.double(), low.double(), high.double())
    torch.testing.assert_close(found, want.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "n", "lists"), [(16, 64, 12), (7, 5, 2), (1, 300, 4)])
def test_a_token_by_the_kernel(size, n, lists, dtype):
    """Some spans are none, some reach over the end; in float64, the same keys copied."""
    from subquad.ops.attention.triton.token import token
    from subquad.policies.parts import chosen

    torch.manual_seed(0)
    S, policy = 1111, create_policy("quest", dense_layers=0)
    q = torch.randn(2, 1, 12, 128, device="cuda").to(dtype)
    k, v = torch.randn(2, 2, S, 2, 128, device="cuda").to(dtype)
    starts = torch.rand(2, lists, S // size + 1, device="cuda").argsort(-1)[..., :n] * size
    starts[:, :, 1::9] = -1
    found = token(q, k, v, starts, size, scale=0.1, first=200)
    site = Site(5, 8, heads=12, kv_heads=2, head_dim=128, window=S - 200)
    layer = policy.layer(Site(5, 8, 12, 2, 128, None))
    layer.update(k.double().transpose(1, 2), v.double().transpose(1, 2))
    places = torch.full((2, 1), S - 1, device="cuda")
    wide = (x.double() for x in (q, k[:, -1:], v[:, -1:]))
    call = Call(site, *wide, layer, 0.1, None, places, lambda x, p: x)
    want = chosen._alone(call, starts[:, :, None], size, None).to(dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)
