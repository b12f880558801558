"""Mixers of images on a CUDA GPU against float64 on the CPU, forward and backward."""

import pytest
import torch

import subquad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPTIONS = {
    "inline": {},
    "mala": {},
    "rala": {},
    "soft": {"ratio": 4},
    "softmax": {"causal": False, "rope_theta": None},
    "neighborhood": {"window": [7, 7]},
}


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 4e-2)])
def test_gpu_agrees_with_float64(key, dtype, tolerance):
    torch.manual_seed(0)
    mixer = subquad.create_mixer(key, dim=64, heads=2, **OPTIONS[key]).to(dtype)
    wide = subquad.create_mixer(key, dim=64, heads=2, **OPTIONS[key]).double()
    wide.load_state_dict(mixer.state_dict())
    mixer.cuda()
    x = torch.randn(2, 29 * 31, 64).to(dtype)
    grad = torch.randn_like(x)
    found = []
    for module, device, kind in ((mixer, "cuda", dtype), (wide, "cpu", torch.float64)):
        given = x.to(device, kind).requires_grad_()
        y, _ = module(given, grid=(29, 31))
        y.backward(grad.to(device, kind))
        found.append((y.detach().cpu().double(), given.grad.cpu().double()))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("name", ["micro", "micro_pyramid"])
def test_models_train(name):
    torch.manual_seed(0)
    model = subquad.create_vision_model(name).cuda()
    x, labels = torch.randn(4, 1, 64, 64).cuda(), torch.arange(4).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x, labels=labels).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
