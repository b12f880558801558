"""The probe: what the papers say of Parallax and local linear attention, and the operation."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import subquad
from kit import close, in_the_interpreter
from subquad.bench.probe import Case, errors
from subquad.ops import backend
from subquad.ops.attention import attention
from subquad.ops.backend import interpreted
from subquad.ops.probe import chunk, local_linear, node, probe, solve
from subquad.ops.probe.spans import queries_of, spans
from subquad.recipes.swap import swap

F64 = torch.float64
FORMS = ("torch", "reference")


def draw(B=2, T=19, S=None, H=4, G=2, K=6, V=5, dtype=F64):
    """q, k, v, r."""
    S = T if S is None else S
    sizes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, K)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def repeated(x, heads):
    """``[B,S,G,D]`` as ``[B,H,S,D]``."""
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def softmax(q, k, scale):
    """Causal, ``[B,H,T,S]``."""
    scores = scale * q.transpose(1, 2) @ repeated(k, q.shape[2]).mT
    T, S = scores.shape[-2:]
    return scores.masked_fill(~torch.ones(T, S).tril(S - T).bool(), -torch.inf).softmax(-1)


OPTIONS = {
    "causal": ({}, {}),
    "window": ({"window": 7}, {}),
    "all": ({"causal": False}, {}),
    "padded": ({"starts": torch.tensor([0, 6])}, {}),
    "offset": ({}, {"T": 11, "S": 40}),
    "one query": ({"window": 7}, {"T": 1, "S": 30}),
    "packed": ({"cu_seqlens": torch.tensor([0, 7, 7, 8, 19])}, {"B": 1}),
    "packed all": ({"cu_seqlens": torch.tensor([0, 7, 7, 8, 19]), "causal": False}, {"B": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_are_the_definition(name):
    """Forward and gradients, in blocks of 5 queries; local linear attention with them."""
    options, sizes = OPTIONS[name]
    inputs = [t.requires_grad_() for t in draw(**sizes)]
    ridge = torch.rand(4, dtype=F64).add(1).requires_grad_()
    for op, given in (
        (lambda b: probe(*inputs, **options, backend=b), inputs),
        (
            lambda b: local_linear(*inputs[:3], ridge=ridge, steps=12, **options, backend=b),
            [*inputs[:3], ridge],
        ),
    ):
        with mock.patch.object(chunk, "QUERIES", 5):
            got = op("torch")
            do = torch.randn_like(got)
            grads = torch.autograd.grad(got, given, do)
        want = op("reference")
        close(got, want, 1e-7)
        for a, b in zip(grads, torch.autograd.grad(want, given, do), strict=True):
            close(a, b, 1e-6)


def test_gradients_are_finite_differences():
    inputs = [t.requires_grad_() for t in draw(B=1, T=5, H=2, G=1, K=3, V=2)]
    assert torch.autograd.gradcheck(lambda *x: probe(*x, window=3, backend="torch"), inputs)
    ridge = torch.tensor([0.7, 2.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, ridge: local_linear(q, k, v, ridge=ridge, steps=6, backend="torch"),
        (*inputs[:3], ridge),
    )


def test_scores_never_fill_the_square():
    seen = []
    inner = chunk._scores

    def watched(*args):
        out = inner(*args)
        seen.append(out[0].numel())
        return out

    q, k, v, r = (t.requires_grad_() for t in draw(B=1, T=1500, H=2, G=1, dtype=torch.float32))
    with mock.patch.object(chunk, "_scores", watched), mock.patch.object(chunk, "SCORES", 1 << 16):
        probe(q, k, v, r, backend="torch").sum().backward()
    assert max(seen) <= 1 << 16 < 2 * 1500 * 1500
    # A window's blocks meet the window's keys only.
    seen.clear()
    with mock.patch.object(chunk, "_scores", watched), torch.no_grad():
        probe(q, k, v, r, window=100, backend="torch")
    assert max(seen) <= 2 * 128 * (128 + 100)


def test_runs_of_queries():
    """For every block of keys the queries that see one of them, and no fewer."""
    for options in ({"window": 5}, {}, {"cu_seqlens": torch.tensor([0, 9, 9, 30])}):
        given = {"causal": True, "window": None, "starts": None, "cu_seqlens": None, **options}
        lo, hi = spans(30, 30, offset=0, device=torch.device("cpu"), **given)
        first, last = queries_of(lo, hi, 30, 8)
        for block in range(4):
            see = [i for i in range(30) if max(lo[0, i], 8 * block) < min(hi[0, i], 8 * block + 8)]
            assert (first[0, block], last[0, block]) == (see[0], see[-1] + 1)


# Parallax


def test_without_a_probe_it_is_softmax_to_the_bit():
    q, k, v, r = draw(dtype=torch.float32)
    zero = torch.zeros_like(r)
    dense = attention(q, k, v, subquad.mask.causal(), backend="reference")
    assert torch.equal(probe(q, k, v, zero, backend="reference"), dense)
    lo, hi = spans(
        19, 19, causal=True, window=None, offset=0, starts=None, cu_seqlens=None, device=q.device
    )
    home = "subquad.ops.probe.chunk"
    o, mean, *_ = node.run(q, k, v, zero, lo, hi, 6**-0.5, True, False, home)
    assert torch.equal(o, mean)
    close(o, dense, 1e-6)


@pytest.mark.parametrize("form", FORMS)
class TestParallaxFacts:
    def test_is_the_mean_less_covariance_times_r(self, form):
        q, k, v, r = draw()
        p, keys, values = softmax(q, k, 6**-0.5), repeated(k, 4), repeated(v, 4)
        kbar, vbar = p @ keys, p @ values
        second = torch.einsum("bhij,bhjv,bhjk->bhivk", p, values, keys)
        cov = second - vbar[..., :, None] * kbar[..., None, :]
        want = vbar - torch.einsum("bhivk,bihk->bhiv", cov, r)
        close(probe(q, k, v, r, backend=form), want.transpose(1, 2), 1e-9)

    def test_moves_with_the_values_and_not_with_the_keys(self, form):
        q, k, v, r = draw()
        o = probe(q, k, v, r, backend=form)
        close(probe(q, k, v + 3.0, r, backend=form), o + 3.0)
        close(probe(q, k + torch.randn(6, dtype=F64), v, r, backend=form), o)

    def test_is_linear_in_r(self, form):
        q, k, v, r = draw()
        zero, other = torch.zeros_like(r), torch.randn_like(r)
        base = probe(q, k, v, zero, backend=form)
        parts = sum(probe(q, k, v, x, backend=form) - base for x in (r, other))
        close(probe(q, k, v, r + other, backend=form) - base, parts)

    def test_one_visible_key_gives_its_value(self, form):
        q, k, v, r = draw(T=9)
        want = v.repeat_interleave(2, 2)
        close(probe(q, k, v, 100 * r, window=1, backend=form), want)

    def test_a_window_as_wide_as_the_text_and_repeated_heads(self, form):
        q, k, v, r = draw()
        o = probe(q, k, v, r, backend=form)
        close(probe(q, k, v, r, window=19, backend=form), o)
        wide = (x.repeat_interleave(2, 2) for x in (k, v))
        close(probe(q, *wide, r, backend=form), o)

    def test_no_key_gives_zero(self, form):
        inputs = [t.requires_grad_() for t in draw()]
        o = probe(*inputs, starts=torch.tensor([19, 0]), backend=form)
        assert not o[0].any()
        for g in torch.autograd.grad(o.square().sum(), inputs):
            assert g.isfinite().all()


def test_a_softmax_model_becomes_parallax():
    """Its weights load, the probe starts at zero and learns."""
    from subquad.models import CausalLM, CausalLMConfig

    options = {"heads": 2, "qk_norm": True, "bias": True}
    config = CausalLMConfig(
        vocab_size=11, dim=16, depth=2, layers="softmax", mixers={"softmax": options}
    )
    old = CausalLM(config).double()
    new = swap(old, "softmax", "parallax")
    ids = torch.randint(11, (2, 9))
    close(new(ids).logits, old(ids).logits)
    new(ids).logits.square().sum().backward()
    assert all(block.mixer.r_proj.weight.grad.abs().max() > 0 for block in new.blocks)
    zero = subquad.create_mixer("parallax", dim=16, heads=2, probe="zero")
    assert not zero.r_proj.weight.any()


def test_parallax_sees_relative_positions():
    """r is rotated as q is."""
    mixer = subquad.create_mixer("parallax", dim=16, heads=2).double()
    x = torch.randn(1, 12, 16, dtype=F64)
    close(mixer(x, positions=torch.arange(500, 512)[None])[0], mixer(x)[0], 1e-7)


@pytest.mark.parametrize("key", ["parallax", "lla"])
def test_weights_are_what_the_values_count(key):
    mixer = subquad.create_mixer(key, dim=16, heads=4, kv_heads=2, window=6).double()
    x = torch.randn(2, 11, 16, dtype=F64)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :3] = True
    context = mixer._context(x, None, padding, None, None, None)
    weights, (o, _) = mixer.weights(x, context), mixer.heads_out(x, context)
    close(weights.sum(-1)[1], torch.ones(4, 11, dtype=F64))
    assert not weights[0, :, :, :3].any()
    assert weights.min() < 0
    close((weights @ repeated(mixer.qkv(x, context)[2], 4)).transpose(1, 2), o)


# Local linear attention


def test_the_probe_that_makes_it_local_linear():
    """``r_i = (w C + ridge I)^-1 w (kbar - q)`` by hand, with weights whose largest is 1."""
    q, k, v, _ = draw(H=2)
    p, keys = softmax(q, k, 6**-0.5), repeated(k, 2)
    kbar, own = p @ keys, q.transpose(1, 2)
    cov = torch.einsum("bhij,bhjk,bhjl->bhikl", p, keys, keys)
    cov = cov - kbar[..., :, None] * kbar[..., None, :]
    w = 1 / p.amax(-1)[..., None]
    A = w[..., None] * cov + 0.3 * torch.eye(6, dtype=F64)
    r = torch.linalg.solve(A, w * (kbar - own)).transpose(1, 2)
    want = local_linear(q, k, v, ridge=0.3, backend="reference")
    for form in FORMS:
        close(probe(q, k, v, r, backend=form), want, 1e-9)
    close(local_linear(q, k, v, ridge=0.3, steps=12, backend="torch"), want, 1e-6)


def test_is_the_weighted_least_squares():
    """Closed form = a solver given the rows of the problem, its intercept not penalised."""
    q, k, v, _ = draw(B=1, T=14, H=1, G=1, K=4, V=3)
    got = local_linear(q, k, v, ridge=0.2, backend="reference")[0, :, 0]
    for i in range(14):
        w = (softmax(q, k, 0.5)[0, 0, i, : i + 1]).sqrt()
        w = w / w.max()
        rows = torch.cat([torch.ones(i + 1, 1, dtype=F64), k[0, : i + 1, 0] - q[0, i, 0]], 1)
        penalty = torch.cat([torch.zeros(4, 1, dtype=F64), 0.2**0.5 * torch.eye(4).double()], 1)
        A = torch.cat([w[:, None] * rows, penalty])
        b = torch.cat([w[:, None] * v[0, : i + 1, 0], torch.zeros(4, 3, dtype=F64)])
        close(got[i], torch.linalg.lstsq(A, b, driver="gelsd").solution[0], 1e-10)


def test_a_large_ridge_is_softmax_attention():
    q, k, v, _ = draw()
    dense = attention(q, k, v, subquad.mask.causal())
    for form in FORMS:
        close(local_linear(q, k, v, ridge=1e9, backend=form), dense, 1e-7)


def test_recovers_an_affine_map():
    """Where softmax attention is off by much."""
    q, k, _, _ = draw(B=1, T=60, H=1, G=1, K=4)
    W, b = torch.randn(4, 3, dtype=F64), torch.randn(3, dtype=F64)
    v, want = k @ W + b, q @ W + b
    got = local_linear(q, k, v, ridge=1e-9, steps=60)
    assert (got - want)[:, 20:].abs().max() < 1e-5
    assert (attention(q, k, v, subquad.mask.causal()) - want)[:, 20:].abs().max() > 0.5


def test_moves_with_the_values():
    q, k, v, _ = draw()
    close(local_linear(q, k, v + 2.0, steps=12), local_linear(q, k, v, steps=12) + 2.0, 1e-7)


def test_without_a_kernel_it_is_ridge_regression_of_the_prefix():
    q, k, v, _ = draw(B=1, T=12, H=1, G=1, K=3, V=2)
    got = local_linear(q, k, v, ridge=0.5, scale=0.0, steps=9)[0, :, 0]
    for i in (3, 11):
        x, y = k[0, : i + 1, 0], v[0, : i + 1, 0]
        gram = (x - x.mean(0)).mT @ (x - x.mean(0)) + 0.5 * torch.eye(3, dtype=F64)
        slope = torch.linalg.solve(gram, (x - x.mean(0)).mT @ (y - y.mean(0)))
        close(got[i], y.mean(0) + (q[0, i, 0] - x.mean(0)) @ slope, 1e-7)


def test_first_token_is_its_value():
    q, k, v, _ = draw()
    close(local_linear(q, k, v)[:, 0], v[:, 0].repeat_interleave(2, 1))


def test_products_without_a_matrix():
    """A pass of the probe is a product with every query's covariance; K steps solve."""
    q, k, _, _ = draw(H=2)
    lo, hi = spans(
        19, 19, causal=True, window=None, offset=0, starts=None, cu_seqlens=None, device=q.device
    )
    setting = solve.Setting(lo, hi, 6**-0.5, 6, "subquad.ops.probe.chunk")
    p, keys = softmax(q, k, 6**-0.5), repeated(k, 2)
    kbar = p @ keys
    cov = torch.einsum("bhij,bhjk,bhjl->bhikl", p, keys, keys)
    cov = (cov - kbar[..., :, None] * kbar[..., None, :]).transpose(1, 2)
    x = torch.randn_like(q)
    mean = kbar.transpose(1, 2)
    want = torch.einsum("bihkl,bihl->bihk", cov, x)
    close(mean - setting.probe(q, k, x)[0], want, 1e-12)
    A = cov + 0.5 * torch.eye(6, dtype=F64)

    def apply(x):
        return torch.einsum("bihkl,bihl->bihk", A, x)

    close(solve.conjugate_gradients(apply, x, 6), torch.linalg.solve(A, x), 1e-7)


