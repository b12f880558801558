"""What the papers say of InLine, MALA, RALA and SOFT, and the operations under them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import subquad
from kit import close
from subquad.mixers.parts.grid import positive, rotate_image
from subquad.mixers.rala import weights_of_keys
from subquad.ops.kernel_attention import bidirectional, landmark_attention
from subquad.ops.kernel_attention.bidirectional import NORMALIZERS
from subquad.ops.kernel_attention.explicit import bidirectional_weights, landmark_weights
from subquad.ops.kernel_attention.landmarks import gaussian, middle, newton_inverse


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(T: int = 12, S: int = 17, H: int = 4, G: int = 2, K: int = 6, V: int = 5):
    return positive(draw(2, T, H, K)), positive(draw(2, S, G, K, seed=1)), draw(2, S, G, V, seed=2)


def applied(weights: Tensor, v: Tensor) -> Tensor:
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], 2)
    return torch.einsum("bhij,bjhv->bihv", weights, v)


# The operation


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("padded", [False, True])
def test_linear_form_is_the_explicit_one(normalizer, padded):
    q, k, v = features()
    options = {"scale": 0.7, "eps": 0.0, "turned": (draw(*q.shape, seed=3), draw(*k.shape, seed=4))}
    if padded:
        options["valid"] = torch.arange(17) < torch.tensor([[11], [17]])
    o = bidirectional(q, k, v, normalizer, **options)
    close(o, applied(bidirectional_weights(q, k, normalizer, **options), v))
    if padded:
        options = {
            "scale": 0.7, "eps": 0.0, "turned": tuple(t[:1, :11] for t in options["turned"])
        }  # fmt: skip
        alone = bidirectional(q[:1, :11], k[:1, :11], v[:1, :11], normalizer, **options)
        close(o[:1, :11], alone)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_rows_sum_to_one(normalizer):
    q, k, v = features()
    close(bidirectional_weights(q, k, normalizer).sum(-1), torch.ones(2, 4, 12).double())
    same = bidirectional(q, k, torch.full_like(v, 3.0), normalizer, eps=0.0)
    close(same, torch.full_like(same, 3.0))
    assert torch.autograd.gradcheck(
        lambda q, k, v: bidirectional(q, k, v, normalizer),
        [t[:1, :4].requires_grad_() for t in (q, k, v)],
    )


def test_mala_is_linear_attention_and_inline_less_the_mean():
    q, k, v = features()
    mean = v.mean(1, keepdim=True).repeat_interleave(2, 2)
    parts = [bidirectional(q, k, v, name, eps=0.0) for name in ("divide", "subtract")]
    close(bidirectional(q, k, v, "magnitude", eps=0.0), parts[0] + parts[1] - mean, 1e-12)


def test_a_normalizer_may_be_a_function():
    q, k, v = features()
    mine = bidirectional(q, k, v, lambda z, eps: (1 / z, torch.zeros_like(z)))
    close(mine, bidirectional(q, k, v, "divide", eps=0.0))


def test_half_precision_adds_up_in_float32():
    q, k, v = (t.bfloat16() for t in features(S=4000))
    o = bidirectional(q, k, v, "magnitude")
    want = bidirectional(q.double(), k.double(), v.double(), "magnitude")
    close(o.double(), want, 1e-2)


BAD = [
    ({"normalizer": "dvide"}, "did you mean 'divide'"),
    ({"turned": (torch.zeros(1), torch.zeros(1))}, "turned[0] must have shape"),
    ({"valid": torch.ones(2, 3, dtype=torch.bool)}, "valid must have shape [2, 17], got [2, 3]"),
    ({"valid": torch.ones(2, 17)}, "valid must be bool"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        bidirectional(*features(), **{"normalizer": "divide", **options})
    assert message in str(error.value)
    with pytest.raises(ValueError, match="heads of k must divide heads of q=4, got 3"):
        bidirectional(*features(G=3), "divide")


# InLine


@pytest.mark.parametrize("feature_map", ["identity", "relu", "leaky_relu", "exp"])
def test_inline_is_its_definition(feature_map):
    mixer = subquad.create_mixer("inline", dim=8, heads=2, feature_map=feature_map, local=False)
    mixer.double()
    x = draw(2, 10, 8)
    phi = {"relu": F.relu, "leaky_relu": F.leaky_relu, "exp": lambda t: (t / 5).exp()}
    q, k, v = (p(x).unflatten(-1, (2, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (phi.get(feature_map, lambda t: t)(t) for t in (q, k))
    s = torch.einsum("bihk,bjhk->bhij", q, k) * 4**-0.5 / 10
    w = s - s.mean(-1, keepdim=True) + 1 / 10
    close(mixer(x)[0], mixer.o_proj(applied(w, v).flatten(-2)))


def test_inline_tells_lengths_of_queries_apart_and_division_does_not():
    q, k, _ = features()
    w = {n: [bidirectional_weights(a * q, k, n) for a in (1, 2)] for n in ("subtract", "divide")}
    close(w["subtract"][1] - 1 / 17, 2 * (w["subtract"][0] - 1 / 17))  # affine in the length
    assert (w["subtract"][1] - w["subtract"][0]).abs().max() > 0.01
    close(w["divide"][1], w["divide"][0])


def test_inline_divides_by_nothing():
    _, k, v = features()
    mean = v.mean(1, keepdim=True).repeat_interleave(2, 2)
    close(
        bidirectional(torch.zeros(2, 3, 4, 6).double(), k, v, "subtract"), mean.expand(2, 3, 4, 5)
    )
    assert bidirectional(draw(2, 3, 4, 6), 0 * k, v, "subtract").isfinite().all()
    o = bidirectional(draw(2, 3, 4, 6), k, v, "subtract")
    close(bidirectional(draw(2, 3, 4, 6), k, v + 5, "subtract"), o + 5)


def test_inline_residual_is_a_correlation_of_each_image():
    mixer = subquad.create_mixer("inline", dim=6, heads=2).double()
    x, grid = draw(2, 12, 6), (3, 4)
    plain = subquad.create_mixer("inline", dim=6, heads=2, local=False).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    with torch.no_grad():
        plain.o_proj.weight.copy_(torch.eye(6))
        mixer.o_proj.weight.copy_(torch.eye(6))
        mixer.o_proj.bias.copy_(plain.o_proj.bias)
    found = mixer(x, grid=grid)[0] - plain(x)[0]
    kernels = mixer.local(x.mean(1)[..., None]).view(2, 6, 3, 3)
    v = F.pad(mixer.v_proj(x).mT.unflatten(2, grid), (1, 1, 1, 1))
    want = torch.zeros(2, 6, 3, 4).double()
    for u in range(3):
        for w in range(3):
            want += kernels[:, :, u, w, None, None] * v[:, :, u : u + 3, w : w + 4]
    close(found, want.flatten(2).mT)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-3
    with torch.no_grad():  # a predictor of the centre alone adds v
        mixer.local[2].weight.zero_()
        mixer.local[2].bias.copy_(torch.eye(9)[4].repeat(6))
    close(mixer(x, grid=grid)[0] - plain(x)[0], mixer.v_proj(x))


def test_inline_class_tokens_have_no_neighborhood():
    mixer = subquad.create_mixer("inline", dim=6, heads=2, class_tokens=1).double()
    plain = subquad.create_mixer("inline", dim=6, heads=2, local=False).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x, grid = draw(2, 13, 6), (3, 4)
    with torch.no_grad():  # a neighborhood of the right neighbor alone, as strong as the mean says
        mixer.local[2].weight.mul_(torch.eye(9)[5].double().repeat(6)[:, None, None])
        mixer.local[2].bias.mul_(torch.eye(9)[5].double().repeat(6))
    weight = mixer.local(x.mean(1)[..., None]).view(2, 6, 9)[..., 5]
    v = F.pad(mixer.v_proj(x)[:, 1:].unflatten(1, grid), (0, 0, 0, 1))[:, :, 1:].flatten(1, 2)
    near = F.linear(weight[:, None] * v, mixer.o_proj.weight)
    close(mixer(x, grid=grid)[0], plain(x)[0] + F.pad(near, (0, 0, 1, 0)))
    with pytest.raises(ValueError, match="1 more must hold T=12"):
        mixer(x[:, 1:], grid=grid)


# MALA


def test_mala_has_negative_weights_as_the_scores_say():
    q, k = positive(draw(1, 64, 1, 8)), positive(draw(1, 64, 1, 8, seed=1))
    parts = []
    for a in (1, 2, 8):
        w = bidirectional_weights(a * q, k, "magnitude")
        s = 8**-0.5 / 64 * a * torch.einsum("bihk,bjhk->bhij", q, k)
        z = s.sum(-1, keepdim=True)
        assert torch.equal(w < 0, s * (1 + 1 / z) < z / 64)
        parts.append((w < 0).double().mean().item())
    assert 0.15 < parts[0] < 0.3 < parts[1] < 0.42 < parts[2] < 0.52


def test_mala_grows_sharper_with_the_query_and_division_does_not():
    q, k = positive(draw(1, 64, 1, 8)), positive(draw(1, 64, 1, 8, seed=1))
    weights = {a: bidirectional_weights(a * q, k, "magnitude") for a in (0.0001, 1, 2, 4, 8)}
    tops = [w.amax(-1).mean() for w in weights.values()]
    assert all(a < b for a, b in itertools.pairwise(tops))
    s = 8**-0.5 / 64 * torch.einsum("bihk,bjhk->bhij", q, k)
    z = s.sum(-1, keepdim=True)
    for a, w in weights.items():
        close(w, a * (s - z / 64) + s / z)
    close(weights[0.0001], bidirectional_weights(q, k, "divide"), 1e-3)
    ratio = [weights[a].amax(-1) / weights[a].median(-1).values for a in (1, 8)]
    assert (ratio[1].abs() > ratio[0].abs()).double().mean() > 0.9
    order = s.argsort(-1, descending=True)  # any two keys of a row: their ratio tends to a limit
    high, low = (s.gather(-1, order[..., i : i + 1]) for i in (0, 9))
    far = bidirectional_weights(1e6 * q, k, "magnitude")
    far = [far.gather(-1, order[..., i : i + 1]) for i in (0, 9)]
    close(far[0] / far[1], (high - z / 64) / (low - z / 64), 1e-3)
    equal = bidirectional_weights(q, k[:, :1].expand_as(k), "magnitude")
    close(equal, torch.full_like(equal, 1 / 64))


# RALA


def test_rala_is_its_definition():
    mixer = subquad.create_mixer("rala", dim=16, heads=2).double()
    x, grid = draw(2, 12, 16), (3, 4)
    q, k, v = (p(x).unflatten(-1, (2, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = positive(q), positive(k)
    alpha = 12 * (8**-0.5 * torch.einsum("bhk,bjhk->bjh", q.mean(1), k)).softmax(1)
    turned = torch.einsum("bihk,bjhk->bhij", rotate_image(q, grid), rotate_image(k, grid))
    plain = torch.einsum("bihk,bjhk->bhij", q, k)
    a = alpha.transpose(1, 2)[:, :, None]
    w = a * turned / ((a * plain).sum(-1, keepdim=True) + 12e-6)
    near = mixer.v_conv(mixer.v_proj(x).mT.unflatten(2, grid)).flatten(2).mT
    y = (applied(w, v).flatten(-2) + near) * mixer.g_proj(x)
    close(mixer(x, grid=grid)[0], mixer.o_proj(y))
    assert (w.sum(-1) - 1).abs().max() > 1e-3  # the positions turn the numerator alone


def test_rala_weighs_keys_to_a_mean_of_one():
    q, k = positive(draw(2, 30, 3, 8)), positive(draw(2, 30, 3, 8, seed=1))
    alpha = weights_of_keys(q, k)
    close(alpha.sum(1), torch.full((2, 3), 30.0).double())
    close(weights_of_keys(q, k[:, :1].expand_as(k)), torch.ones(2, 30, 3).double())
    assert (bidirectional_weights(q, alpha[..., None] * k, "divide") >= 0).all()


def test_rala_gate_lifts_the_rank():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    waves = [
        torch.sin(math.pi * (i * rows + j * columns) / 16) for i in range(1, 5) for j in (1, 2)
    ]
    smooth = torch.stack(waves, -1).double().flatten(0, 1) @ draw(8, 32)
    x = (smooth + 0.05 * draw(256, 32, seed=1))[None]
    mixer = subquad.create_mixer("rala", dim=32, heads=1).double()
    q, k, v = (p(x).unflatten(-1, (1, 32)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    y = mixer.attend(q, k, v, (16, 16)).flatten(-2)[0]
    entropy, rank = [], []
    for out in (y, y * mixer.g_proj(x)[0]):
        p = torch.linalg.svdvals(out)
        rank.append(int((p > 1e-3 * p[0]).sum()))
        p = p.square() / p.square().sum()
        entropy.append(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))
    assert entropy[1] > 1.5 * entropy[0]
    assert rank[0] < 16 < 28 < rank[1]


def test_rala_of_equal_keys_is_linear_attention():
    q, k, v = (draw(1, 30, 2, 8, seed=i) for i in range(3))
    q, k = positive(q), positive(k[:, :1]).expand(1, 30, 2, 8)
    alpha = weights_of_keys(q, k)
    close(
        bidirectional(q, alpha[..., None] * k, v, "divide"), bidirectional(q, k, v, "divide"), 1e-9
    )


@pytest.mark.parametrize("key", ["mala", "rala"])
def test_a_closed_gate_leaves_the_bias(key):
    mixer = subquad.create_mixer(key, dim=8, heads=2)
    torch.nn.init.zeros_(mixer.g_proj.weight)
    torch.nn.init.zeros_(mixer.g_proj.bias)
    close(mixer(torch.randn(1, 6, 8), grid=(2, 3))[0], mixer.o_proj.bias.expand(1, 6, 8))


def test_positions_turn_by_row_and_column():
    x = draw(1, 12, 1, 8)
    turned = rotate_image(x, (3, 4))
    close(
        turned[:, :, :, 4:].unflatten(1, (3, 4))[:, :, 0],
        x[:, :, :, 4:].unflatten(1, (3, 4))[:, :, 0],
    )
    close(turned[:, :4, :, :4], x[:, :4, :, :4])
    a, b = x[0, 4, 0, 0], x[0, 4, 0, 1]  # row 1, the fastest pair: one radian
    close(turned[0, 4, 0, 0], a * math.cos(1) - b * math.sin(1))
    close(turned.norm(dim=-1), x.norm(dim=-1))


# SOFT


def marks(m: int = 12, K: int = 8, spread: float = 1.0) -> Tensor:
    return spread * draw(1, m, 1, K, seed=5)


@pytest.mark.parametrize("normalize", [True, False])
def test_landmarks_are_the_explicit_matrix(normalize):
    q, v = draw(2, 20, 2, 8), draw(2, 20, 2, 5, seed=1)
    L = draw(2, 6, 2, 8, seed=2)
    o = landmark_attention(q, L, v, normalize=normalize)
    close(o, applied(landmark_weights(q, L, normalize=normalize), v), 1e-8)
    assert torch.autograd.gradcheck(
        lambda q, L, v: landmark_attention(q, L, v, normalize=normalize),
        [t[:1, :4, :1].clone().requires_grad_() for t in (q, L, v)],
        fast_mode=True,
    )


def test_gaussian_kernel():
    L = draw(12, 8)
    A = gaussian(L, L)
    close(A, A.mT)
    close(A.diagonal(), torch.ones(12).double())
    assert (A > 0).all()
    assert (A <= 1 + 1e-12).all()
    assert torch.linalg.eigvalsh(A).min() > -1e-6
    turn = torch.linalg.qr(draw(8, 8, seed=3)).Q
    close(gaussian(L @ turn + 3, L @ turn + 3), A)  # neither a shift nor a rotation matters


def test_newton_finds_the_inverse_and_its_gradient():
    A = gaussian(marks()[0, :, 0], marks()[0, :, 0])
    residual = [
        (A @ newton_inverse(A, iterations=n) - torch.eye(12)).norm() for n in (4, 8, 12, 20)
    ]
    assert residual[-1] < 1e-7
    assert all(a > b or b < 1e-9 for a, b in itertools.pairwise(residual))
    close(A @ newton_inverse(A) @ A, A, 1e-7)
    assert (A @ newton_inverse(A, ridge=0.01) @ A - A).abs().max() <= 0.01
    grads = []
    for inverse in (newton_inverse, torch.linalg.inv):
        a = A.clone().requires_grad_()
        (inverse(a) * draw(12, 12, seed=7)).sum().backward()
        grads.append(a.grad)
    close(grads[0], grads[1], 1e-4)


def test_equal_landmarks_stay_finite():
    L = marks(6).repeat(1, 2, 1, 1)
    A = gaussian(L[0, :, 0], L[0, :, 0])
    close(newton_inverse(A), torch.linalg.pinv(A, hermitian=True, rtol=1e-8), 1e-9)
    for normalize in (True, False):
        q, v = draw(1, 20, 1, 8), draw(1, 20, 1, 5)
        o = landmark_attention(q, L, v, normalize=normalize)
        assert o.isfinite().all()
        assert (
            landmark_attention(q.float(), L.float(), v.float(), normalize=normalize)
            .isfinite()
            .all()
        )


def test_the_normalised_matrix_does_not_grow_with_the_landmarks():
    norms = {True: [], False: []}
    for m in (16, 49, 100):
        L = 0.2 * F.gelu(F.layer_norm(draw(m, 32, seed=m), (32,)))
        A = gaussian(L, L)
        for normalize, found in norms.items():
            root = A.sum(-1, keepdim=True).rsqrt() if normalize else 1
            inverse = torch.linalg.inv(A + 0.01 * torch.eye(m))
            found.append(
                torch.linalg.matrix_norm(root * inverse * (root.mT if normalize else 1), 2)
            )
    assert norms[False][0] < norms[False][1] < norms[False][2]
    assert norms[True][0] >= norms[True][1] >= norms[True][2]
    assert middle(A, normalize=True).isfinite().all()


def test_soft_is_linear_where_the_landmarks_stay():
    """Twice the side and twice the ratio: four times the tokens, as many landmarks."""
    flops = [subquad.create_mixer("soft", dim=64, heads=2, ratio=r).flops((7 * r) ** 2)
             for r in (16, 32, 64)]  # fmt: skip
    assert all(3.9 < b / a <= 4.0 for a, b in itertools.pairwise(flops))
    mixer = subquad.create_mixer("soft", dim=64, heads=2, ratio=8)
    assert mixer.flops(112**2) > 5 * mixer.flops(56**2)


def test_a_result_does_not_depend_on_the_batch():
    mixer = subquad.create_mixer("soft", dim=16, heads=2, ratio=2).double()
    x = draw(3, 30, 16) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    close(mixer(x, grid=(6, 5))[0][1:2], mixer(x[1:2], grid=(6, 5))[0])


# Errors


@pytest.mark.parametrize("key", ["inline", "mala", "rala", "soft"])
def test_images_need_their_grid(key):
    mixer = subquad.create_mixer(key, dim=16, heads=2)
    x = torch.randn(1, 16, 16)
    with pytest.raises(ValueError, match=r"grid must be \(height, width\) for an image, got None"):
        mixer(x)
    with pytest.raises(ValueError, match="an image takes no state, padding or cu_seqlens"):
        mixer(x, grid=(4, 4), padding=torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads must divide dim=16, got 3"):
        subquad.create_mixer(key, dim=16, heads=3)


BAD_OPTIONS = [
    ("mala", {"heads": 8}, "dim / heads must be a multiple of 4"),
    ("rala", {"attention": "sofmax"}, "did you mean 'softmax'"),
    ("inline", {"feature_map": "elu"}, "feature_map must be one of"),
    ("soft", {"ratio": 1}, "ratio must be at least 2, got 1"),
    ("soft", {"conv_size": 4}, "conv_size must be odd"),
    ("soft", {"variant": "soft+"}, "did you mean"),
    ("softmax", {"causal": False, "window": 4}, "window must be None where causal is False"),
]


@pytest.mark.parametrize(("key", "options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(key, options, message):
    with pytest.raises(ValueError) as error:
        subquad.create_mixer(key, **{"dim": 16, **options})
    assert message in str(error.value)


def test_soft_loads_the_authors_names():
    names = {"q_proj": "W_q", "v_proj": "W_v", "o_proj": "ff", "pool": "attn.Qlandmark_op",
             "pool_norm": "attn.Qnorm_act.0", "v_conv": "attn.conv"}  # fmt: skip
    mixer = subquad.create_mixer("soft", dim=16)
    theirs = {}
    for name, t in mixer.state_dict().items():
        layer, _, kind = name.partition(".")
        theirs[f"{names[layer]}.{kind}"] = t
    found = mixer.translate(theirs)
    assert found.keys() == mixer.state_dict().keys()
    mixer.load_state_dict(found)


def test_soft_refuses_a_grid_without_a_landmark():
    mixer = subquad.create_mixer("soft", dim=16, heads=2, ratio=4)
    with pytest.raises(ValueError, match=r"grid must be at least ratio=4 a side, got \(2, 8\)"):
        mixer(torch.randn(1, 16, 16), grid=(2, 8))
