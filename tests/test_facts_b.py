"""What must hold of the gated and delta-rule mixers: limits, identities, other people's code."""

import math

import pytest
import torch
import torch.nn.functional as F

from kit import close
from subquad import create_mixer
from subquad.mixers.parts.decay import LowerBounds
from subquad.mixers.parts.norm import l2_norm
from subquad.ops.recurrence import recurrence

FORMS = ("chunk", "recurrent")
B, T, H, K, V = 2, 11, 3, 8, 5


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(T=T):
    return l2_norm(randn(B, T, H, K)), l2_norm(randn(B, T, H, K)), randn(B, T, H, V)


def orthonormal(T=K):
    return torch.linalg.qr(randn(B, H, K, K))[0].transpose(1, 2)[:, :T]


def only_now(q, k, v, weight=1.0):
    """What a memory of nothing but the present token answers."""
    return (q * k).sum(-1, keepdim=True) * weight * v


@pytest.mark.parametrize("form", FORMS)
class TestRecurrence:
    def test_no_decay_is_linear_attention(self, form):
        q, k, v = qkv()
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
        want = torch.einsum("bhts,bshv->bthv", scores, v)
        for decay in (None, torch.zeros(B, T, H).double(), torch.zeros(B, T, H, K).double()):
            close(recurrence(q, k, v, decay=decay, scale=1.0, form=form)[0], want)

    def test_decay_equal_over_channels_and_time_is_retention(self, form):
        (q, k, v), rate = qkv(), -torch.rand(H).double()
        channels = rate[:, None].expand(B, T, H, K)
        close(
            recurrence(q, k, v, decay=channels, form=form)[0],
            recurrence(q, k, v, decay=rate, form=form)[0],
        )

    @pytest.mark.parametrize("shape", [(B, T, H), (B, T, H, K)], ids=["head", "channel"])
    @pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
    def test_strong_decay_leaves_the_present(self, form, shape, delta):
        (q, k, v), decay = qkv(), torch.full(shape, -50.0).double()
        beta = torch.rand(B, T, H).double() if delta else None
        o, _ = recurrence(q, k, v, decay=decay, beta=beta, form=form)
        close(o, K**-0.5 * only_now(q, k, v, 1.0 if beta is None else beta[..., None]))

    def test_delta_rule_with_channels_alike_is_the_gated_one(self, form):
        (q, k, v), decay = qkv(), -torch.rand(B, T, H).double()
        beta = torch.rand(B, T, H).double()
        for a, b in zip(
            recurrence(q, k, v, decay=decay, beta=beta, form=form),
            recurrence(q, k, v, decay=decay[..., None].expand(-1, -1, -1, K), beta=beta, form=form),
            strict=True,
        ):
            close(a, b)

    def test_beta_zero_freezes_the_state(self, form):
        (q, k, v), S = qkv(), randn(B, H, K, V)
        o, last = recurrence(q, k, v, beta=torch.zeros(B, T, H).double(), state=S, form=form)
        close(last, S)
        close(o, K**-0.5 * torch.einsum("bhkv,bthk->bthv", S, q))

    def test_orthonormal_keys_are_remembered_exactly(self, form):
        k, v = orthonormal(), randn(B, K, H, V)
        one = torch.ones(B, K, H).double()
        _, S = recurrence(k, k, v, beta=one, form=form)
        close(torch.einsum("bhkv,bthk->bthv", S, k), v)
        q = randn(B, K, H, K)
        close(recurrence(q, k, v, beta=one, form=form)[0], recurrence(q, k, v, form=form)[0])

    def test_second_write_replaces_the_first(self, form):
        q, k, v = qkv(2)
        k = k[:, :1].expand(-1, 2, -1, -1) / k[:, :1].norm(dim=-1, keepdim=True)
        read = "bhkv,bhk->bhv"
        _, S = recurrence(q, k, v, beta=torch.ones(B, 2, H).double(), form=form)
        close(torch.einsum(read, S, k[:, 0]), v[:, 1])
        _, S = recurrence(q, k, v, form=form)
        close(torch.einsum(read, S, k[:, 0]), v[:, 0] + v[:, 1])

    def test_nothing_to_correct_gives_beta_no_gradient(self, form):
        (q, k, _), S = qkv(1), randn(B, H, K, V)
        v = torch.einsum("bhkv,bthk->bthv", S, k)
        beta = torch.rand(B, 1, H).double().requires_grad_()
        o, last = recurrence(q, k, v, beta=beta, state=S, form=form)
        (gradient,) = torch.autograd.grad(o.square().sum() + last.square().sum(), beta)
        close(gradient, torch.zeros_like(gradient))

    def test_initial_state_adds(self, form):
        """Mamba-2: y(S0) - y(0) = exp(cumulative decay) S0^T C."""
        (q, k, v), S = qkv(), randn(B, H, K, V)
        decay = -torch.rand(B, T, H).double()
        with_state, _ = recurrence(q, k, v, decay=decay, state=S, scale=1.0, form=form)
        without, _ = recurrence(q, k, v, decay=decay, scale=1.0, form=form)
        read = torch.einsum("bhkv,bthk->bthv", S, q)
        close(with_state - without, decay.cumsum(1).exp()[..., None] * read)

    def test_grouped_values_are_repeated_keys(self, form):
        q, k, _ = qkv()
        v, beta = randn(B, T, 2 * H, V), torch.rand(B, T, 2 * H).double()
        decay = -torch.rand(B, T, 2 * H, K).double()
        twice = [t.repeat_interleave(2, 2) for t in (q, k)]
        close(
            recurrence(q, k, v, decay=decay, beta=beta, form=form)[0],
            recurrence(*twice, v, decay=decay, beta=beta, form=form)[0],
        )