def test_follows_a_regression_that_changes():
    """Every 128 tokens another slope and another part of the sphere: less error than softmax, and
    than one global ridge regression once they have changed."""
    K = 8
    centre = F.normalize(torch.randn(4, 4, 1, K, dtype=F64), dim=-1)
    x = F.normalize(centre + 0.25 * torch.randn(4, 4, 128, K, dtype=F64), dim=-1)
    y = (x @ torch.randn(4, 4, K, K, dtype=F64)).flatten(1, 2)
    x = x.flatten(1, 2)
    # A token sees the pairs before it.
    q, k, v = (t[:, :, None] for t in (x[:, 1:], x[:, :-1], y[:, :-1]))

    def error(o):
        return (o - y[:, 1:, None]).square()[:, 128:].mean()

    local = error(local_linear(q, k, v, ridge=0.1, scale=8.0))
    flat = error(local_linear(q, k, v, ridge=0.1, scale=0.0))
    constant = error(attention(q, k, v, subquad.mask.causal(), scale=8.0))
    assert local < 0.7 * constant
    assert local < 0.7 * flat


# The operation


def test_bad_inputs_are_named():
    q, k, v, r = draw()
    for message, call in {
        r"r must have H=4": lambda: probe(q, k, v, r[:, :, :2]),
        "must share one dtype": lambda: probe(q, k, v, r.float()),
        "heads of k must divide heads of q=4, got 3": lambda: probe(
            q, k[:, :, [0, 1, 1]], v[:, :, [0, 1, 1]], r
        ),
        "window must be a positive int, got 0": lambda: probe(q, k, v, r, window=0),
        "window needs causal=True": lambda: probe(q, k, v, r, window=3, causal=False),
        r"starts must have shape \[2\]": lambda: probe(q, k, v, r, starts=torch.zeros(3)),
        "packed sequences need a batch of 1": lambda: probe(
            q, k, v, r, cu_seqlens=torch.tensor([0, 19])
        ),
        "cu_seqlens needs S=T": lambda: probe(
            q[:1, :4], k[:1], v[:1], r[:1, :4], cu_seqlens=torch.tensor([0, 4])
        ),
        "k must hold a token": lambda: probe(q, k[:, :0], v[:, :0], r),
        "backend of probe must be one of": lambda: probe(q, k, v, r, backend="cuda"),
        "ridge must be positive": lambda: local_linear(q, k, v, ridge=0.0),
        "steps must be a positive int": lambda: local_linear(q, k, v, steps=0),
        "probe must be one of": lambda: subquad.create_mixer("parallax", dim=16, probe="none"),
        "sinks is not an option": lambda: subquad.create_mixer("lla", dim=16, sinks=2, window=3),
        "ridge must be finite": lambda: subquad.create_mixer("lla", dim=16, ridge=-1.0),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_explained():
    answers = {v.backend: v for v in backend.explain("probe", T=4096, H=8, K=64)}
    assert answers["torch"].chosen
    assert interpreted() or answers["triton"].reason.startswith("runs on cuda")
    answers = {v.backend: v for v in backend.explain("probe", T=64, H=8, K=256, device="cuda")}
    assert "head dims up to 128" in answers["triton"].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_accumulates_wide(dtype):
    case = Case(B=1, T=70, H=2, K=16, V=16, dtype=dtype)
    assert max(errors(case, "cpu", "torch").values()) < case.limit


def test_kernels_in_the_interpreter():
    in_the_interpreter(Path(__file__).parent / "gpu" / "test_probe.py")


def test_small_gradients_of_the_fit_are_solved_as_well_as_large_ones():
    """A loss that is a mean over many tokens has gradients far below the keys' size."""
    torch.manual_seed(0)
    x = [torch.randn(1, 24, 2, 16) for _ in "qkv"]
    do = torch.randn(1, 24, 2, 16)

    def grads(dtype, size, **how):
        given = [t.to(dtype).requires_grad_() for t in x]
        o = local_linear(*given, **how)
        return [g / size for g in torch.autograd.grad(o, given, (size * do).to(dtype))]

    want = grads(torch.float64, 1.0, backend="reference")
    for size in (1.0, 1e-4, 1e-8):
        for got, exact in zip(grads(torch.float32, size, steps=32), want, strict=True):
            assert (got - exact).norm() < 1e-4 * exact.norm()
