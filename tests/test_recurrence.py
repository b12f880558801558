"""The recurrence: every form against its definition, forward and backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import close, poisoned
from subquad.ops.recurrence import cost, linear_attention, plan, recurrence
from subquad.ops.recurrence.torch import chunked

DECAYS = ("none", "constant", "head", "channel")
KINDS = list(itertools.product(DECAYS, (False, True)))
CU = torch.tensor([0, 37, 37, 38, 70], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    """Several slabs also at these sizes."""
    monkeypatch.setattr(plan, "SLAB", 2**10)


def make(decay="head", delta=True, *, B=2, T=70, H=2, K=8, V=6, N=None, dtype=torch.float64):
    """Random inputs of the recurrence; the first state where N, the sequences, is given."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    gates = {
        "none": None,
        "constant": -random(H).abs(),
        "head": -random(B, T, H).abs(),
        "channel": -random(B, T, H, K).abs(),
    }[decay]
    inputs = {
        "q": random(B, T, H, K),
        "k": F.normalize(random(B, T, H, K), dim=-1),
        "v": random(B, T, H, V),
        "decay": gates,
        "beta": 2 * torch.rand(B, T, H, dtype=torch.float64) if delta else None,
        "state": None if N is None else random(N, H, K, V),
    }
    return {n: t.to(dtype) for n, t in inputs.items() if t is not None}