def test_transition_of_the_delta_rule_contracts():
    """Eigenvalues 1 (K-1 times) and 1 - beta; with a decay no singular value above 1."""
    k, beta = F.normalize(randn(K), dim=0), torch.tensor([[0.7]]).double()
    eye = torch.eye(K).double()[None, None]  # the state's columns are the basis: S -> the matrix
    token = k.view(1, 1, 1, K)
    zero, none = torch.zeros(1, 1, 1, K).double(), torch.zeros(1, 1, 1, K).double()
    _, A = recurrence(token, token, zero, beta=beta[None], state=eye)
    values = torch.linalg.eigvalsh((A[0, 0] + A[0, 0].mT) / 2)
    close(values, torch.tensor([0.3] + [1.0] * (K - 1)).double())
    decay = none - torch.rand(K).double()
    _, A = recurrence(token, token, zero, beta=beta[None], decay=decay, state=eye)
    assert torch.linalg.matrix_norm(A[0, 0], 2) <= 1 + 1e-12


def mixer(key, **options):
    """A mixer in float64 with nothing left at a special value."""
    made = create_mixer(key, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def test_gated_deltanet_without_decay_is_deltanet():
    gated = mixer("gated_deltanet", dim=16, heads=2, head_dim=8, expand_v=1.0)
    plain = mixer("deltanet", dim=16, heads=2, use_gate=True)
    torch.nn.init.constant_(gated.A_log, -math.inf)
    shared = {n: p for n, p in gated.state_dict().items() if n in plain.state_dict()}
    plain.load_state_dict(shared)
    x = randn(2, 9, 16)
    close(gated(x)[0], plain(x)[0])


def test_bounded_decay_of_kda_stays_above_its_floor():
    kda = mixer("kimi_linear", dim=16, heads=2, decay_floor=-5.0)
    decay = kda.decay(100 * randn(2, 50, 16))
    assert decay.shape == (2, 50, 2, 8)
    assert -5 <= decay.min() < -4.9
    assert -0.1 < decay.max() <= 0
    close(kda.decay(torch.zeros(1, 1, 16).double()).flatten(), -5 * torch.sigmoid(
        kda.A_log.exp().repeat_interleave(8) * kda.dt_bias))  # fmt: skip


def test_gla_decays_slowly_and_no_faster_than_its_floor():
    x = 30 * randn(1, 40, 16)
    decays = {}

    def spy(q, k, v, context, state, *, decay):
        decays[floor] = decay
        return torch.zeros(1, 40, 2, 8).double()

    gla = mixer("gla", dim=16, heads=2)
    for floor in (None, -0.1):
        gla.clamp_min, gla.recur = floor, spy
        gla(x)
    r = gla.gk_proj(x).unflatten(-1, (2, -1))
    close(decays[None], torch.sigmoid(r).log() / 16)
    close(decays[-0.1], decays[None].clamp_min(-0.1))
    assert decays[None].min() < -0.1


def test_hgrn2_is_gla_with_tied_key_and_gate():
    m = mixer("hgrn2", dim=16, heads=2, layer=2, layers=3)
    x = randn(2, 9, 16)
    P = m.bound.own.weight.softmax(0)
    lb = P[1] + P[2]
    f = lb + (1 - lb) * torch.sigmoid(m.f_proj(x))
    heads = [t.unflatten(-1, (2, 8)) for t in (F.silu(m.q_proj(x)), 1 - f, m.i_proj(x), f.log())]
    o, _ = recurrence(*heads[:3], decay=heads[3], scale=8**-0.5, form="recurrent")
    o = o.flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
    close(m(x)[0], m.o_proj(o))


def test_hgrn2_with_a_shut_gate_or_a_constant_value():
    x = randn(2, 9, 16)
    m = mixer("hgrn2", dim=16, heads=2, bounds=torch.ones(16).double() * (1 - 1e-12))
    assert m(x)[1]["S"].abs().max() < 1e-10
    # A constant v: row c of S is (1 - the product of its gates) v.
    m, v = mixer("hgrn2", dim=16, heads=2, variant="standalone"), F.silu(randn(16))
    torch.nn.init.zeros_(m.i_proj.weight)
    with torch.no_grad():
        m.i_proj.bias.copy_(torch.linspace(-1, 1, 16))
    v = F.silu(m.i_proj.bias).view(2, 8)
    left = 1 - torch.sigmoid(m.f_proj(x)).prod(1).view(2, 2, 8)
    close(m(x)[1]["S"], left[..., None] * v[:, None])


def test_hgrn2_of_width_one_is_a_vector_recurrence():
    """And its state is then HGRN's, fed HGRN2's value for silu of the input."""
    wide = mixer("hgrn2", dim=6, expand_ratio=1)
    thin = mixer("hgrn", dim=6)
    thin.f_proj.load_state_dict(wide.f_proj.state_dict())
    x = randn(2, 9, 6)
    want = torch.zeros(2, 6).double()
    for t in range(9):
        f = torch.sigmoid(wide.f_proj(x[:, t]))
        want = f * want + (1 - f) * wide.i_proj(x[:, t])
    close(wide(x)[1]["S"].flatten(1), want)
    assert wide(x)[1]["S"].numel() == thin(x)[1]["h"].numel()


def test_hgrn_is_its_loop():
    m = mixer("hgrn", dim=6, layer=1, layers=2)
    x, h, ys = randn(2, 13, 6), torch.zeros(2, 6).double(), []
    lb = m.bound.own.weight.softmax(0)[1]
    for t in range(13):
        f = lb + (1 - lb) * torch.sigmoid(m.f_proj(x[:, t]))
        h = f * h + F.silu(m.i_proj(x[:, t])) * (1 - f)
        ys.append(h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight)
    close(m(x)[0], m.o_proj(torch.stack(ys, 1) * F.silu(m.g_proj(x))))


@pytest.mark.parametrize("variant", ["real", "complex"])
def test_hgrn_of_both_directions_is_the_sum_of_two_scans(variant):
    m = mixer("hgrn", dim=6, variant=variant, layer=1, layers=2, causal=False)
    x, padding = randn(2, 9, 6), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :3] = True
    u = F.silu(m.i_proj(x)).view(2, 9, 6, -1)
    u = torch.complex(
        u[..., 0], u[..., 1] if variant == "complex" else torch.zeros(2, 9, 6).double()
    )
    theta = m.theta if variant == "complex" else torch.zeros(6).double()
    lb = m.bound.own.weight.softmax(0)[1]
    f = lb + (1 - lb) * torch.sigmoid(m.f_proj(x))
    turn, u = f * torch.exp(1j * theta), (1 - f) * u
    ahead, back = torch.zeros_like(u), torch.zeros_like(u)
    for t in range(9):
        ahead[:, t] = u[:, t] + (turn[:, t] * ahead[:, t - 1] if t else 0)
        back[:, 8 - t] = u[:, 8 - t] + (turn[:, 8 - t] * back[:, 9 - t] if t else 0)
    h, z = ahead + back, m.g_proj(x)
    if variant == "real":
        want = m.o_proj(m.norm(h.real, z))
    else:
        want = m.o_proj(m.norm(torch.cat([h.real, h.imag], -1)) * F.silu(z))
    close(m(x)[0], want)
    close(m(x, padding=padding)[0][0, 3:], m(x[:1, 3:])[0][0])
    packed = m(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 9, 13, 18], dtype=torch.int32))[0]
    for a, b in ((0, 9), (9, 13), (13, 18)):
        close(packed[:, a:b], m(x.flatten(0, 1)[None, a:b])[0])


