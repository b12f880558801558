"""The layer's short steps: forms against the definitions, kernels in Triton's interpreter."""

import pytest
import torch
from torch.autograd import gradcheck

import subquad
from kit import in_the_interpreter
from subquad.bench.layer import LIMITS, Case, errors, run
from subquad.ops import layer
from subquad.ops.backend import explain, interpreted

# Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")

CASES = [
    Case("short_conv", (2, 21, 20), past=True, bias=True),
    Case("short_conv", (1, 1, 16), past=True),
    Case("short_conv", (3, 2, 5), activation="relu"),
    Case("short_conv", (1, 60, 33), size=3, bias=True, past=True, packed=(0, 5, 1, 0, 34, 20)),
    Case("short_conv", (1, 40, 300), size=2, packed=(31, 9), activation="elu"),
    Case("short_conv", (2, 20, 8), size=8, activation="identity", gaps=True),
    Case("short_conv", (2, 0, 8), past=True),
    Case("l2_norm", (2, 5, 3, 20)),
    Case("l2_norm", (3, 300), gaps=True),
    Case("gated_rms_norm", (2, 45, 24), gate=False),
    Case("gated_rms_norm", (2, 3, 5, 24), activation="sigmoid"),
    Case("gated_rms_norm", (2, 45, 24), gate_first=True, groups=3, gaps=True),
    Case("gated_rms_norm", (0, 24)),
    Case("gated", (3, 7, 50)),
    Case("gated", (1,), activation="elu"),
    Case("softplus_decay", (2, 31, 6)),
    Case("softplus_decay", (2, 31, 3, 20)),
    Case("token_losses", (7, 50)),
    Case("token_losses", (3, 5000), gaps=True),
]


def _name(case):
    return case.name


def test_kernels_in_the_interpreter():
    in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_kernels(case):
    found = errors(case, "cpu")
    assert max(found.values()) <= LIMITS[case.dtype], found


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_half_precision(dtype):
    for case in (
        Case("short_conv", (2, 21, 20), dtype, bias=True, past=True),
        Case("l2_norm", (7, 20), dtype),
        Case("gated_rms_norm", (7, 24), dtype),
        Case("softplus_decay", (1, 9, 3, 20), dtype),
        Case("token_losses", (9, 70), dtype),
    ):
        found = errors(case, "cpu")
        assert max(found.values()) <= LIMITS[dtype], (case, found)


@inside
def test_kernels_save_their_arguments_alone():
    kept = []
    x, gate = (torch.randn(2, 9, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        layer.short_conv(x, weight)
        layer.gated_rms_norm(x, gate, weight[:, 0].detach())
        layer.gated(x, gate)
    assert {t.data_ptr() for t in kept if t is not None} <= {
        t.data_ptr() for t in (x, gate, weight)
    }


@inside
def test_kernels_refuse_second_derivatives():
    x = torch.randn(1, 5, 16, requires_grad=True)
    (g,) = torch.autograd.grad(layer.l2_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        g.sum().backward()


@inside
def test_operations_are_well_formed():
    from subquad.ops.layer.triton.conv_op import short_conv
    from subquad.ops.layer.triton.gate_op import gated, softplus_decay
    from subquad.ops.layer.triton.norm_op import norm

    x = torch.randn(1, 9, 16, requires_grad=True)
    weight, cu = torch.randn(16, 4, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    past, A_log = torch.randn(2, 3, 16, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    bias = torch.randn(4, 4, requires_grad=True)
    for op, given in (
        (short_conv, (x, weight, None, past, cu, "silu")),
        (norm, (x, x, weight[:, 0].detach().clone(), True, 1e-5, "silu", False, 1)),
        (gated, (x, past[:1, :1].expand(1, 9, 16).detach().clone(), "silu")),
        (softplus_decay, (x.view(1, 9, 4, 4), A_log, bias)),
    ):
        torch.library.opcheck(op.overload, given)


@pytest.mark.parametrize("case", [c for c in CASES if 0 not in c.shape], ids=_name)
def test_torch_form_equals_the_definition(case):
    torch.manual_seed(0)
    inputs = [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_()
        for t in case.draw("cpu")
    ]
    got, want = run(case.step("torch"), inputs), run(case.step("reference"), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        Case("short_conv", (1, 9, 2), size=3, past=True, bias=True, packed=(2, 0, 7)),
        Case("l2_norm", (2, 3, 4)),
        Case("gated_rms_norm", (2, 3, 4), groups=2),
        Case("gated", (2, 3)),
        Case("softplus_decay", (1, 3, 2, 2)),
        Case("token_losses", (4, 5)),
    ],
    ids=_name,
)
def test_torch_form_has_both_derivatives(case):
    torch.manual_seed(0)
    inputs = [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_()
        for t in case.draw("cpu")
    ]
    learned = [t for t in inputs if t is not None and t.requires_grad]

    def step(*leaves):
        given = {id(t): leaf for t, leaf in zip(learned, leaves, strict=True)}
        return case.step()(*[given.get(id(t), t) for t in inputs])

    assert gradcheck(step, learned)
    assert torch.autograd.gradgradcheck(step, learned)


@pytest.mark.parametrize("case", CASES[:1] + CASES[3:4] + CASES[10:11] + CASES[13:18:2], ids=_name)
def test_compiles_to_one_graph(case):
    inputs = case.draw("cpu")
    want = run(case.step(), inputs)
    got = run(torch.compile(case.step(), fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_under_transforms_and_autocast():
    x, weight = torch.randn(3, 2, 5, 16), torch.randn(16, 4)
    got = torch.func.vmap(lambda x: layer.l2_norm(layer.short_conv(x, weight)))(x)
    want = torch.stack([layer.l2_norm(layer.short_conv(one, weight)) for one in x])
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.gated_rms_norm(x, None, weight[:, 0])
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer.gated_rms_norm(x, None, weight[:, 0]))


def test_what_does_not_fit_is_refused():
    x = torch.randn(2, 5, 16)
    for match, call in {
        "activation": lambda: layer.short_conv(x, torch.randn(16, 4), activation="swish"),
        "weight": lambda: layer.short_conv(x, torch.randn(15, 4)),
        "past": lambda: layer.short_conv(x, torch.randn(16, 4), past=x),
        "batch of 1": lambda: layer.short_conv(
            x, torch.randn(16, 4), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)
        ),
        "groups": lambda: layer.gated_rms_norm(x, None, torch.ones(16), groups=3),
        "gate": lambda: layer.gated(x, x[..., :1]),
        "A_log": lambda: layer.softplus_decay(x, torch.ones(3), torch.ones(16)),
        "floating point": lambda: layer.l2_norm(x.int()),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_who_runs():
    seen = explain("layer", D=64, device="cuda", size=9)
    assert [v.backend for v in seen if v.chosen] == ["torch"]
    assert "9" in seen[0].reason
    seen = explain("layer", D=40000, part="l2_norm", device="cuda")
    assert "16384" in seen[0].reason


def test_a_layer_learns_the_same_by_kernels():
    """Under the interpreter the mixers run on the kernels; outside this is the torch form twice."""
    torch.manual_seed(0)
    mixer = subquad.create_mixer("gated_deltanet", dim=32, heads=2, head_dim=8)
    x = torch.randn(1, 20, 32)
    learned = list(mixer.parameters())
    got = torch.autograd.grad(mixer(x)[0].square().sum(), learned)
    with subquad.ops.backend.backend("torch"):
        want = torch.autograd.grad(mixer(x)[0].square().sum(), learned)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
