import copy
import importlib
import itertools
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import masks
import subquad
from kit import close, in_the_interpreter, poisoned
from subquad import mask
from subquad.ops.attention import attention, merge

plan = importlib.import_module("subquad.ops.attention.plan")


def inputs(B=2, T=33, S=None, H=4, G=2, K=6, V=5, dtype=torch.float64, grad=True):
    S = T if S is None else S
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V)
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


def gradients(out, tensors):
    """Through o and through lse, with weights that differ from place to place."""
    o, lse = out
    g = torch.Generator().manual_seed(7)
    weigh = torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)
    weigh_lse = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(lse.dtype)
    total = (o * weigh).sum() + (lse.masked_fill(lse == -torch.inf, 0) * weigh_lse).sum()
    return torch.autograd.grad(total, tensors)


def check_against_reference(q, k, v, m=None, backend="torch", tolerance=1e-9, **options):
    got = attention(q, k, v, m, return_lse=True, backend=backend, **options)
    want = attention(q, k, v, m, return_lse=True, backend="reference", **options)
    grads = zip(gradients(got, (q, k, v)), gradients(want, (q, k, v)), strict=True)
    for a, b in [*zip(got, want, strict=True), *grads]:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that few tokens make many tiles."""
    monkeypatch.setattr(plan, "TILE", 8)
    monkeypatch.setattr(plan, "LEAST_TILE", 4)
    plan.plan.cache_clear()
    yield
    plan.plan.cache_clear()


IDS = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3 + [2] * 7, [-1] * 5 + [0] * 28])
MASKS = {
    "none": None,
    "full": mask.full(),
    "causal": mask.causal(),
    "window": mask.causal() & mask.window(11),
    "sinks": mask.causal() & (mask.window(5) | mask.sinks(3)),
    "prefix": mask.causal() | mask.prefix(10),
    "nothing": mask.sinks(0),
    "rows without keys": mask.window(3) & ~mask.window(5),
    "holes": ~mask.window(7, 3),
    "strided": mask.strided(7, 2) & mask.causal(),
    "documents": mask.documents(IDS) & mask.causal(),
    "shuffled documents": mask.documents(IDS[:, torch.randperm(33)]),
    "packed": mask.packed(mask.causal() & mask.window(4) | mask.sinks(2), [0, 0, 5, 5, 20, 33]),
    "per head": mask.per_head([mask.documents(IDS), mask.window(3), mask.window(3), mask.causal()]),
    "per group": mask.blocks(masks.rising(5, (2, 5, 2)), 8) & mask.causal(),
    "per token": mask.blocks(masks.rising(9, (33, 3)), 4, rows=1),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("m", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("G", "K", "V"), [(4, 6, 6), (2, 6, 3), (1, 3, 6)])
def test_every_mask_matches_the_definition(m, G, K, V):
    check_against_reference(*inputs(G=G, K=K, V=V), m)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_expressions_match_the_definition(data):
    S = data.draw(st.integers(9, 30))
    m, _ = data.draw(masks.expressions(S))
    try:
        m.check(S - 9, S)
        T = S
    except ValueError:
        T = S
    check_against_reference(*inputs(B=1, T=T, S=S, H=2, G=1, K=3, V=3), m)


@pytest.mark.parametrize(
    ("T", "S", "offset"), [(12, 33, None), (33, 12, 0), (12, 33, 4), (9, 9, 3)]
)
def test_queries_may_stand_anywhere(T, S, offset):
    m = mask.causal() & (mask.window(6) | mask.sinks(2))
    check_against_reference(*inputs(T=T, S=S), m, offset=offset)
    check_against_reference(*inputs(T=T, S=S), mask.causal(), offset=offset)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("name", ["none", "causal", "window", "sinks", "strided", "documents"])
def test_decode(T, name):
    check_against_reference(*inputs(T=T, S=33), MASKS[name])


def test_no_keys_and_no_queries():
    q, k, v = inputs(T=12, S=0)
    for backend in ("torch", "reference", None):
        o, lse = attention(q, k, v, mask.causal(), return_lse=True, backend=backend)
        assert o.abs().max() == 0
        assert (lse == -torch.inf).all()
        assert attention(q, k, v).shape == (2, 12, 4, 5)
    q, k, v = inputs(T=0, S=5)
    assert attention(q, k, v, mask.causal(), return_lse=True)[1].shape == (2, 0, 4)


@pytest.mark.usefixtures("small_tiles")
def test_packed_is_looped():
    q, k, v = inputs(B=1, T=30)
    cu = torch.tensor([0, 0, 11, 12, 12, 30], dtype=torch.int32)
    for m in (None, mask.causal(), mask.causal() & (mask.window(3) | mask.sinks(1))):
        got = attention(q, k, v, m, cu_seqlens=cu, return_lse=True)
        for a, b in itertools.pairwise(cu.tolist()):
            alone = attention(
                q[:, a:b], k[:, a:b], v[:, a:b], m, return_lse=True, backend="reference"
            )
            torch.testing.assert_close(got[0][:, a:b], alone[0])
            torch.testing.assert_close(got[1][:, a:b], alone[1])
        check_against_reference(q, k, v, m, cu_seqlens=cu)


def test_merge_of_parts_is_the_whole():
    q, k, v = inputs()
    near, far = mask.causal() & mask.window(4), mask.causal() & ~mask.window(4)
    parts = [
        (k, v, near),
        (k, v, far & mask.sinks(2)),
        (k, v, far & ~mask.sinks(2)),
        (k, v, ~mask.full()),
    ]
    pieces = [attention(q, k, v, m, return_lse=True) for k, v, m in parts]
    got = merge(pieces)
    want = attention(q, k, v, mask.causal(), return_lse=True, backend="reference")
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, (q, k, v)), gradients(want, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    nothing = pieces[-1]
    o, lse = merge([nothing, nothing])
    assert o.abs().max() == 0
    assert (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="at least one part"):
        merge([])
    with pytest.raises(ValueError, match="of one shape"):
        merge([nothing, (o[:, :3], lse[:, :3])])


@pytest.mark.parametrize("m", [mask.causal(), mask.causal() & mask.window(2)])
def test_gradcheck(m):
    q, k, v = inputs(B=1, T=9, H=2, G=1, K=3, V=2)
    for backend in ("torch", "reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b=backend: attention(q, k, v, m, return_lse=True, backend=b), (q, k, v)
        )


def test_extreme_scores():
    q, k, v = (x.detach().float() for x in inputs())
    for scale in (300.0, -300.0):
        for m in (mask.causal(), mask.causal() & mask.window(5)):
            got = attention(q, k, v, m, scale=scale, return_lse=True)
            want = attention(
                q.double(), k.double(), v.double(), m,
                scale=scale, return_lse=True, backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("small_tiles")
def test_half_precision_strides_and_poisoned_memory():
    q, k, v = inputs(dtype=torch.float32, grad=False)
    m = mask.causal() & mask.window(6)
    want = attention(q, k, v, m, return_lse=True)
    with poisoned():
        got = attention(q, k, v, m, return_lse=True)
    torch.testing.assert_close(got, want)
    odd = [torch.stack([x, -x], -1)[..., 0] for x in (q, k, v)]
    torch.testing.assert_close(attention(*odd, m, return_lse=True), want)
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    o, lse = attention(*half, m, return_lse=True)
    assert o.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert (o.float() - want[0]).norm() < 0.02 * want[0].norm()
    full = [x.detach().float().requires_grad_() for x in half]
    exact = gradients(attention(*full, m, return_lse=True), full)
    for a, b in zip(gradients((o, lse), half), exact, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_who_runs():
    def runs(**shape):
        found = subquad.explain("attention", T=64, H=2, K=8, **shape)
        return next(v.backend for v in found if v.chosen)

    assert runs() == "sdpa"
    assert runs(mask=mask.causal()) == "sdpa"
    assert runs(mask=mask.causal(), lse=True) == "torch"
    assert runs(mask=mask.causal(), S=80) == "torch"
    assert runs(mask=mask.causal() & mask.window(3)) == "torch"
    q, k, v = inputs()
    for m in (None, mask.causal()):
        torch.testing.assert_close(attention(q, k, v, m), attention(q, k, v, m, backend="torch"))
    with subquad.ops.backend.backend("reference"):
        assert runs() == "reference"


class Compiled(torch.nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, q, k, v):
        m = self.kept or mask.causal() & (mask.window(5) | mask.strided(3))
        o, lse = attention(q * 1.0, k, v, m, return_lse=True)
        return o + attention(q, k, v, mask.causal()), lse + 1.0


@pytest.mark.parametrize(
    "kept",
    [
        None,
        ~mask.window(3),
        mask.documents(IDS[:, :14]) & mask.causal(),
        mask.per_head([mask.causal(), mask.window(2)]),
        mask.packed(mask.causal(), [0, 5, 14]),
        mask.placed(mask.causal(), torch.tensor([2, 0])),
        mask.blocks(torch.tensor([[0], [1]]), 8, 8) & mask.causal(),
        mask.spans(torch.tensor([[0], [5]]), torch.tensor([[-1], [1]]), 4, 8),
    ],
)
def test_compiles_to_one_graph(kept):
    """A mask may be made in the forward, or kept by the module where it holds data."""
    torch._dynamo.reset()  # each case compiles the same code
    module, tensors = Compiled(kept), inputs(T=14, K=4, V=4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = compiled(*tensors), module(*tensors)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_programs_find_their_masks_in_another_process(tmp_path):
    """And none where the mask held data: it is not in the file."""
    x = torch.randn(1, 14, 2, 4)

    class Own(torch.nn.Module):
        def __init__(self, kept):
            super().__init__()
            self.kept = kept

        def forward(self, x):
            return attention(x, x, x, self.kept, backend="torch")

    for name, kept in (
        ("made", mask.causal() & mask.window(5)),
        ("held", mask.documents(IDS[0, :14])),
    ):
        torch.export.save(torch.export.export(Own(kept), (x,)), tmp_path / f"{name}.pt2")
    torch.save((x, Own(mask.causal() & mask.window(5))(x)), tmp_path / "want.pt")
    code = f"""
        import torch
        from subquad import mask
        from subquad.ops.attention import attention, node

        x, want = torch.load("{tmp_path}/want.pt")
        other = mask.causal() & mask.window(1)
        torch.compile(lambda x: attention(x, x, x, other, backend="torch"), backend="eager")(x)
        got = torch.export.load("{tmp_path}/made.pt2").module()(x)
        torch.testing.assert_close(got, want)
        try:
            torch.export.load("{tmp_path}/held.pt2").module()(x)
        except RuntimeError as refused:
            assert "holds data" in str(refused)
        else:
            raise AssertionError
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_fakes_and_transforms():
    q, k, v = inputs(T=14, K=4, V=4)
    m = mask.causal() & (mask.window(3) | mask.sinks(2))

    def run(q, k, v):
        return attention(q, k, v, m, backend="torch")

    with FakeTensorMode() as fakes:
        seen = run(*map(fakes.from_tensor, (q, k, v)))
    assert seen.shape == run(q, k, v).shape
    many = [torch.stack([x, 2 * x]).detach() for x in (q, k, v)]
    want = torch.stack([run(*(x[i] for x in many)) for i in range(2)])
    torch.testing.assert_close(torch.vmap(run)(*many), want)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(run, (q, k, v), (q, k, v))
    with pytest.raises(NotImplementedError, match="forward mode"), forward_ad.dual_level():
        run(forward_ad.make_dual(q, q), k, v)


