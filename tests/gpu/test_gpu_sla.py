"""SLA on a CUDA GPU against float64 on the CPU, forward and backward."""

import pytest
import torch

import subquad
from subquad.ops.kernel_attention.marginal import PHI, marginal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [
    {"T": 1024},
    {"T": 1000, "topk": 0.3},
    {"T": 700, "query_block": 128, "topk": 0.2},
    {"T": 513, "block": 16, "kv_heads": 1, "negligible": 0.0},
    {"T": 1000, "variant": "main", "feature_map": "elu", "topk": 0.2},
    {"T": 900, "topk": 1.0, "feature_map": "relu"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_gpu_agrees_with_float64(case, dtype, limit, monkeypatch):
    options = {"dim": 128, "heads": 2, "topk": 0.1, **case}
    T = options.pop("T")
    torch.manual_seed(0)
    mixer = subquad.create_mixer("sla", **options)
    with torch.no_grad():
        for p in mixer.linear_proj.parameters():
            p.normal_(std=0.5)
    mixer = mixer.to(dtype)
    wide = subquad.create_mixer("sla", **options).double()
    wide.load_state_dict(mixer.state_dict())
    x, grad = (torch.randn(2, T, 128).to(dtype) for _ in range(2))
    # Rounding decides ties of the ranking: both read the blocks that float64 chooses.
    q, k = (p(x.double()).unflatten(-1, (-1, 64)).detach() for p in (wide.q_proj, wide.k_proj))
    index, rest = wide.choose(q, k)
    monkeypatch.setattr(wide, "choose", lambda q, k: (index, rest))
    monkeypatch.setattr(mixer, "choose", lambda q, k: (index.cuda(), rest.cuda()))
    found = []
    for module, device, kind in ((mixer.cuda(), "cuda", dtype), (wide, "cpu", torch.float64)):
        given = x.to(device, kind).requires_grad_()
        y, _ = module(given)
        y.backward(grad.to(device, kind))
        parts = [y.detach(), given.grad, *(p.grad for p in module.parameters())]
        found.append([t.cpu().double() for t in parts])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < limit * want.norm().clamp_min(1e-6)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("T", "S", "H", "G", "K", "V", "rows", "size"),
    [
        (1000, 700, 4, 2, 64, 64, 64, 64),
        (513, 1025, 2, 1, 40, 128, 128, 16),
        (64, 5000, 1, 1, 16, 32, 16, 200),
        (500, 500, 2, 2, 128, 128, 64, 64),
    ],
)
def test_linear_part(T, S, H, G, K, V, rows, size, phi, dtype, limit):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, H, K), torch.randn(2, S, G, K), torch.randn(2, S, G, V)
    do = torch.randn(2, T, H, V)
    read = torch.rand(2, H, -(-T // rows), -(-S // size)) < 0.6
    read[0, 0, 0] = False
    found = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        own = [t.to(dtype).to(device, kind).requires_grad_() for t in (q, k, v)]
        o = marginal(*own, read.to(device), size, rows=rows, phi=phi)
        o.backward(do.to(o))
        found.append([t.cpu().double() for t in (o.detach(), *(t.grad for t in own))])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < limit * want.norm()


def test_gpu_chooses_as_float64_does():
    torch.manual_seed(0)
    mixer = subquad.create_mixer("sla", dim=128, heads=2, topk=0.1).double()
    q, k = (torch.randn(2, 2000, 2, 64) for _ in range(2))
    index, rest = mixer.choose(q.double(), k.double())
    got, skipped = mixer.choose(q.cuda(), k.cuda())
    same = torch.zeros_like(rest).scatter_(-1, index.long(), True)
    ours = torch.zeros_like(rest).scatter_(-1, got.cpu().long(), True)
    assert (same == ours).double().mean() > 0.999
    assert (rest == skipped.cpu()).double().mean() > 0.999