def test_hgrn_loads_the_authors_names():
    m = mixer("hgrn", dim=6, variant="complex")
    names = {
        "i_proj": "input_proj",
        "f_proj": "lambda_proj",
        "g_proj": "gate",
        "o_proj": "out_proj",
    }
    theirs = {}
    for name, t in m.state_dict().items():
        layer, dot, kind = name.partition(".")
        shape = (1, 1, -1) if name == "theta" else t.shape
        theirs[names.get(layer, layer) + dot + kind] = t.clone().view(shape)
    found = m.translate(theirs)
    assert found.keys() == m.state_dict().keys()
    m.load_state_dict(found)


def test_hgrn2_loads_the_authors_standalone_names():
    """One projection of value, query and gate, in this order."""
    m, x = mixer("hgrn2", dim=6, heads=2, variant="standalone"), randn(2, 7, 6)
    theirs = {n: t for n, t in m.state_dict().items() if n.startswith("norm.")}
    for kind in ("weight", "bias"):
        own = m.state_dict()
        theirs[f"in_proj.{kind}"] = torch.cat([own[f"{n}_proj.{kind}"] for n in "iqf"])
        theirs[f"out_proj.{kind}"] = own[f"o_proj.{kind}"]
    other = mixer("hgrn2", dim=6, heads=2, variant="standalone")
    other.load_state_dict(other.translate(theirs))
    close(other(x)[0], m(x)[0])