def test_a_copied_mask_compiles():
    torch._dynamo.reset()
    kept = copy.deepcopy(mask.documents(IDS[:, :14]) & mask.causal())
    tensors = inputs(T=14, K=4, V=4)
    compiled = torch.compile(Compiled(kept), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), Compiled(kept)(*tensors))
    again = pickle.loads(pickle.dumps(kept))
    assert again == kept
    assert again.spec() != kept.spec()


def test_the_operator_is_well_made():
    node = importlib.import_module("subquad.ops.attention.node")
    m = node._text((mask.causal() & mask.window(4)).spec())
    home = "subquad.ops.attention.torch"
    args = (*inputs(T=13), m, 0.5, 0, home)
    torch.library.opcheck(torch.ops.subquad.attention.default, args)


def test_memory_and_time_follow_the_area(monkeypatch):
    """A window over 65,536 tokens: no tensor comes near T x S, and time is linear in T."""
    m = mask.causal() & mask.window(63)
    largest = 0
    attend = subquad.ops.attention.torch._attend

    def watched(q, k, v, bias, scale):
        nonlocal largest
        largest = max(largest, 0 if bias is None else bias.numel())
        return attend(q, k, v, bias, scale)

    monkeypatch.setattr(subquad.ops.attention.torch, "_attend", watched)
    times = []
    for T in (8192, 32768):
        q, k, v = inputs(B=1, T=T, H=1, G=1, K=16, V=16, dtype=torch.float32)
        attention(q, k, v, m)
        start = time.process_time()
        attention(q, k, v, m).sum().backward()
        times.append(time.process_time() - start)
    assert largest <= 128 * 256
    assert times[1] < 8 * times[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 9, 4)}, r"q must be \[B,T,H,K\]"),
        ({"k": torch.zeros(2, 9, 2, 5)}, "k must have K=6 as q has"),
        ({"k": torch.zeros(2, 8, 2, 6)}, "v must have S=8 as k has"),
        ({"q": torch.zeros(2, 9, 3, 6)}, "heads of k must divide heads of q=3, got 2"),
        ({"q": torch.zeros(2, 9, 4, 6, dtype=torch.float64)}, "share one dtype"),
        ({"mask": torch.ones(9, 9)}, "mask must be a Mask or None, got Tensor"),
        ({"mask": mask.documents(torch.zeros(2, 8, dtype=torch.int))}, "length 9, got 8"),
        ({"mask": mask.documents(torch.zeros(3, 9, dtype=torch.int))}, "3 rows and 1 heads"),
        ({"mask": mask.per_head([mask.causal()] * 3)}, "1 rows and 3 heads, q has B=2, H=4"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "batch of 1"),
        ({"backend": "nothing"}, "backend of attention must be one of"),
    ],
)
def test_bad_input(change, words):
    given = dict(zip("qkv", inputs(T=9, V=6, dtype=torch.float32, grad=False), strict=True))
    with pytest.raises(ValueError, match=words):
        attention(**{**given, **change})


def test_bad_packing():
    q, k, v = inputs(B=1, T=9, grad=False)
    for cu, words in (([0, 5, 3, 9], "without falling"), ([0, 5], "rise from 0 to T=9")):
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, mask.causal(), cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="no offset"):
        attention(q, k, v, mask.causal(), cu_seqlens=cu, offset=1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them on the GPU")
def test_kernels_in_the_interpreter():
    in_the_interpreter(Path(__file__).parent / "gpu" / "test_attention.py")


def test_a_full_mask_hides_nothing():
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    close(attention(q, k, v, mask.full()), attention(q, k, v, backend="reference"))
