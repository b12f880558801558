"""What explain() says is what runs."""

import pytest
import torch

from subquad import mask
from subquad.ops import backend as backends
from subquad.ops.attention import attention
from subquad.ops.backend import OPS, backend, explain, interpreted, uses_kernels
from subquad.ops.recurrence import recurrence
from subquad.ops.select import block_mass


def asked(op, **shape):
    """All answers for a small shape."""
    sizes = {"scan": {"T": 64, "D": 16}, "layer": {"D": 16}}.get(op, {"T": 64, "H": 2, "K": 16})
    return explain(op, **sizes, **shape)


@pytest.fixture
def _no_triton(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backends._examined.cache_clear()
    yield
    backends._examined.cache_clear()


@pytest.mark.usefixtures("_no_triton")
@pytest.mark.parametrize("op", OPS)
def test_without_triton_no_gpu_is_told_to_run_its_kernels(op):
    for verdict in asked(op, device="cuda"):
        if verdict.backend == "triton":
            assert not verdict.ok
            assert verdict.reason == "Triton is not installed"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_runs_in_float8(op, device):
    assert not any(v.chosen for v in asked(op, device=device, dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("op", ["attention", "kernel_attention", "probe"])
def test_more_heads_than_a_grid_has_go_elsewhere(op):
    shape = {"mask": mask.causal() & mask.window(3)} if op == "attention" else {}
    for batch, runs in ((4095, "triton"), (4096, "torch")):
        found = explain(op, B=batch, T=64, H=16, K=16, device="cuda", **shape)
        assert next(v.backend for v in found if v.chosen) == runs


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_by_name(dtype):
    x = torch.randn(1, 8, 2, 16).to(dtype)
    for run in (lambda: recurrence(x, x, x), lambda: attention(x, x, x, mask.causal())):
        with pytest.raises(ValueError, match="float8"):
            run()


@pytest.mark.skipif(not interpreted(), reason="kernels run on the CPU in the interpreter only")
def test_operations_without_a_list_obey_too():
    q, k = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16)
    by_kernels = block_mass(q, k, size=16)
    assert uses_kernels(q)
    with backend("torch"):
        assert not uses_kernels(q)
        torch.testing.assert_close(block_mass(q, k, size=16), by_kernels)


def test_on_the_cpu_no_kernel_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not uses_kernels(torch.zeros(1))
    assert not uses_kernels(torch.zeros(1, device="meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_kernels(torch.zeros(1))
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    assert not uses_kernels(torch.zeros(1))
