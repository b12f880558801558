"""The recurrence's kernels on a CUDA GPU: every form, dtype, width, packing and state, against the
definition in float64, forward and all gradients."""

import threading
import warnings

import pytest
import torch

from subquad.bench.recurrence import (
    FORMS,
    LIMITS,
    Case,
    apart,
    decode_defined,
    decode_inputs,
    defined,
    errors,
    results,
    wide,
)
from subquad.ops.backend import backend
from subquad.ops.recurrence import recurrence

layout = pytest.importorskip("subquad.ops.recurrence.triton.layout")
plain = pytest.importorskip("subquad.ops.recurrence.triton.plain")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _cases():
    for decay, delta in FORMS:
        yield Case(decay, delta, T=333, dtype=BF16, packed=(0, 100, 1, 232), state=True)
        yield Case(decay, delta, T=200, dtype=F32, packed=(65, 0, 135), groups=2)
        yield Case(decay, delta, T=130, dtype=F16, K=32, V=96, state=True)
        yield Case(decay, delta, T=150, dtype=BF16, K=256, V=256)
        yield Case(decay, delta, T=100, dtype=F32, K=128, V=128, state=True)
        yield Case(decay, delta, T=65, dtype=BF16, K=128, V=128, groups=2)
        yield Case(decay, delta, T=2100, H=1, dtype=BF16, state=True)  # split inside the GPU
    yield Case("channel", True, dtype=BF16, strong=True)
    yield Case("channel", False, dtype=F32, strong=True)
    yield Case("channel", True, dtype=F16, strong=True, K=128, V=128)
    for decay, delta in FORMS:
        yield Case(decay, delta, T=2100, H=1, dtype=F32, K=256, V=256, state=True)
    yield Case("none", True, T=4200, H=1, dtype=BF16, K=256, V=256, state=True)
    yield Case("head", True, dtype=BF16, K=256, V=64)
    yield Case("head", True, dtype=BF16, K=64, V=256)
    yield Case("head", True, dtype=F32, T=2100, H=1, packed=(1500, 0, 600))
    yield Case("head", False, dtype=BF16, T=4200, H=1, packed=(4000, 0, 200), state=True)
    yield Case("head", False, dtype=BF16, T=2100, H=1, K=256, V=64, state=True)
    yield Case("none", False, dtype=F32, T=100, K=256, V=256, state=True)


