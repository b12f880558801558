"""What the papers say of softmax attention, MLA, linear attention, RetNet, Lightning and BASED."""

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

import subquad
from kit import close
from subquad.mixers.lightning import lightning_rates, slopes
from subquad.mixers.parts import past
from subquad.mixers.parts.feature_map import FEATURE_MAPS, create_feature_map
from subquad.mixers.parts.rotary import rope_frequencies, rotate
from subquad.mixers.retnet import retention_decay, retention_frequencies
from subquad.ops.recurrence import recurrence

like = torch.zeros(1, dtype=torch.float64)


def build(key: str, **options):
    """A mixer in float64 whose weights are no special values."""
    torch.manual_seed(0)
    mixer = subquad.create_mixer(key, **options).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def heads(x: Tensor, n: int) -> Tensor:
    """``[B,T,n D]`` to ``[B,n,T,D]``."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def joined(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(-2)


def reads_constant(mixer, value: float = 2.0):
    """Make v the same for all tokens (x's first feature must be 1) and let y be o itself."""
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.v_proj.weight[:, 0] = value
        mixer.o_proj.weight.copy_(torch.eye(*mixer.o_proj.weight.shape))
    return mixer


# Linear attention


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_is_its_quadratic_form(feature_map):
    """Weights phi(q) . phi(k), their sum as denominator or none, at a T that fits no chunk."""
    for normalize in (True, False):
        options = {"feature_map": feature_map, "normalize": normalize, "output_norm": False}
        mixer, x = build("linear_attention", dim=12, heads=2, **options), tokens(2, 70, 12)
        q = mixer.feature_map_q(heads(mixer.q_proj(x), 2))
        k = mixer.feature_map_k(heads(mixer.k_proj(x), 2))
        assert q.shape[-1] == mixer.feature_map_q.width
        A = (q @ k.mT).tril()
        A = A / (A.sum(-1, keepdim=True) + 1e-6) if normalize else A * q.shape[-1] ** -0.5
        want = mixer.o_proj(joined(A @ heads(mixer.v_proj(x), 2)))
        # Where the weights change sign their sum may vanish, and rounding shows.
        signed = feature_map in ("identity", "elementwise_product")
        close(mixer(x)[0], want, 1e-6 if normalize and signed else 1e-9)


@pytest.mark.parametrize("key", ["linear_attention", "based"])
def test_weights_sum_to_one(key):
    mixer, x = reads_constant(build(key, dim=8, heads=2)), tokens(1, 40, 8)
    x[..., 0] = 1
    close(mixer(x)[0], torch.full_like(x, 2.0), 1e-5)


def test_first_token_reads_itself():
    mixer, x = build("linear_attention", dim=8, heads=2), tokens(3, 1, 8)
    close(mixer(x)[0], mixer.o_proj(mixer.v_proj(x)), 1e-5)


def test_last_token_needs_no_causality():
    causal, x = build("linear_attention", dim=8, heads=2), tokens(2, 33, 8)
    both = build("linear_attention", dim=8, heads=2, causal=False)
    close(causal(x)[0][:, -1], both(x)[0][:, -1])
    assert not torch.allclose(causal(x)[0][:, 0], both(x)[0][:, 0])


def test_plain_linear_attention_is_the_recurrence_without_decay():
    options = {"feature_map": "identity", "normalize": False, "output_norm": False}
    mixer, x = build("linear_attention", dim=8, heads=2, **options), tokens(2, 20, 8)
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    o, _ = recurrence(q, k, v, decay=torch.zeros_like(q))
    close(mixer(x)[0], mixer.o_proj(o.flatten(-2)))


def test_feature_maps_are_what_their_papers_say():
    x = tokens(3, 6)
    r = torch.cat([x.relu(), (-x).relu()], -1)
    shifted = [r * torch.cat([r[:, -s:], r[:, :-s]], -1) for s in (1, 2)]
    close(create_feature_map("dpfp", 6, nu=2)(x), torch.cat(shifted, -1))
    close(create_feature_map("elu", 6)(x), torch.where(x > 0, x + 1, x.exp()))
    hedgehog = create_feature_map("hedgehog", 6).double()(x)
    both = torch.cat([2 * x, -2 * x], -1).exp()
    close(hedgehog, both / both.sum(-1, keepdim=True))


# RetNet


def retnet_scores(mixer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """``q k^T`` by complex rotation, and the decay matrix D: ``[B,H,T,T]`` and ``[H,T,T]``."""
    K, n = mixer.key_dim, mixer.heads
    a = 10000.0 ** -(torch.arange(K // 2, dtype=torch.float64) / (K // 2 - 1))
    turn = torch.exp(1j * positions[:, None] * a)
    q, k = heads(mixer.q_proj(x), n), heads(mixer.k_proj(x), n) * K**-0.5
    q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn for t in (q, k))
    T = x.shape[1]
    gamma = 1 - 2.0 ** (-5 - torch.arange(n, dtype=torch.float64))
    ago = torch.arange(T)[:, None] - torch.arange(T)
    return (q @ k.mH).real, torch.where(ago >= 0, gamma[:, None, None] ** ago.clamp_min(0), 0)


@pytest.mark.parametrize("score_norm", [None, "decay", "rows"])
def test_retnet_is_its_parallel_form(score_norm):
    mixer, x = build("retnet", dim=12, heads=2, score_norm=score_norm), tokens(2, 70, 12) * 8
    scores, D = retnet_scores(mixer, x, torch.arange(70))
    if score_norm:
        D = D / D.sum(-1, keepdim=True).sqrt()
    A = scores * D
    if score_norm == "rows":
        A = A / A.abs().sum(-1, keepdim=True).clamp(1, 5e4)
    o = A @ heads(mixer.v_proj(x), 2)
    o = joined(o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6))
    close(mixer(x)[0], mixer.o_proj(torch.nn.functional.silu(mixer.g_proj(x)) * o))


def test_retnet_score_norms_are_the_same_in_packed_sequences():
    for score_norm in ("decay", "rows"):
        mixer, x = build("retnet", dim=12, heads=2, score_norm=score_norm), tokens(1, 20, 12)
        y, _ = mixer(x, cu_seqlens=torch.tensor([0, 8, 8, 20], dtype=torch.int32))
        close(y, torch.cat([mixer(x[:, :8])[0], mixer(x[:, 8:])[0]], 1))


@pytest.mark.parametrize("variant", ["torchscale", "library"])
def test_retnet_sees_relative_positions(variant):
    mixer, x = build("retnet", dim=16, heads=2, variant=variant), tokens(1, 30, 16)
    shifted, _ = mixer(x, positions=torch.arange(1000, 1030)[None])
    stretched, _ = mixer(x, positions=torch.arange(0, 60, 2)[None])
    close(shifted, mixer(x)[0], 1e-8)
    assert not torch.allclose(stretched, shifted, atol=1e-3)


def test_retnet_forgets_the_scale_of_q():
    mixer, x = build("retnet", dim=16, heads=2, norm_eps=1e-12), tokens(1, 30, 16)
    y, _ = mixer(x)
    with torch.no_grad():
        mixer.q_proj.weight.mul_(7.0)
    close(mixer(x)[0], y, 1e-7)


def test_retnet_matches_the_authors_state_and_forms(shared):
    """Their recurrent state is ours over the root of the decays' sum; their forms agree."""
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / "retnet.safetensors")
    close(retention_frequencies(16, golden["x"]), golden["angle"][::2], 1e-6)
    close(retention_decay(2, golden["x"]), golden["log_decay"], 1e-6)
    weights = {k[2:]: t for k, t in golden.items() if k.startswith("w.")}
    off = {}
    for score_norm in (None, "rows"):
        mixer = subquad.create_mixer("retnet", dim=32, heads=2, score_norm=score_norm)
        mixer.load_state_dict(mixer.translate(weights))
        y, state = mixer(golden["x"])
        for form in ("out", "out.chunk16", "out.recurrent"):
            close(y, golden[form], 2e-4)
        off[score_norm] = (y - golden["out"]).abs().max()
    scale = ((1 - golden["log_decay"].exp() ** 80) / (1 - golden["log_decay"].exp())).to(y)
    close(scale, golden["rec.scale"], 1e-4)
    close((state["S"] / scale[:, None, None].sqrt()).mT, golden["rec.prev_key_value"], 1e-4)
    assert off["rows"] < off[None] < 1e-4, "the norm removes the row scale but for its eps"


# Lightning


def test_lightning_slopes():
    tables = {
        3: [0.0625, 0.00390625, 0.25],
        4: [0.25, 0.0625, 0.015625, 0.00390625],
        6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
        8: [2.0**-n for n in range(1, 9)],
    }
    for n, table in tables.items():
        assert slopes(n).tolist() == table
        rate = lightning_rates(n, 2, 5, like=like)
        close(rate, torch.tensor(table, dtype=torch.float64) * (1 - 2 / 4 + 1e-5))
    paper = torch.arange(3, dtype=torch.float64) * 8 / 3 * (1 - 2 / 4)
    close(lightning_rates(3, 2, 4, form="paper", like=like), paper)
    assert lightning_rates(4, 4, 5, like=like).max() < 1e-5, "the last layer hardly decays"
    close(lightning_rates(4, 0, 1, like=like).float(), slopes(4), 1e-4)


@pytest.mark.parametrize("preset", ["example", "paper"])
@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_is_its_parallel_form(preset, layer):
    """No scale, no denominator; silu on v and a layer norm in one preset, a rotation and a norm
    without weights in the other."""
    mixer = build("lightning", dim=12, heads=3, preset=preset, layer=layer, layers=4)
    x, T, F = tokens(2, 70, 12), 70, torch.nn.functional
    q, k = heads(F.silu(mixer.q_proj(x)), 3), heads(F.silu(mixer.k_proj(x)), 3)
    v = mixer.v_proj(x)
    ago = torch.arange(T)[:, None] - torch.arange(T)
    D = (-lightning_rates(3, layer, 4, like=x)[:, None, None] * ago).exp()
    if preset == "paper" and layer == 0:
        turn = torch.cos(ago * mixer.theta[:, 0, :, None, None])
        scores = torch.einsum("bhtk,bhsk,hkts->bhts", q, k, turn)
    else:
        scores = q @ k.mT
    v = F.silu(v) if preset == "example" else v
    o = joined(torch.where(ago >= 0, scores * D, 0) @ heads(v, 3))
    if preset == "example":
        o = F.layer_norm(o, (12,), mixer.norm.weight, mixer.norm.bias, 1e-5)
        o = o * torch.sigmoid(mixer.g_proj(x))
    else:
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * mixer.g_proj(x)
    close(mixer(x)[0], mixer.o_proj(o))
    rotates = preset == "paper" and layer == 0
    assert mixer.state_bytes(1) == 4 * 3 * 4 * 4 * (2 if rotates else 1)


def test_lightning_limits():
    """No decay is linear attention, endless decay sees the token alone, and K may be split."""
    q, k, v = tokens(3, 1, 40, 2, 8).unbind()
    none, _ = recurrence(q, k, v, scale=1.0)
    zero, _ = recurrence(q, k, v, decay=torch.zeros(2), scale=1.0)
    close(zero, none)
    endless, _ = recurrence(q, k, v, decay=torch.full((2,), -1e4), scale=1.0)
    close(endless, (q * k).sum(-1, keepdim=True) * v)
    decay = -slopes(2).double()
    whole, _ = recurrence(q, k, v, decay=decay, scale=1.0)
    parts = zip(q.split(3, -1), k.split(3, -1))
    close(sum(recurrence(a, b, v, decay=decay, scale=1.0)[0] for a, b in parts), whole)


# BASED


def test_taylor_map_is_the_exponential_to_second_order():
    q, k = 5 * tokens(2, 50, 16).unbind()[0], tokens(3, 50, 16)[2]
    s = (q * k).sum(-1) / 4
    for compressed, width in ((False, 273), (True, 153)):
        phi = create_feature_map("taylor", 16, compressed=compressed)
        assert phi(q).shape[-1] == phi.width == width
        close((phi(q) * phi(k)).sum(-1), 1 + s + s**2 / 2, 1e-12)
        assert (phi(q) @ phi(1e3 * k).mT).min() >= 0.5 - 1e-6
    small = 0.3 * s / s.abs().max()
    assert ((1 + small + small**2 / 2) - small.exp()).abs().max() < 0.3**3 / 6 * 1.1


def test_based_is_its_quadratic_form():
    """Which never builds the features; both maps; a temperature of sqrt(feature_dim), once."""
    full = build("based", dim=12, heads=2, feature_dim=4)
    small = build("based", dim=12, heads=2, feature_dim=4, compressed=True)
    x = tokens(2, 70, 12)
    s = heads(full.q_proj(x), 2) @ heads(full.k_proj(x), 2).mT / 2
    A = (1 + s + s**2 / 2).tril()
    want = full.o_proj(joined(A / A.sum(-1, keepdim=True) @ heads(full.v_proj(x), 2)))
    close(full(x)[0], want)
    close(small(x)[0], want)
    assert small.state_bytes(1) / full.state_bytes(1) == 15 / 21


def test_base_conv_is_a_gated_short_convolution():
    mixer, x = build("base_conv", dim=6), tokens(2, 9, 6)
    u, gate = mixer.in_proj(x).chunk(2, -1)
    before = torch.nn.functional.pad(u, (0, 0, 2, 0))
    conv = sum(before[:, j : j + 9] * mixer.conv.weight[..., j].flatten() for j in range(3))
    close(mixer(x)[0], mixer.o_proj(torch.nn.functional.silu(conv) * gate))


def test_base_conv_loads_the_authors_fused_layer():
    mixer, x = build("base_conv", dim=6, conv_bias=True), tokens(2, 9, 6)
    theirs = {n.replace("conv.", "conv.conv.").replace("o_proj", "out_proj"): t.clone()
              for n, t in mixer.state_dict().items()}  # fmt: skip
    assert "conv.conv.bias" in theirs
    mixer.load_state_dict(mixer.translate(theirs))
    u, gate = mixer.in_proj(x).chunk(2, -1)
    before = torch.nn.functional.pad(u, (0, 0, 2, 0))
    conv = sum(before[:, j : j + 9] * mixer.conv.weight[..., j].flatten() for j in range(3))
    y = torch.nn.functional.silu(conv + mixer.conv.bias) * gate
    close(mixer(x)[0], mixer.o_proj(y))


# Softmax attention


def softmax_by_hand(mixer, x: Tensor) -> Tensor:
    """Dense scores, every pair looked at."""
    T, H, K = x.shape[1], mixer.heads, mixer.head_dim
    q, k, v = (heads(p(x), p.out_features // K) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.q_norm is not None:
        q, k = (
            t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
            for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    if mixer.rope_theta:
        half = mixer.rope_dim // 2
        a = mixer.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.exp(1j * torch.arange(T)[:, None] * a)
        for t in (q, k):
            turned = torch.complex(t[..., :half], t[..., half : 2 * half]) * turn
            t[..., : 2 * half] = torch.cat([turned.real, turned.imag], -1)
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    ago = torch.arange(T)[:, None] - torch.arange(T)
    seen = ago >= 0
    if mixer.window:
        seen &= (ago < mixer.window) | (torch.arange(T) < mixer.sinks)
    scores = (q @ k.mT * mixer.scale).masked_fill(~seen, -torch.inf)
    return mixer.o_proj(joined(scores.softmax(-1) @ v))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_theta": None, "scale": 0.7},
        {"kv_heads": 1, "qk_norm": True, "rope_dim": 4, "bias": True, "out_bias": True},
        {"window": 5},
        {"window": 3, "sinks": 2},
        {"window": 1, "sinks": 4},
        {"window": 40, "sinks": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_softmax_is_its_dense_form(options):
    mixer, x = build("softmax", dim=12, heads=2, **options), tokens(2, 30, 12)
    close(mixer(x)[0], softmax_by_hand(mixer, x))


def test_window_as_wide_as_the_text_is_full_attention():
    x = tokens(2, 20, 12)
    close(
        build("softmax", dim=12, heads=2, window=20)(x)[0], build("softmax", dim=12, heads=2)(x)[0]
    )


def test_rotation_is_relative_and_no_rotation_has_no_order():
    x = tokens(1, 20, 12)
    turned = build("softmax", dim=12, heads=2)
    close(turned(x, positions=torch.arange(500, 520)[None])[0], turned(x)[0], 1e-8)
    mixed = torch.cat([x[:, torch.randperm(19)], x[:, 19:]], 1)
    for mixer in (
        build("softmax", dim=12, heads=2, rope_theta=None),
        build("mla", dim=12, heads=2, latent_dim=6, nope_dim=4, rope_dim=2, value_dim=5),
    ):
        close(mixer(mixed)[0][:, -1], mixer(x)[0][:, -1])
    assert not torch.allclose(turned(mixed)[0][:, -1], turned(x)[0][:, -1])


def test_rotation_leaves_the_features_beyond_its_width():
    x, positions = tokens(1, 5, 2, 8), torch.arange(5)[None]
    for layout, pair in (("half", (1, 3)), ("interleaved", (2, 3))):
        y = rotate(x, positions, rope_frequencies(4, 100.0, wide=True), layout=layout)
        assert torch.equal(y[..., 4:], x[..., 4:])
        assert torch.equal(y[:, 0], x[:, 0])
        turned = torch.complex(*(x[0, 3, 0, i] for i in pair)) * torch.exp(
            torch.tensor(0.3j, dtype=torch.complex128)
        )
        close(torch.stack([y[0, 3, 0, i] for i in pair]), torch.view_as_real(turned))


# The growing past


def decode(mixer, x: Tensor, first: int, **options):
    """The outputs and states of a prefill of ``first`` tokens and a decode of the others."""
    y, state = mixer(x[:, :first], **options)
    ys, states = [y], [state]
    for t in range(first, x.shape[1]):
        y, state = mixer(x[:, t : t + 1], state=state)
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), states


PASTS = {
    "full": ("softmax", {}),
    "window": ("softmax", {"window": 6}),
    "sinks": ("softmax", {"window": 6, "sinks": 3}),
    "mla": ("mla", {"latent_dim": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 5}),
}


@pytest.mark.parametrize("name", PASTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_in_place_is_the_full_forward(name, mode):
    """Across several growths of the buffer, with and without left padding, and a snapshot kept."""
    key, options = PASTS[name]
    mixer, x = build(key, dim=12, heads=2, **options), tokens(2, 230, 12)
    padding = torch.zeros(2, 230, dtype=torch.bool)
    padding[0, :4] = True
    with mode():
        whole, _ = mixer(x, padding=padding)
        y, _ = decode(mixer, x, 9, padding=padding[:, :9])
        close(y[0, 4:], whole[0, 4:])
        close(y[1], whole[1])
        _, states = decode(mixer, x[:, :30], 9)
        kept = states[-1].snapshot()
        for _ in range(2):
            y, _ = mixer(x[:, 30:31], state=kept.snapshot())
            close(y[1, 0], whole[1, 30])


def test_a_decoded_token_does_not_copy_the_past():
    mixer = build("softmax", dim=12, heads=2)
    with torch.no_grad():
        _, states = decode(mixer, tokens(2, 300, 12), 100)
    places = [s["k"].data_ptr() for s in states]
    assert len(set(places)) <= 7, "the buffer moves a few times, not at every token"
    assert states[-1].nbytes <= 1.3 * 2 * mixer.state_bytes(300, torch.float64) + 64 * 2 * 2 * 96


def test_a_window_keeps_its_memory_bounded():
    mixer, x = build("softmax", dim=12, heads=2, window=6), tokens(1, 700, 12)
    with torch.no_grad():
        _, states = decode(mixer, x, 500)
    held = [s.nbytes for s in states]
    assert states[0].nbytes == mixer.state_bytes(500, torch.float64) == 2 * 6 * 12 * 8
    assert max(held) <= 2 * (7 + 64) * 12 * 8


@pytest.mark.parametrize("name", ["full", "mla"])
def test_cropped_tokens_leave_no_trace(name):
    key, options = PASTS[name]
    mixer, x = build(key, dim=12, heads=2, **options), tokens(2, 20, 12)
    padding = torch.zeros(2, 15, dtype=torch.bool)
    padding[1, :3] = True
    with torch.no_grad():
        _, state = mixer(x[:, :15], padding=padding)
        want, _ = mixer(x[:, 15:], state=state.snapshot())
        _, state = mixer(tokens(2, 4, 12) + 1, state=state)
        state = state.crop(4)
        assert state.seen.tolist() == [15, 12]
        close(mixer(x[:, 15:], state=state)[0], want)


def test_a_window_cannot_be_cropped():
    _, state = build("softmax", dim=12, heads=2, window=6)(tokens(1, 9, 12))
    with pytest.raises(ValueError, match="crop needs a state that keeps its past"):
        state.crop(1)


@pytest.mark.parametrize("name", PASTS)
def test_packed_sequences_go_on_from_their_own_pasts(name):
    """Of different lengths, through several calls, one sequence still empty at first."""
    key, options = PASTS[name]
    mixer = build(key, dim=12, heads=2, **options)
    cuts = [[0, 9, 9, 20], [0, 2, 10, 17], [0, 1, 2, 3]]
    pasts, state = [None] * 3, None
    for cut in cuts:
        x = tokens(1, cut[-1], 12) + cut[1]
        y, state = mixer(x, state=state, cu_seqlens=torch.tensor(cut, dtype=torch.int32))
        for n, (a, b) in enumerate(pairwise(cut)):
            if a < b:
                alone, pasts[n] = mixer(x[:, a:b], state=pasts[n])
                close(y[:, a:b], alone)
    assert state.seen.tolist() == [12, 9, 19]


def test_packed_training_makes_no_rows():
    """A long sequence packed with many short ones costs no more memory than its tokens."""
    mixer, x = build("softmax", dim=12, heads=2), tokens(1, 80, 12)
    cu = torch.tensor([0, *range(1, 41), 80], dtype=torch.int32)
    with mock.patch.object(past, "_Packing") as rows:
        _, state = mixer(x, cu_seqlens=cu)
        assert not rows.called
    assert state["k"].shape == (41, 40, 2, 6)
    assert state.crop(1).seen.tolist() == [0] * 40 + [39]


# MLA


@pytest.mark.parametrize("theta", [None, 100.0])
def test_mla_absorbed_is_expanded(theta):
    sizes = {"dim": 12, "heads": 3, "latent_dim": 7, "nope_dim": 4, "rope_dim": 2, "value_dim": 5}
    x = tokens(2, 20, 12)
    absorbed, expanded, auto = (
        build("mla", **sizes, rope_theta=theta, form=form)
        for form in ("absorbed", "expanded", "auto")
    )
    want, _ = expanded(x)
    close(absorbed(x)[0], want)
    y, states = decode(auto, x, 8)
    close(y, want)
    assert states[-1]["latent"].shape == (2, 20, 9)


def test_mla_by_hand():
    """Kimi Linear's layer, written with explicit keys for every head; half of it rotated."""
    sizes = {"latent_dim": 7, "nope_dim": 4, "rope_dim": 4, "value_dim": 5}
    for theta in (None, 50.0):
        mixer, x = build("mla", dim=12, heads=3, rope_theta=theta, **sizes), tokens(2, 20, 12)
        c, r = mixer.kv_a_proj(x)[..., :7], mixer.kv_a_proj(x)[..., None, 7:].transpose(1, 2)
        c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
        own, v = heads(mixer.kv_b_proj(c), 3).split([4, 5], -1)
        q_own, q_r = heads(mixer.q_proj(x), 3).split([4, 4], -1)
        if theta:
            a = torch.tensor([1.0, 50.0**-0.5], dtype=torch.float64)
            turn = torch.exp(1j * torch.arange(20)[:, None] * a)
            q_r, r = (
                torch.view_as_real(
                    torch.view_as_complex(t.unflatten(-1, (2, 2)).contiguous()) * turn
                ).flatten(-2)
                for t in (q_r, r)
            )
        scores = (q_own @ own.mT + q_r @ r.mT) * 8**-0.5
        seen = torch.ones(20, 20, dtype=torch.bool).tril()
        o = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        close(mixer(x)[0], mixer.o_proj(joined(o)))


def test_mla_absorbs_for_few_queries():
    mixer = subquad.create_mixer("mla", dim=64, heads=2)
    assert mixer._absorbs(1, 1000)
    assert not mixer._absorbs(1000, 1000)
    assert mixer.state_bytes(10, torch.bfloat16) == 10 * 576 * 2


def test_one_mla_layer_in_four_keeps_a_quarter_of_the_cache():
    mla = subquad.create_mixer("mla", dim=64, heads=2)
    state = subquad.create_mixer("gated_deltanet", dim=64, heads=2)
    T = 1 << 24
    hybrid = mla.state_bytes(T) + 3 * state.state_bytes(T)
    assert math.isclose(hybrid / (4 * mla.state_bytes(T)), 0.25, rel_tol=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("softmax", {"heads": 3}, "heads must divide dim=16, got 3"),
        ("softmax", {"kv_heads": 3}, "kv_heads must divide heads=8, got 3"),
        ("softmax", {"window": 0}, "window must be a positive int, got 0"),
        ("softmax", {"window": -4}, "window must be a positive int, got -4"),
        ("softmax", {"sinks": 2}, "sinks need a window beside them, got sinks=2"),
        ("softmax", {"sinks": -1}, "sinks must be a non-negative int, got -1"),
        ("softmax", {"rope_dim": 3}, "rope_dim must be even"),
        ("softmax", {"rope_layout": "halves"}, "rope_layout must be one of .* did you mean 'half'"),
        ("mla", {"latent_dim": 0}, "latent_dim must be a positive int, got 0"),
        ("mla", {"rope_dim": 3, "rope_theta": 1e4}, "rope_dim must be even to be rotated, got 3"),
        ("mla", {"form": "fast"}, "form must be one of"),
        ("linear_attention", {"feature_map": "relo"}, "did you mean 'relu'"),
        ("linear_attention", {"feature_map": "dpfp", "feature_options": {"nu": 0}}, "nu must be"),
        ("linear_attention", {"feature_options": {"mu": 1}}, "options of feature_map 'elu'"),
        ("linear_attention", {"causal": False, "normalize": False}, "normalize must be True"),
        ("retnet", {"variant": "fla"}, "variant must be one of"),
        ("retnet", {"head_dim": 3}, "head_dim must be a positive even int, got 3"),
        ("retnet", {"score_norm": "all"}, "score_norm must be one of"),
        ("lightning", {"layer": 2, "layers": 2}, "layer must lie in 0..1, got 2"),
        ("lightning", {"preset": "papers"}, "did you mean 'paper'"),
        ("based", {"feature_dim": 0}, "head_dim must be a positive int, got 0"),
        ("base_conv", {"expand": 0}, "expand must be a positive int, got 0"),
        ("softmax", {"head": 2}, "options of mixer 'softmax'"),
        ("cca", {"goup": 4}, "did you mean 'group'"),
        ("cca", {"kv_head": 1}, "did you mean 'kv_heads'"),
    ],
    ids=str,
)
def test_bad_options_are_named(key, options, message):
    with pytest.raises(ValueError, match=message):
        subquad.create_mixer(key, dim=16, **options)
