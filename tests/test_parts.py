"""The parts that mixers share, each against torch's own or against its formula."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kit import close, poisoned
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.decay import (
    A_log_parameter,
    LayerBound,
    LowerBounds,
    bounded_gate,
    dt_bias_parameter,
)
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm, sum_norm
from subquad.ops.layer import softplus_decay


def conv(size=4, D=5, **options):
    return ShortConv(D, size, **options).double()


def torch_conv(part, x):
    weight, bias = part.weight, part.bias
    y = F.conv1d(F.pad(x.mT, (part.size - 1, 0)), weight, bias, groups=weight.shape[0]).mT
    return F.silu(y) if part.activation == "silu" else y


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"activation": "identity"}], ids=str)
def test_conv_is_torch_conv1d(size, T, options):
    part, x = conv(size, **options), torch.randn(2, T, 5, dtype=torch.float64)
    with poisoned():
        y, past = part(x)
    close(y, torch_conv(part, x), 1e-12)
    close(past, F.pad(x, (0, 0, size, 0))[:, T + 1 :])


def test_conv_carries_its_past():
    part, x = conv(bias=True), torch.randn(2, 11, 5, dtype=torch.float64)
    whole, last = part(x)
    ys, past = [], None
    for piece in x.split([2, 1, 1, 6, 1], 1):
        y, past = part(piece, past)
        ys.append(y)
    close(torch.cat(ys, 1), whole, 1e-12)
    close(past, last)


def test_conv_past_has_memory_of_its_own():
    x = torch.randn(1, 500, 5, dtype=torch.float64)
    cu = torch.tensor([0, 500], dtype=torch.int32)
    for boundaries in (None, cu):
        _, past = conv()(x, None, boundaries)
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


@pytest.mark.parametrize("size", [1, 4])
def test_conv_packed_is_looped(size):
    """With an empty sequence, ones shorter than the kernel, and a past of their own."""
    part, x = conv(size, bias=True), torch.randn(1, 12, 5, dtype=torch.float64)
    bounds = [0, 1, 1, 3, 12]
    cu = torch.tensor(bounds, dtype=torch.int32)
    for past in (None, torch.randn(4, size - 1, 5, dtype=torch.float64)):
        with poisoned():
            y, last = part(x, past, cu)
        for n, (a, b) in enumerate(pairwise(bounds)):
            before = None if past is None else past[n : n + 1]
            alone, alone_last = part(x[:, a:b], before)
            close(y[:, a:b], alone, 1e-12)
            close(last[n : n + 1], alone_last)


def test_conv_gradients():
    part, x = conv(3, D=2, bias=True), torch.randn(1, 6, 2, dtype=torch.float64)
    past, cu = torch.randn(2, 2, 2, dtype=torch.float64), torch.tensor([0, 2, 6])
    leaves = [x.requires_grad_(), past.requires_grad_(), part.weight, part.bias]
    assert torch.autograd.gradcheck(lambda x, past, *_: part(x, past, cu), leaves)
    assert torch.autograd.gradcheck(lambda x, past, *_: part(x, past[:1]), leaves)


def test_norms_are_their_formulas():
    x, gate = torch.randn(3, 7, 12, dtype=torch.float64), torch.randn(3, 7, 12).double()

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    def norm(**options):
        part = GatedRMSNorm(12, eps=1e-3, **options).double()
        torch.nn.init.normal_(part.weight)
        return part, part.weight

    part, w = norm()
    close(part(x), rms(x) * w, 1e-12)
    close(part(x, gate), rms(x) * w * F.silu(gate), 1e-12)
    part, w = norm(activation="sigmoid")
    close(part(x, gate), rms(x) * w * gate.sigmoid(), 1e-12)
    part, w = norm(gate_first=True, groups=3)
    gated = (x * F.silu(gate)).unflatten(-1, (3, 4))
    close(part(x, gate), rms(gated).flatten(-2) * w, 1e-12)
    close(l2_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), 1e-12)
    close(sum_norm(x.exp()), x.softmax(-1), 1e-12)
    assert not sum_norm(torch.zeros(2, 4)).any()


def test_softplus_decay_is_its_formula():
    x, A_log, bias = torch.randn(2, 5, 3).double(), torch.randn(3).double(), torch.randn(3).double()
    close(softplus_decay(x, A_log, bias), -A_log.exp() * (1 + (x + bias).exp()).log(), 1e-9)
    low = softplus_decay(x.bfloat16(), A_log.bfloat16(), bias.bfloat16())
    assert low.dtype == torch.float32


def test_initial_gates():
    A = A_log_parameter(1000, 0.0, 16.0).exp()
    assert 0 < A.min() < 1 < 15 < A.max() < 16
    assert A_log_parameter(5, 0.0, 1e-9).isfinite().all()
    dt = F.softplus(dt_bias_parameter(1000)).detach()
    assert 1e-3 * 0.99 < dt.min() < 2e-3
    assert 0.09 < dt.max() < 0.1 * 1.01
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 0.1
    assert A_log_parameter(2, 1, 2)._no_weight_decay


def test_bounded_gate_keeps_its_digits():
    """log f and 1 - f in float32 against float64, from shut to open."""
    r = torch.linspace(-60, 60, 241)
    for bound in (None, torch.tensor(0.3), torch.tensor(0.999)):
        lb = 0.0 if bound is None else bound.double()
        s, t = r.double().sigmoid(), (-r.double()).sigmoid()
        log, rest = bounded_gate(r, bound)
        torch.testing.assert_close(rest.double(), (1 - lb) * t, rtol=1e-5, atol=0)
        want = torch.log1p(-(1 - lb) * t)
        want = torch.where(r < 0, (lb + (1 - lb) * s).log(), want)
        torch.testing.assert_close(log.double(), want, rtol=1e-5, atol=2e-7)


def test_lower_bounds_rise_from_zero_to_below_one():
    bounds = LowerBounds(5, 7).double()
    torch.nn.init.normal_(bounds.weight)
    lb = torch.stack([bounds(layer) for layer in range(5)])
    P = bounds.weight.softmax(0)
    close(lb, P.cumsum(0) - P[0], 1e-12)
    assert not lb[0].any()
    assert (lb.diff(dim=0) > 0).all()
    assert lb[-1].max() < 1


def test_layer_bound_comes_from_the_model_or_the_layer():
    model = LowerBounds(3, 4)
    shared = LayerBound(4, layer=1, layers=3, bounds=model)
    assert not list(shared.parameters())
    close(shared(), model(1))
    own = LayerBound(4, layer=1, layers=3, bounds=None)
    close(own(), torch.full((4,), 1 / 3), 1e-6)
    assert LayerBound(4, layer=0, layers=3, bounds=model)() is None
    fixed = LayerBound(4, layer=0, layers=1, bounds=torch.full((4,), 0.5))
    assert not fixed.state_dict()
    close(fixed(), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2"):
        LayerBound(4, layer=3, layers=3, bounds=None)
    with pytest.raises(ValueError, match="bounds must have shape"):
        LayerBound(4, layer=1, layers=2, bounds=model)
