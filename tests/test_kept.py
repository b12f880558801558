"""What is made once serves whoever comes later, whatever mode the first caller was in."""

from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from subquad import mask
from subquad.mask.kept import kept
from subquad.ops.attention import attention
from subquad.ops.attention.neighborhood import neighborhood
from subquad.ops.attention.windows import biased_neighborhood


def _sorted(x):
    return neighborhood(x, x, x, 3, tile=(4, 4))


def _biased(x):
    return biased_neighborhood(x, x, x, x.new_zeros(2, 5, 5), 3)


@pytest.mark.parametrize("run", [_sorted, _biased])
@pytest.mark.parametrize("mode", ["inference", "export", "fake"])
def test_a_mode_leaves_nothing_behind(run, mode):
    # A size of its own: no other test has asked for it.
    side = 8 + ["inference", "export", "fake"].index(mode)
    x = torch.randn(1, side, side, 2, 8)
    if mode == "export":

        class Layer(torch.nn.Module):
            def forward(self, x):
                return run(x)

        if run is _biased:  # the sizes of the other depend on values
            torch.export.export(Layer(), (x,), strict=False)
    else:
        with ExitStack() as stack:
            if mode == "inference":
                stack.enter_context(torch.inference_mode())
                run(x)
            elif run is _biased:
                fake = stack.enter_context(FakeTensorMode())
                run(fake.from_tensor(x))
    leaf = x.requires_grad_()
    y = run(leaf)
    y.square().sum().backward()
    right = mask.neighborhood((side, side), 3).dense(side**2, side**2)
    flat = x.detach().flatten(1, 2).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(flat, flat, flat, right)
    torch.testing.assert_close(y.detach().flatten(1, 2), want.transpose(1, 2))


def test_tiles_of_a_default_device_lie_on_the_cpu():
    m = mask.causal() & mask.window(77) & mask.documents(torch.arange(300) // 50)
    with torch.device("meta"):
        found = m.tiles(300, 300, 64)
    assert found.ptr.device.type == "cpu"
    assert m.area(300, 300) == int(m.dense(300, 300).sum())


@pytest.mark.parametrize(
    "m",
    [
        mask.causal() & mask.window(21),
        mask.causal() & (mask.window(5) | mask.sinks(2)),
        mask.documents(torch.arange(200) // 70) & mask.causal(),
        mask.per_head([mask.causal(), mask.window(3)]),
    ],
)
def test_attention_on_another_device_than_the_default_one(m):
    x = torch.randn(1, 200, 2, 16, requires_grad=True)
    want = attention(x, x, x, m, backend="reference")
    with torch.device("meta"):
        got = attention(x, x, x, m, backend="torch")
        got.sum().backward()
    torch.testing.assert_close(got, want)
    assert x.grad is not None


def test_made_once_and_errors_are_not_kept():
    calls = []

    @kept(8)
    def make(n):
        calls.append(n)
        if len(calls) == 1:
            raise ValueError("no")
        return torch.arange(n)

    with pytest.raises(ValueError, match="no"):
        make(3)
    assert make(3) is make(3)
    assert calls == [3, 3]
