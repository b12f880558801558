"""The probe's kernels: on a CUDA GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch

from subquad.bench.probe import Case, errors
from subquad.ops.backend import interpreted
from subquad.ops.probe import probe

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or interpreted()), reason="needs a GPU or TRITON_INTERPRET=1"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# In the interpreter a program takes a tenth of a second: few of them, in float32.
SMALL = [
    Case(T=70, H=2, G=1, K=16, V=24, dtype=F32),
    Case(B=2, T=70, H=1, K=8, V=16, dtype=F32, starts=(0, 66), window=9),
    Case(T=70, H=1, K=16, V=16, dtype=F32, packed=(9, 0, 1, 60)),
    Case(T=9, S=75, H=1, K=16, V=16, dtype=F32, causal=False),
    Case(T=40, H=1, K=8, V=8, dtype=F32, local=True),
]


def _large():
    for dtype in (BF16, F16, F32):
        for width in (64, 128):
            sizes = {"K": width, "V": width, "dtype": dtype}
            yield Case(B=2, T=333, H=4, G=2, **sizes)
            yield Case(T=300, H=2, packed=(100, 0, 1, 199), **sizes)
            yield Case(B=2, T=200, H=2, starts=(0, 130), window=40, **sizes)
            yield Case(B=2, T=130, S=1000, H=3, **sizes)
            yield Case(T=257, H=2, causal=False, **sizes)
    yield Case(T=1500, H=2, K=32, V=96, dtype=BF16)
    yield Case(T=150, H=2, K=80, V=20, dtype=F32)
    for width in (32, 64, 128):
        yield Case(B=2, T=300, H=2, K=width, V=width, dtype=F32, local=True)
    yield Case(T=300, H=2, K=64, V=64, dtype=F32, local=True, packed=(100, 1, 199))


@pytest.mark.parametrize("case", [*SMALL, *(_large() if CUDA else ())], ids=lambda case: case.name)
def test_against_float64(case):
    found = errors(case, DEVICE)
    assert max(found.values()) <= case.limit, found


def test_zero_probe_is_the_mean_to_the_bit():
    """The correction of a zero r adds nothing, not even rounding."""
    from subquad.ops.probe import node
    from subquad.ops.probe.spans import spans

    x = Case(T=70, H=1, K=16, V=16, dtype=F32).draw(DEVICE)
    zero = torch.zeros_like(x["r"])
    lo, hi = spans(
        70, 70, causal=True, window=None, offset=0, starts=None, cu_seqlens=None, device=DEVICE
    )
    home = "subquad.ops.probe.triton.launch"
    o, mean, *_ = node.run(x["q"], x["k"], x["v"], zero, lo, hi, 0.25, True, False, home)
    assert torch.equal(o, mean)


@pytest.mark.parametrize("window", [None, 300])
def test_few_queries_share_the_keys_out(window):
    """Decoding: parts of the keys joined, also parts of which a query sees nothing."""
    case = Case(B=2, T=3, S=1100, H=2, G=1, K=16, V=24, dtype=F32, window=window, starts=(0, 1098))
    inputs, options = case.draw(DEVICE), case.options(DEVICE)
    with torch.no_grad():
        got = probe(**inputs, **options, backend="triton")
        wide = {n: t.double() for n, t in inputs.items()}
        want = probe(**wide, **options, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    assert got.isfinite().all()


def test_operator_contract():
    from subquad.ops.probe import node

    x = Case(T=9, H=1, K=16, V=16, dtype=F32).draw(DEVICE)
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v", "r")]
    lo = torch.zeros(1, 9, dtype=torch.int32, device=DEVICE)
    hi = torch.arange(1, 10, dtype=torch.int32, device=DEVICE)[None]
    home = "subquad.ops.probe.triton.launch"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        node.run.overload, (*leaves, lo, hi, 0.25, True, True, home), test_utils=tests
    )


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
class TestOnTheGPU:
    def test_the_same_twice(self):
        x = Case(B=2, T=1000, H=4, G=2, K=128, V=128).draw("cuda")
        leaves = [t.requires_grad_() for t in x.values()]

        def run():
            o = probe(**x, backend="triton")
            return [o, *torch.autograd.grad(o.float().square().sum(), leaves)]

        for one, two in zip(run(), run(), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize("key", ["parallax", "lla"])
    def test_mixer_compiles_and_decodes(self, key):
        import subquad

        torch.manual_seed(0)
        mixer = subquad.create_mixer(key, dim=64, heads=2).cuda()
        x = torch.randn(2, 65, 64, device="cuda")
        want = mixer(x)[0]
        got = torch.compile(lambda x: mixer(x)[0], fullgraph=True)(x)
        # lla solves a system a token, and a badly conditioned one enlarges q's and k's rounding:
        # single elements may be off, the whole may not
        assert (got - want).norm() < 1e-3 * want.norm()
        with torch.no_grad():
            _, state = mixer(x[:, :60])
            for t in range(60, 65):
                y, state = mixer(x[:, t : t + 1], state=state)
        assert (y[:, 0] - want[:, -1]).norm() < 1e-3 * want[:, -1].norm()
