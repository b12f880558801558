"""Mixed attention's GPU kernels, run by Triton's interpreter on the CPU, against the definition."""

import pytest
import torch

from kit import in_the_interpreter
from subquad.bench.kernel_attention import LIMITS, Case, errors
from subquad.ops.backend import explain, interpreted

# Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")


def test_kernels_in_the_interpreter():
    in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 70, "window": 20},
        {"T": 66, "window": 1, "K": 24, "V": 20},
        {"T": 80, "window": 30, "packed": (10, 0, 1, 69)},
        {"T": 65, "window": 33, "past": 33, "B": 1},
        {"T": 70, "window": 90, "late": True, "H": 2, "G": 1},
    ],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_outputs_and_gradients(layout, sizes):
    case = Case(**{"H": 2, "G": 1, "K": 16, "V": 16, "F": 16, "layout": layout, **sizes})
    found = errors(case, "cpu")
    assert max(found.values()) <= LIMITS[torch.float32], found


def test_who_runs():
    seen = explain("kernel_attention", T=64, H=2, K=64, device="cuda", chosen=True)
    assert [v.backend for v in seen if v.chosen] == ["torch"]
    seen = explain("kernel_attention", T=64, H=2, K=64, dtype=torch.float64)
    assert not seen[0].ok