def test_hgrn_of_a_constant_input_tends_to_it():
    m = mixer("hgrn", dim=6)
    x = randn(1, 1, 6).expand(1, 400, 6)
    close(m(x)[1]["h"], F.silu(m.i_proj(x[:, 0])), 1e-6)
    y = 5 * randn(2, 50, 6)
    assert (m(y)[1]["h"].abs() <= F.silu(m.i_proj(y)).abs().amax(1)).all()


def test_hgrn_complex_is_its_loop_and_without_rotation_two_real_ones():
    m = mixer("hgrn", dim=6, variant="complex", layer=1, layers=2)
    x, H, ys = randn(2, 13, 6), torch.zeros(2, 6, dtype=torch.complex128), []
    lb = m.bound.own.weight.softmax(0)[1]
    u = torch.view_as_complex(F.silu(m.i_proj(x)).view(2, 13, 6, 2))
    for t in range(13):
        f = lb + (1 - lb) * torch.sigmoid(m.f_proj(x[:, t]))
        H = f * torch.exp(1j * m.theta) * H + (1 - f) * u[:, t]
        ys.append(m.norm(torch.cat([H.real, H.imag], -1)))
    y, state = m(x)
    close(y, m.o_proj(torch.stack(ys, 1) * F.silu(m.g_proj(x))))
    assert (torch.view_as_complex(state["h"]).abs() <= u.abs().amax(1)).all()

    torch.nn.init.zeros_(m.theta)
    h = m(x)[1]["h"]
    for part in (0, 1):
        real = mixer("hgrn", dim=6, layer=1, layers=2)
        real.i_proj = torch.nn.Linear(6, 6).double()
        real.i_proj.weight.data = m.i_proj.weight[part::2]
        real.i_proj.bias.data = m.i_proj.bias[part::2]
        real.f_proj, real.bound = m.f_proj, m.bound
        close(real(x)[1]["h"], h[..., part])