@pytest.fixture
def _poison():
    """Freed memory that the kernels' buffers come from holds NaN."""
    poison = torch.full((256 << 20,), float("nan"), device="cuda")
    del poison


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case.name)
def test_against_float64(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= LIMITS[case.dtype], found


BULK = [
    Case("head", True, B=2, T=320, dtype=BF16, K=128, V=128, groups=2, state=True),
    Case("none", True, B=2, T=128, dtype=F16, K=128, V=128),
    Case("head", True, T=2048, dtype=BF16, K=128, V=128, state=True),  # split inside the GPU
    Case("none", True, T=2048, H=4, dtype=F16, K=128, V=128),
    Case("head", False, B=2, T=320, dtype=BF16, K=128, V=128, groups=2, state=True),
    Case("head", False, T=2048, dtype=BF16, K=128, V=128, state=True),
    Case("none", False, T=2048, H=4, dtype=BF16, K=128, V=128, state=True),
    Case("none", False, B=2, T=320, dtype=F16, K=128, V=128, groups=2),
    Case("head", False, B=2, T=320, dtype=BF16, K=256, V=256, groups=2, state=True),
    Case("head", False, T=2048, H=1, dtype=BF16, K=256, V=256, state=True),
    Case("none", False, T=192, dtype=BF16, K=256, V=256, state=True),
    Case("head", True, B=2, T=320, dtype=BF16, K=256, V=256, groups=2, state=True),
    Case("head", True, T=2048, H=1, dtype=F16, K=256, V=256),
    Case("none", True, T=192, dtype=BF16, K=256, V=256, state=True),
    Case("channel", False, B=2, T=320, dtype=BF16, K=128, V=128, groups=2, state=True),
    Case("channel", True, T=2048, dtype=F16, K=128, V=128, state=True),  # split inside the GPU
    Case("channel", True, B=2, T=128, dtype=BF16, K=128, V=128, strong=True),
    Case("channel", False, T=192, dtype=BF16, K=256, V=256, state=True),
    Case("channel", True, B=2, T=320, dtype=BF16, K=256, V=256, groups=2),
]


@pytest.fixture
def _described(monkeypatch):
    """Small cases, too, are read by the copy engine."""
    monkeypatch.setattr(layout, "MANY", 0)
    layout.lay_out.cache_clear()
    yield
    layout.lay_out.cache_clear()


@pytest.mark.usefixtures("_poison", "_described")
@pytest.mark.parametrize("case", BULK, ids=lambda case: case.name)
def test_by_the_copy_engine(case):
    found = errors(case, "cuda")
    assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.usefixtures("_poison", "_described")
@pytest.mark.parametrize(
    "case", [c for c in BULK if not c.delta and c.K == 128], ids=lambda case: case.name
)
def test_programs_that_share_a_multiprocessor(case, monkeypatch):
    """Without the delta rule they read less far ahead."""
    for module in (layout, plain):
        monkeypatch.setattr(module, "processors", lambda device: 1)
    found = errors(case, "cuda")
    assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize(
    ("delta", "T", "width"),
    [
        (False, 1000, 128),
        (False, 1024, 128),
        (False, 1024, 256),
        (False, 6144, 128),
        (False, 6144, 256),
        (True, 1000, 128),
        (True, 1024, 128),
        (True, 1024, 256),
    ],
)
@pytest.mark.usefixtures("_described")
def test_outputs_are_as_exact_as_in_torch(decay, delta, T, width):
    """Products take bfloat16, two of them where one would show."""
    case = Case(decay, delta, T=T, K=width, V=width)
    inputs = case.draw("cuda")
    with backend("torch"), torch.no_grad():
        right = {"o": recurrence(**wide(inputs))[0]}
    off = {}
    for name in ("triton", "torch"):
        with backend(name), torch.no_grad():
            off[name] = apart({"o": recurrence(**inputs)[0]}, right)["o"]
    assert off["triton"] <= 1.2 * off["torch"], off


@pytest.mark.parametrize(("K", "first"), [(40, False), (48, True)])
def test_strong_decays_in_a_first_call_and_after_it(K, first):
    """A first call does not wait for the kernels of strong decays unless it has some."""
    for strong in (first, not first):
        case = Case("channel", True, T=100, K=K, V=24, dtype=BF16, strong=strong)
        found = errors(case, "cuda")
        assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.parametrize("delta", [False, True])
def test_the_same_twice(delta):
    """A result that moves between runs is a race."""
    inputs = Case("head", delta, B=2, T=1000, H=4, K=128, V=128).draw("cuda")
    with backend("triton"):
        one, two = results(recurrence, inputs), results(recurrence, inputs)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_offsets_beyond_int32():
    q = torch.randn(1, 140_000, 128, 128, device="cuda", dtype=BF16) / 11
    assert q.numel() > 2**31
    decay = -torch.rand(1, 140_000, 128, device="cuda")
    with torch.no_grad():
        last = recurrence(q, q, q, decay=decay)[0][:, :, -1:].clone()
        alone = q[:, :, -1:].contiguous()
        want = recurrence(alone, alone, alone, decay=decay[:, :, -1:].contiguous())[0]
    assert (last - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("form", ["auto", "recurrent"])
def test_one_token_and_token_by_token(form):
    case = Case("channel", True, B=3, T=1 if form == "auto" else 7, dtype=F32, state=True)
    inputs = case.draw("cuda")
    with torch.no_grad():
        o, last = recurrence(**inputs, form=form, backend="triton")
    want = defined(case, inputs)
    found = apart({"o": o, "last": last}, {n: want[n] for n in ("o", "last")})
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("decay", "delta"), [("head", False), ("channel", True)])
@pytest.mark.parametrize("T", [100, 2100])  # the latter is split inside the GPU
def test_first_call_compiles_all_its_kernels_at_once(decay, delta, T, monkeypatch):
    """Each by the rehearsal, none by a launch; widths that no other test has compiled."""
    import triton

    found = []

    def compiled(*, fn, **_):
        found.append((fn.name, "ThreadPool" in threading.current_thread().name))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", compiled)
    x = Case(decay, delta, T=T, H=1, K=48, V=80).draw("cuda")
    leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None}
    recurrence(**leaves, backend="triton")[0].sum().backward()
    assert len(found) >= 4
    assert all(ahead for _, ahead in found), found


def test_compiles_to_one_graph_and_exports():
    x = Case("head", True, T=128).draw("cuda")
    names = ("q", "k", "v", "decay", "beta")

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, decay, beta):
            return recurrence(q, k, v, decay=decay, beta=beta, backend="triton")[0]

    layer, args = Layer(), tuple(x[n] for n in names)
    want = layer(*args)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected a call to a `functools.lru_cache")
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*args), want)
    torch.testing.assert_close(torch.export.export(layer, args).module()(*args), want)


@pytest.mark.parametrize(("decay", "delta"), [("none", False), ("head", True), ("channel", True)])
def test_is_a_well_formed_operation(decay, delta):
    from subquad.ops.recurrence.triton import op

    x = Case(decay, delta, T=130, state=True).draw("cuda")
    names = ("q", "k", "v", "decay", "beta", "state")
    leaves = [None if x[n] is None else x[n].requires_grad_() for n in names]
    torch.library.opcheck(op._forward.overload, (*leaves, None, 0.1))


def test_decode_in_a_cuda_graph():
    from subquad.ops.recurrence.triton.decode import decode_layer

    inputs = decode_inputs("cuda", B=8, HQ=4, H=4, K=128, V=128, dtype=BF16)
    right, last = decode_defined(inputs)
    start = inputs["state"].clone()
    want, _ = decode_layer(**inputs)
    eager = inputs["state"].clone()
    assert ((want - right).norm() / right.norm()).item() < 1e-2
    assert ((eager - last).norm() / last.norm()).item() < 1e-4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = decode_layer(**inputs)
    inputs["state"].copy_(start)
    graph.replay()
    assert torch.equal(got, want)
    assert torch.equal(inputs["state"], eager)