def run(inputs, op=recurrence, **options):
    """The outputs, and the gradients of a random weighing of both."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    o, last = op(**leaves, **options)
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in (o, last))
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"o": o, "last": last} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def same(got, want, tolerance=1e-9):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name],
            want[name],
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_forms_agree(decay, delta, state, packed):
    B, cu = (1, CU) if packed else (2, None)
    inputs = make(decay, delta, B=B, N=(4 if packed else 2) if state else None)
    want = run(inputs, form="recurrent", cu_seqlens=cu, backend="reference")
    same(run(inputs, form="parallel", cu_seqlens=cu), want)
    same(run(inputs, form="chunk", cu_seqlens=cu), want)
    same(run(inputs, cu_seqlens=cu), want)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129])
def test_lengths_around_the_chunk(T):
    for decay, K in (("head", 8), ("channel", 8), ("head", 72)):
        inputs = make(decay, True, B=1, T=T, K=K, N=1)
        same(run(inputs, form="chunk"), run(inputs, form="recurrent"))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    heads=st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    packed=st.booleans(),
)
def test_any_shape(kind, B, lengths, heads, K, V, packed):
    T = sum(lengths) if packed else lengths[0]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if packed else None
    B, H = 1 if packed else B, max(heads)
    inputs = make(*kind, B=B, T=T, H=H, K=K, V=V, N=len(lengths) if packed else B)
    for name, count in zip("qkv", heads, strict=True):
        inputs[name] = inputs[name][:, :, :count]
    same(run(inputs, form="chunk", cu_seqlens=cu), run(inputs, form="recurrent", cu_seqlens=cu))


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_gradients_are_those_of_finite_differences(decay, delta):
    inputs = make(decay, delta, B=1, T=19, H=1, K=3, V=2, N=1)
    inputs["q"] = torch.cat([inputs["q"], -inputs["q"]], 2)  # grouped
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    if "state" in inputs:
        inputs["state"] = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        return recurrence(**dict(zip(inputs, tensors, strict=True)), form="chunk")

    # Nothing may push a positive gate through the check: finite differences stay below zero.
    if "decay" in inputs:
        inputs["decay"] = (inputs["decay"].detach() - 0.01).requires_grad_()
    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=True)


def test_second_derivatives():
    inputs = {n: t.requires_grad_() for n, t in make("channel", B=1, T=4, H=1, K=2, V=2).items()}

    def call(form):
        return lambda *t: recurrence(**dict(zip(inputs, t, strict=True)), form=form)[0]

    for form in ("parallel", "recurrent"):
        assert torch.autograd.gradgradcheck(call(form), tuple(inputs.values()), fast_mode=True)
    o = call("chunk")(*inputs.values())
    (g,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        g.sum().backward()


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strength", [-9.0, -50.0, -float("inf")])
def test_strong_decay(decay, strength):
    """Gates that forget everything, alone and among gates that keep all, in float32."""
    exact = make(decay, N=2)
    exact["decay"].fill_(strength)
    exact["decay"][:, ::3] = -1e-3
    want = run(exact, form="recurrent")
    got = run({n: t.float() for n, t in exact.items()}, form="chunk")
    assert all(t.isfinite().all() for t in got.values())
    same({n: t.double() for n, t in got.items()}, want, 2e-5)
    exact["decay"].fill_(-50.0)
    exact.pop("state")
    o, _ = recurrence(**exact)
    read = (exact["q"] * exact["k"]).sum(-1, keepdim=True) * exact["beta"][..., None]
    close(o, 8**-0.5 * read * exact["v"])


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_one_token(decay, delta):
    """The single step = the chunked form of one token, with and without a past."""
    for N in (None, 2):
        inputs = make(decay, delta, T=1, N=N)
        same(run(inputs), run(inputs, form="chunk"))
    whole = make(decay, delta, T=5)
    o, state = recurrence(**whole)
    past = None
    for t in range(5):
        now = {n: x if x.dim() == 1 else x[:, t : t + 1] for n, x in whole.items()}
        y, past = recurrence(**now, state=past)
        close(y, o[:, t : t + 1])
    close(past, state)


def test_grouped_heads_share_by_count():
    inputs = make("head", H=4, N=2)
    few = inputs | {"q": inputs["q"][:, :, :2], "k": inputs["k"][:, :, :1]}
    many = inputs | {
        "q": few["q"].repeat_interleave(2, 2),
        "k": few["k"].repeat_interleave(4, 2),
    }
    o, last = recurrence(**few)
    want, want_last = recurrence(**many)
    close(o, want)
    close(last, want_last)


def test_many_short_sequences():
    """Chunks of all sequences are worked together: few steps, not one a sequence."""
    lengths = [1, 3, 0, 7, 2] * 20
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = make("head", B=1, T=int(cu[-1]), N=100)
    same(run(inputs, cu_seqlens=cu), run(inputs, form="recurrent", cu_seqlens=cu))
    assert len(plan.Plan(1, int(cu[-1]), 2, 8, cu, "cpu").counts) == 1


def test_any_strides():
    """Inputs, state and gradients need not be contiguous, and are not overwritten."""
    for H, packed in ((1, False), (2, False), (2, True)):
        inputs = make("channel", B=1, H=H, N=4 if packed else 1)
        strided = {n: t.mT.contiguous().mT for n, t in inputs.items()}
        before = {n: t.clone() for n, t in strided.items()}
        o, last = recurrence(
            **{n: t.requires_grad_() for n, t in strided.items()}, cu_seqlens=CU if packed else None
        )
        torch.autograd.grad((o.mT @ o).sum() + (last.mT @ last).sum(), list(strided.values()))
        close(strided, before)
        want, want_last = recurrence(**inputs, cu_seqlens=CU if packed else None)
        close(o, want)
        close(last, want_last)


def test_nothing_to_read():
    inputs = make(T=0, N=2)
    o, last = recurrence(**inputs)
    assert o.shape == (2, 0, 2, 6)
    close(last, inputs["state"])
    cu = torch.tensor([0, 0, 0], dtype=torch.int32)
    inputs = make(B=1, T=0, N=2)
    got = run(inputs, cu_seqlens=cu)
    close(got["last"], inputs["state"])


def test_future_does_not_matter():
    inputs = make("channel")
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    o, _ = recurrence(**inputs)
    for g in torch.autograd.grad(o[:, 40].sum(), list(inputs.values())):
        assert g[:, 41:].abs().max() == 0


def test_saved_memory_is_linear():
    """Training keeps the inputs and one state a chunk; nothing quadratic, nothing else."""

    def saved(T):
        held = {}

        def pack(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        inputs = {n: t.requires_grad_() for n, t in make(B=1, T=T, dtype=torch.float32).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            recurrence(**inputs)
        given = sum(t.untyped_storage().nbytes() for t in inputs.values())
        return sum(held.values()), given + cost.saved_bytes(B=1, T=T, H=2, K=8, V=6)

    for T in (256, 1024):
        held, allowed = saved(T)
        assert held <= allowed
    with torch.no_grad():
        assert chunked(*make().values(), 1.0, None, None, False)[2].numel() == 0


def test_half_precision_accumulates_in_float32():
    exact = make("head", T=200, N=2, dtype=torch.float32)
    half = {n: t.bfloat16() if n in "qkv" else t for n, t in exact.items()}
    rounded = {n: t.float() for n, t in half.items()}
    o, last = recurrence(**half)
    want, want_last = recurrence(**rounded)
    assert o.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    torch.testing.assert_close(o, want.bfloat16())
    torch.testing.assert_close(last, want_last)
    assert run(half)["dq"].dtype == torch.bfloat16


@pytest.mark.parametrize("packed", [False, True])
def test_no_memory_is_read_that_nobody_wrote(packed):
    cu = CU if packed else None
    for decay, delta in KINDS:
        inputs = make(decay, delta, B=1)
        clean = run(inputs, cu_seqlens=cu)
        with poisoned():
            same(run(inputs, cu_seqlens=cu), clean)


@pytest.mark.parametrize("packed", [False, True])
def test_custom_op(packed):
    for decay, delta in (("channel", True), ("none", False)):
        x = make(decay, delta, B=1, H=1, T=20, K=4, V=4, N=4 if packed else 1)
        x = {n: t.requires_grad_() for n, t in x.items()}
        cu = torch.tensor([0, 9, 9, 10, 20], dtype=torch.int32) if packed else None
        inputs = (x["q"], x["k"], x["v"], x.get("decay"), x.get("beta"), 0.5, x["state"], cu, True)
        torch.library.opcheck(chunked.overload, inputs)


def test_compiles_to_one_graph():
    compiled = torch.compile(recurrence, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (70, 90, 1):
        inputs = make("head", B=1, T=T, N=1)
        same(run(inputs, op=compiled), run(inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 70, 2)}, "q must be"),
        ({"k": torch.zeros(2, 70, 2, 9)}, "k must have K=8"),
        ({"v": torch.zeros(2, 69, 2, 6)}, "v must have T=70"),
        ({"v": torch.zeros(2, 70, 3, 6)}, "must divide the largest head count 3"),
        ({"v": torch.zeros(2, 70, 2, 6, dtype=torch.float64)}, "must share one dtype"),
        ({"q": torch.zeros(2, 70, 2, 8, dtype=torch.int64)}, "must share one dtype"),
        ({"decay": torch.zeros(2, 70)}, "decay must be"),
        ({"decay": torch.full((2, 70, 2), float("nan"))}, "got NaN"),
        ({"decay": torch.full((2, 70, 2), 0.5)}, "a maximum of 0.5"),
        ({"beta": torch.zeros(2, 70)}, "beta must be"),
        ({"beta": torch.zeros(2, 70, 3)}, "must divide the largest head count 3"),
        ({"state": torch.zeros(2, 2, 8, 7)}, "state must have shape"),
        ({"form": "chunked"}, "did you mean 'chunk'"),
        ({"backend": "cuda"}, "backend of recurrence must be one of"),
        ({"cu_seqlens": torch.tensor([0, 70], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        recurrence(**{**make(dtype=torch.float32), **change})


@pytest.mark.parametrize("bounds", [[0, 40, 30, 70], [1, 70], [0, 69]])
def test_bad_boundaries(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=70"):
        recurrence(**make(B=1), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        recurrence(**make(B=1), cu_seqlens=torch.tensor(bounds, dtype=torch.float32))


GOLDEN = {
    "gla": {"decay": "gk", "state": "initial_state"},
    "deltanet": {"beta": "beta", "state": "initial_state"},
}


@pytest.mark.parametrize("form", ["chunk", "recurrent", "parallel"])
@pytest.mark.parametrize("key", GOLDEN)
def test_golden(key, form, shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / f"{key}.safetensors")
    names = {"q": "q", "k": "k", "v": "v"} | GOLDEN[key]
    inputs = {n: golden[f"op.{g}"].requires_grad_() for n, g in names.items()}
    o, last = recurrence(**inputs, form=form)
    close(o, golden["op.out"], 1e-5)
    close(last, golden["op.final_state"], 1e-5)
    gradients = torch.autograd.grad(o.square().mean(), list(inputs.values()))
    for g, name in zip(gradients, names.values(), strict=True):
        close(g, golden[f"op.g.{name}"], 1e-6)


class TestLinearAttention:
    def inputs(self, B=2, T=21, dtype=torch.float64):
        q, k, v = (torch.randn(B, T, 2, d, dtype=dtype) for d in (5, 5, 4))
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v}

    def test_definition(self):
        x = self.inputs()
        scores = torch.einsum("bihk,bjhk->bhij", x["q"], x["k"])
        for causal in (True, False):
            A = scores.tril() if causal else scores
            want = torch.einsum("bhij,bjhv->bihv", A / (A.sum(-1, keepdim=True) + 1e-6), x["v"])
            for form in ("chunk", "recurrent", "parallel"):
                o, (S, z) = linear_attention(**x, causal=causal, form=form)
                close(o, want)
                close(S, torch.einsum("bthk,bthv->bhkv", x["k"], x["v"]))
                close(z, x["k"].sum(1))

    @pytest.mark.parametrize("causal", [True, False])
    def test_packed_is_looped(self, causal):
        x = self.inputs(B=1)
        cu = torch.tensor([0, 9, 9, 10, 21], dtype=torch.int32)
        past = (torch.rand(4, 2, 5, 4).double(), torch.rand(4, 2, 5).double())
        o, (S, z) = linear_attention(**x, causal=causal, cu_seqlens=cu, state=past)
        bounds = cu.tolist()
        for n, (a, b) in enumerate(itertools.pairwise(bounds)):
            alone, (s, y) = linear_attention(
                **{i: t[:, a:b] for i, t in x.items()},
                causal=causal,
                state=(past[0][n : n + 1], past[1][n : n + 1]),
            )
            close(o[:, a:b], alone)
            close(S[n : n + 1], s)
            close(z[n : n + 1], y)

    def test_decode(self):
        x = self.inputs()
        whole, (S, z) = linear_attention(**x)
        state = None
        for t in range(21):
            o, state = linear_attention(**{n: y[:, t : t + 1] for n, y in x.items()}, state=state)
            close(o, whole[:, t : t + 1])
        close(state[0], S)
        close(state[1], z)
        close(linear_attention(**{n: y[:, :1] for n, y in x.items()}, eps=0.0)[0], x["v"][:, :1])

    @pytest.mark.parametrize("causal", [True, False])
    def test_gradients(self, causal):
        x = {n: t.requires_grad_() for n, t in self.inputs(B=1, T=7).items()}
        state = (torch.rand(1, 2, 5, 4).double(), torch.rand(1, 2, 5).double())
        leaves = (*x.values(), *(t.requires_grad_() for t in state))

        def call(q, k, v, S, z):
            o, (S, z) = linear_attention(q, k, v, causal=causal, state=(S, z))
            return o, S, z

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)

    def test_key_sum_stays_in_float32(self):
        x = {n: t.bfloat16() for n, t in self.inputs(T=300, dtype=torch.float32).items()}
        o, (S, z) = linear_attention(**x)
        assert o.dtype == torch.bfloat16
        assert S.dtype == z.dtype == torch.float32
        torch.testing.assert_close(z, x["k"].float().sum(1))
        ones, _ = linear_attention(x["q"], x["k"], torch.ones_like(x["v"]))
        torch.testing.assert_close(ones, torch.ones_like(ones))

    def test_bad_input(self):
        x = self.inputs()
        with pytest.raises(ValueError, match=r"state\[1\] must have shape"):
            linear_attention(**x, state=(torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 4)))
        with pytest.raises(ValueError, match="v must have T=21"):
            linear_attention(x["q"], x["k"], x["v"][:, 1:])

    def test_golden(self, shared):
        from safetensors.torch import load_file

        golden = load_file(shared / "golden" / "linear_attention.safetensors")
        q, k, v = (golden[f"op.{n}"].requires_grad_() for n in "qkv")
        o, (S, z) = linear_attention(q, k, v, scale=q.shape[-1] ** -0.5, eps=1e-10)
        close(o, golden["op.out"], 1e-5)
        close(S, golden["op.final_state"], 1e-5)
        close(z[:, None], golden["op.final_z"], 1e-5)
        gradients = torch.autograd.grad(o.square().mean(), (q, k, v))
        for g, name in zip(gradients, "qkv", strict=True):
            close(g, golden[f"op.g.{name}"], 1e-6)
        o, S = recurrence(*(golden[f"unnorm.{n}"] for n in "qkv"))
        close(o, golden["unnorm.out"], 1e-5)
        close(S, golden["unnorm.final_state"], 1e-5)
