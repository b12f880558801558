"""Mixed attention's kernels on a CUDA GPU: layouts, dtypes, widths, packing, a past, against the
definition in float64, forward and all gradients."""

import pytest
import torch

import subquad
from subquad.bench.kernel_attention import LIMITS, Case, errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _cases():
    for layout in ("sliding", "terraced"):
        for dtype in (F32, BF16, F16):
            yield Case(layout=layout, dtype=dtype, T=333, window=64, K=64, V=64, F=64)
            yield Case(layout=layout, dtype=dtype, T=200, window=33, K=128, V=128, F=128)
            yield Case(layout=layout, dtype=dtype, T=150, window=20, K=48, V=80, F=32)
            yield Case(layout=layout, dtype=dtype, T=240, window=50, packed=(100, 0, 1, 139))
            yield Case(layout=layout, dtype=dtype, T=120, window=64, past=64)
            yield Case(layout=layout, dtype=dtype, T=130, window=300, late=True)
        yield Case(layout=layout, dtype=F32, T=700, window=256, K=96, V=96, F=256, H=2, G=2)


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case.name)
def test_against_float64(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.parametrize("layout", ["sliding", "terraced"])
def test_a_layer_compiles_to_one_graph_and_decodes(layout):
    torch.manual_seed(0)
    mixer = subquad.create_mixer("lolcats", dim=128, heads=4, window=32, layout=layout).cuda()
    x = torch.randn(2, 200, 128, device="cuda")
    want, _ = mixer(x)
    got = torch.compile(lambda x: mixer(x)[0], fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        y, state = mixer(x[:, :150])
        for t in range(150, 170):
            y, state = mixer(x[:, t : t + 1], state=state)
            torch.testing.assert_close(y[:, 0], want[:, t], rtol=1e-3, atol=1e-4)
