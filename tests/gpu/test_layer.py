"""The layer's kernels on a CUDA GPU: dtypes, odd sizes, packing, gaps, against the definition in
float64, forward and all gradients."""

import pytest
import torch

import subquad
from subquad.bench.layer import LIMITS, Case, errors, run
from subquad.ops.backend import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PACKED = (0, 1, 1, 498, 0, 501)


def _cases():
    for dtype in LIMITS:
        conv = {"part": "short_conv", "dtype": dtype}
        yield Case(shape=(2, 333, 768), **conv)
        yield Case(shape=(8, 1024, 1536), bias=True, past=True, **conv)
        yield Case(shape=(1, 1, 64), past=True, **conv)
        yield Case(shape=(3, 2, 33), bias=True, past=True, **conv)
        yield Case(shape=(2, 65, 1), size=2, activation="relu", **conv)
        yield Case(shape=(2, 130, 5000), size=8, past=True, activation="elu", **conv)
        yield Case(shape=(1, 77, 256), size=5, activation="identity", gaps=True, **conv)
        yield Case(shape=(1, 1001, 100), size=3, past=True, bias=True, packed=PACKED, **conv)
        yield Case(shape=(1, 20000, 16), past=True, packed=(40,) * 500, **conv)
        for shape in ((2, 333, 6, 128), (5, 7, 33), (1, 1, 1024), (2, 3, 16384)):
            yield Case("l2_norm", shape, dtype)
            norm = {"part": "gated_rms_norm", "shape": shape, "dtype": dtype}
            yield Case(gate=False, **norm)
            yield Case(gaps=True, **norm)
            for activation in ("sigmoid", "elu", "identity"):
                yield Case(activation=activation, **norm)
        yield Case("gated_rms_norm", (3, 50, 96), dtype, gate_first=True, groups=4)
        yield Case("gated", (2, 333, 2816), dtype)
        yield Case("gated", (3, 33), dtype, activation="sigmoid")
        for shape in ((300, 32000), (3, 50257), (1, 5)):
            yield Case("token_losses", shape, dtype)
        for shape in ((2, 1333, 6), (2, 1333, 8, 128), (3, 7, 3, 20)):
            yield Case("softplus_decay", shape, dtype)


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case.name)
def test_against_float64(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.parametrize(
    "case",
    [
        Case("short_conv", (8, 4096, 768), torch.bfloat16, bias=True),
        Case("gated_rms_norm", (8, 4096, 1024), torch.bfloat16),
        Case("softplus_decay", (8, 4096, 8, 128), torch.bfloat16),
    ],
    ids=lambda case: case.part,
)
def test_gradients_are_the_same_each_time(case):
    inputs = case.draw("cuda")
    first = run(case.step("triton"), inputs)
    for _ in range(3):
        assert all(map(torch.equal, first, run(case.step("triton"), inputs)))


@pytest.mark.parametrize("key", ["gated_deltanet", "kimi_linear", "mamba2"])
def test_a_layer_compiles_to_one_graph_and_equals_its_torch_form(key):
    torch.manual_seed(0)
    mixer = subquad.create_mixer(key, dim=128).cuda()
    x = torch.randn(2, 200, 128, device="cuda")
    learned = list(mixer.parameters())

    def gradients(run):
        y = run(x)
        return [y, *torch.autograd.grad(y.square().mean(), learned)]

    got = gradients(lambda x: mixer(x)[0])
    whole = gradients(torch.compile(lambda x: mixer(x)[0], fullgraph=True))
    with backend("torch"):
        want = gradients(lambda x: mixer(x)[0])
    for a, b, c in zip(got, whole, want, strict=True):
        scale = float(c.abs().max())
        torch.testing.assert_close(a, c, rtol=1e-3, atol=2e-4 * scale)
        torch.testing.assert_close(b, c, rtol=1e-3, atol=2e-4 * scale)
