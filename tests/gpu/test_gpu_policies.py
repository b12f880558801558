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
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(by_kernels, run(), atol=tolerance, rtol=tolerance)