def test_model_wide_bounds_rise_with_the_depth():
    bounds = LowerBounds(3, 16)
    torch.nn.init.normal_(bounds.weight)
    for key in ("hgrn", "hgrn2"):
        layers = [create_mixer(key, dim=16, layer=n, layers=3, bounds=bounds) for n in range(3)]
        assert layers[0].bound() is None
        assert (layers[2].bound() > layers[1].bound()).all()
        layers[2](torch.randn(1, 3, 16))[0].sum().backward()
        assert bounds.weight.grad.abs().min() > 0
        bounds.weight.grad = None


def mamba2_parts(m, x):
    """x, B, C, the step and z as the definition has them, by other means."""
    D, GN = 32, m.groups * m.key_dim
    z, xBC, dt = m.in_proj(x).split([D, D + 2 * GN, m.state_heads], -1)
    xBC = F.conv1d(F.pad(xBC.mT, (3, 0)), m.conv.weight, m.conv.bias, groups=D + 2 * GN).mT
    u, Bs, Cs = F.silu(xBC).split([D, GN, GN], -1)
    repeat = m.state_heads // m.groups
    Bs, Cs = (t.unflatten(-1, (m.groups, -1)).repeat_interleave(repeat, 2) for t in (Bs, Cs))
    return u.unflatten(-1, (m.state_heads, -1)), Bs, Cs, F.softplus(dt + m.dt_bias), z


def mamba2_output(m, y, u, z):
    y = (y + m.D[:, None] * u).flatten(-2) * F.silu(z)
    return m.o_proj(m.norm(y))


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_limits(groups):
    """A -> 0 sums over the past, A -> -inf sees only the present."""
    m = mixer("mamba2", dim=16, heads=4, state_dim=6, groups=groups)
    x = randn(2, 9, 16)
    u, Bs, Cs, step, z = mamba2_parts(m, x)
    v = u * step[..., None]
    torch.nn.init.constant_(m.A_log, -math.inf)
    scores = torch.einsum("bthn,bshn->bhts", Cs, Bs).tril()
    close(m(x)[0], mamba2_output(m, torch.einsum("bhts,bshp->bthp", scores, v), u, z))
    torch.nn.init.constant_(m.A_log, 12.0)
    close(m(x)[0], mamba2_output(m, only_now(Cs, Bs, v), u, z))


def test_mamba2_norm_and_step_options():
    x = randn(2, 9, 16)
    whole = mixer("mamba2", dim=16, heads=4, state_dim=6, groups=2, norm="whole")
    grouped = create_mixer("mamba2", dim=16, heads=4, state_dim=6, groups=2).double()
    grouped.load_state_dict(whole.state_dict())
    assert (grouped(x)[0] - whole(x)[0]).abs().max() > 1e-3
    fixed = create_mixer(
        "mamba2", dim=16, heads=4, state_dim=6, groups=2, norm="whole", dt_limit=(0.1, 0.1)
    ).double()
    fixed.load_state_dict(whole.state_dict())
    u, Bs, Cs, _, z = mamba2_parts(fixed, x)
    # A constant step: an exponential impulse response.
    ago = torch.arange(9)[:, None] - torch.arange(9)
    L = (-fixed.A_log.exp()[:, None, None] * 0.1 * ago.clamp_min(0)).exp().tril()
    y = torch.einsum("bthn,bshn,hts,bshp->bthp", Cs, Bs, L, 0.1 * u)
    close(fixed(x)[0], mamba2_output(fixed, y, u, z))


