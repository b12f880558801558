"""Operations: called by themselves, and where something looks on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.ops.scan.chunk import _scan

PLACE = torch.ops.subquad.scan.default


def _inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, a = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, 3, dtype=torch.float64)
    return x, a, torch.randn(2, 3, dtype=torch.float64)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


def test_a_call_alone_equals_one_through_the_dispatcher() -> None:
    inputs = _inputs()
    assert torch.equal(_scan(*inputs), PLACE(*inputs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    alone = torch.autograd.grad(_scan(*leaves).square().sum(), leaves, create_graph=True)
    through = torch.autograd.grad(PLACE(*leaves).square().sum(), leaves)
    for one, other in zip(alone, through, strict=True):
        assert torch.equal(one, other)
    assert torch.autograd.gradgradcheck(_scan, leaves)


def test_forward_mode_is_refused() -> None:
    """Its derivative would be 0."""
    inputs = _inputs()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(_scan, inputs, inputs)
    with pytest.raises(NotImplementedError, match="forward mode"), forward_ad.dual_level():
        _scan(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])
    with forward_ad.dual_level():
        assert torch.equal(_scan(*inputs), PLACE(*inputs))


def test_who_looks_on_sees_the_operation() -> None:
    inputs = _inputs()
    with _Seen() as seen:
        _scan(*inputs)
    assert seen.calls == [PLACE]
    with FakeTensorMode() as mode:
        found = _scan(*(mode.from_tensor(t) for t in inputs))
    assert found.shape == inputs[0].shape
    assert _scan(*(mode.from_tensor(t) for t in inputs)).fake_mode is mode
    assert _scan(*(t.to("meta") for t in inputs)).is_meta


def test_an_operation_without_derivative_says_so() -> None:
    from subquad.ops.probe.solve import _solve

    b, k = torch.randn(1, 4, 1, 3, requires_grad=True), torch.randn(1, 4, 1, 3)
    lo, hi = torch.zeros(1, 4, dtype=torch.int32), torch.arange(1, 5, dtype=torch.int32)[None]
    rest = k, k, k, torch.ones(1, 4, 1), lo, hi, 0.5, 1, "subquad.ops.probe.chunk"
    with pytest.raises(RuntimeError, match="no derivative"):
        _solve(b, *rest).sum().backward()