class TestPeers:
    """Layers of transformers, written by others, with the same weights."""

    def test_mamba2(self):
        peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
        config = peer.Mamba2Config(
            hidden_size=32, num_heads=8, head_dim=8, state_size=6, n_groups=1, expand=2,
            conv_kernel=4, chunk_size=4, layer_norm_epsilon=1e-5, num_hidden_layers=1,
        )  # fmt: skip
        theirs = peer.Mamba2Mixer(config, layer_idx=0)
        ours = create_mixer("mamba2", dim=32, heads=8, state_dim=6)
        self.same(ours, theirs, ours.translate(theirs.state_dict()))

    def test_gated_deltanet(self):
        peer = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
        config = peer.OlmoHybridConfig(
            hidden_size=32, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=16, linear_conv_kernel_dim=4, linear_allow_neg_eigval=True,
        )  # fmt: skip
        theirs = peer.OlmoHybridGatedDeltaNet(config, layer_idx=0)
        ours = create_mixer(
            "gated_deltanet", dim=32, heads=2, head_dim=8, negative_eigenvalues=True
        )
        weights = split_conv(theirs.state_dict(), (16, 16, 32))
        self.same(ours, theirs, ours.translate(weights))

    def test_kimi_linear(self):
        peer = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
        config = peer.KimiLinearConfig(
            hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"],
            linear_num_heads=2, linear_head_dim=16, linear_conv_kernel_dim=4, rms_norm_eps=1e-5,
        )  # fmt: skip
        theirs = peer.KimiLinearDeltaAttention(config, layer_idx=0)
        with torch.no_grad():
            theirs.forget_gate.A_log.uniform_(0, 2)
            theirs.forget_gate.dt_bias.uniform_(-4, -2)
        ours = create_mixer("kimi_linear", dim=32, heads=2, gate_bias=False)
        weights = split_conv(theirs.state_dict(), (32, 32, 32))
        weights = {n.removeprefix("forget_gate."): t for n, t in weights.items()}
        weights["A_log"] = weights["A_log"].flatten()
        self.same(ours, theirs, ours.translate(weights))

    def same(self, ours, theirs, weights):
        ours.load_state_dict(weights)
        x = torch.randn(2, 19, 32)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = theirs(b), ours(a)[0]
        close(got, want, 1e-5)
        weight = torch.randn_like(got)
        (want_grad,) = torch.autograd.grad((want * weight).sum(), b)
        (got_grad,) = torch.autograd.grad((got * weight).sum(), a)
        close(got_grad, want_grad, 1e-4)


def split_conv(weights, widths):
    """One convolution over q, k and v together, as three."""
    weights = dict(weights)
    parts = weights.pop("conv1d.weight").split(widths)
    return weights | {f"{n}_conv1d.weight": t for n, t in zip("qkv", parts, strict=True)}


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("gated_deltanet", {"dim": 16, "heads": 3, "value_heads": 4}, "heads must divide value_he"),
        ("gated_deltanet", {"dim": 16, "conv_size": -1}, "conv_size must be a non-negative int"),
        ("kimi_linear", {"dim": 18, "heads": 4}, "heads must divide dim=18, got 4"),
        ("kimi_linear", {"dim": 16, "decay_floor": 1.0}, "decay_floor must be negative"),
        ("deltanet", {"dim": 16, "qk_norm": "l3"}, "qk_norm must be one of"),
        ("deltanet", {"dim": 16, "qk_activation": "rulu"}, "did you mean 'relu'"),
        ("deltanet", {"dim": 18}, "heads must divide"),
        ("gla", {"dim": 16, "heads": 4, "kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ("gla", {"dim": 16, "gate_normalizer": 0}, "gate_normalizer must be positive, got 0"),
        ("gla", {"dim": 16, "clamp_min": 0.5}, "clamp_min must be negative or None"),
        ("hgrn", {"dim": 16, "variant": "reel"}, "did you mean 'real'"),
        ("hgrn", {"dim": 16, "layer": 2, "layers": 2}, "layer must lie in"),
        ("hgrn", {"dim": 16, "bounds": 0.5}, "bounds must be LowerBounds, a Tensor or None"),
        ("hgrn2", {"dim": 16, "heads": 3}, "heads must divide dim=16, got 3"),
        ("hgrn2", {"dim": 16, "heads": 4, "expand_ratio": 8}, "expand_ratio must be dim / heads"),
        ("mamba2", {"dim": 16, "heads": 4, "groups": 3}, "groups must divide heads=4, got 3"),
        ("mamba2", {"dim": 16}, "head_dim must divide"),
        ("mamba2", {"dim": 16, "heads": 4, "dt_limit": (0.2, 0.1)}, "dt_limit must be"),
    ],
)  # fmt: skip
def test_bad_options(key, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(key, **options)
