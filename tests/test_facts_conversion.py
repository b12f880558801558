"""What the conversion mixers' definitions claim of them."""

import pytest
import torch

import subquad
from kit import close
from subquad.mixers.lightning import slopes
from subquad.mixers.parts.head_map import NormMap
from subquad.mixers.parts.past import Span
from subquad.mixers.sala import layer_importance, sparse_layers
from subquad.mixers.softmax import Softmax
from subquad.ops.kernel_attention import How, Near, mixed_attention
from subquad.ops.kernel_attention.near import places
from subquad.ops.kernel_attention.reference import mixed_weights
from subquad.ops.kernel_attention.saliency import saliency

NAMES = ("q", "k", "v", "phi_q", "phi_k")


def inputs(T=37, S=None, B=2, H=4, G=2, K=6, V=5, F=7, grad=False):
    torch.manual_seed(0)
    S = T if S is None else S
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, F), (B, S, H, F))
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[3:] = [t.exp() for t in made[3:]]
    return [t.requires_grad_(grad) for t in made]


def twins(key, dtype=torch.float64, **options):
    """A softmax layer and a mixer that holds its weights."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 4, "kv_heads": 2}
    teacher = subquad.create_mixer("softmax", **sizes).to(dtype)
    student = subquad.create_mixer(key, **sizes, **options).to(dtype)
    student.load_state_dict(teacher.state_dict(), strict=False)
    return teacher, student, torch.randn(2, 40, 16, dtype=dtype)


def context(mixer, x, **given):
    rest = dict.fromkeys(("state", "padding", "cu_seqlens", "positions", "grid"))
    return mixer._context(x, **{**rest, **given})


@pytest.mark.parametrize("layout", ["sliding", "terraced"])
class TestMixedAttention:
    def test_forms_and_gradients_agree(self, layout):
        """With padding, a past and each argument, at a window that no block divides."""
        given = inputs(grad=True)
        extra = [torch.rand(4, dtype=torch.float64), torch.rand(2, 37, 4, 5, dtype=torch.float64)]
        state = [torch.rand(2, 4, 7, 5).double(), torch.rand(2, 4, 7).double()]
        extra = [t.requires_grad_() for t in (*extra, *state)]
        found = []
        for backend in ("reference", "torch"):
            for starts in (None, torch.tensor([-20]), torch.tensor([-9, -40])):
                o, after = mixed_attention(
                    *given, near=Near(5, layout), weight=extra[0], gate=extra[1], eps=1e-6,
                    state=tuple(extra[2:]), starts=starts, backend=backend,
                )  # fmt: skip
                loss = o.square().sum() + sum(t.sin().sum() for t in after)
                found.append([o, *after, *torch.autograd.grad(loss, [*given, *extra])])
        for wanted, got in zip(found[:3], found[3:]):
            for a, b in zip(wanted, got):
                close(a, b)

    @pytest.mark.parametrize("window", [1, 3, 16, 50])
    def test_packed_sequences_are_alone(self, layout, window):
        q, k, v, phi_q, phi_k = inputs(T=60, B=1)
        cu = torch.tensor([0, 23, 23, 24, 60], dtype=torch.int32)
        for backend in ("reference", "torch"):
            o, (S, z) = mixed_attention(
                q, k, v, phi_q, phi_k, near=Near(window, layout), cu_seqlens=cu, backend=backend
            )
            for n, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:])):
                if a == b:
                    assert not S[n].any()
                    continue
                alone = [t[:, a:b] for t in (q, k, v, phi_q, phi_k)]
                want, (own_S, own_z) = mixed_attention(
                    *alone, near=Near(window, layout), backend="reference"
                )
                close(o[:, a:b], want)
                close(S[n], own_S[0])
                close(z[n], own_z[0])

    def test_packed_sequences_of_unequal_lengths_go_on(self, layout):
        """The shorter ones' rows hold tokens that the state has taken over."""
        _, mixer, x = twins("lolcats", window=3, layout=layout)
        x = x[:1]
        first = torch.tensor([0, 14, 17, 17], dtype=torch.int32)
        more = torch.tensor([0, 1, 9, 23], dtype=torch.int32)
        _, state = mixer(x[:, :17], cu_seqlens=first)
        got, _ = mixer(x[:, 17:], state=state, cu_seqlens=more)
        for n in range(3):
            own = x[:, first[n] : first[n + 1]], x[:, 17 + more[n] : 17 + more[n + 1]]
            want = mixer(torch.cat(own, 1))[0][:, own[0].shape[1] :]
            close(got[:, more[n] : more[n + 1]], want)

    def test_last_queries_of_many_keys(self, layout):
        q, k, v, phi_q, phi_k = inputs(T=12, S=50)
        want = mixed_attention(q, k, v, phi_q, phi_k, near=Near(4, layout), backend="reference")
        got = mixed_attention(q, k, v, phi_q, phi_k[:, :46], near=Near(4, layout))
        close(got[0], want[0])
        close(got[1], want[1])

    def test_rows_of_the_mask(self, layout):
        near = Near(4, layout)
        place = places(13, 13, How(near, 1.0), torch.device("cpu")).place[0]
        p, j = place[:, None], place
        exact = near.exact(p, j) & (j <= p)
        i = torch.arange(13)
        terraced = torch.where(i >= 4, i % 4 + 1 + 4, i + 1)
        sliding = (i + 1).clamp_max(4)
        assert torch.equal(exact.sum(1), terraced if near.terraced else sliding)
        assert near.pairs(13) == exact.sum()

    def test_refusals(self, layout):
        q, k, v, phi_q, phi_k = inputs()
        with pytest.raises(ValueError, match=r"L in 32\.\.37, got T=37, L=10"):
            mixed_attention(q, k, v, phi_q, phi_k[:, :10], near=Near(5, layout))
        with pytest.raises(ValueError, match=r"weight must have shape \[4\], got \[3\]"):
            mixed_attention(q, k, v, phi_q, phi_k, near=Near(5, layout), weight=torch.ones(3))
        with pytest.raises(ValueError, match="window must be a positive int, got 0"):
            Near(0, layout)


class TestChosen:
    def test_forms_and_gradients_agree(self):
        given = inputs(grad=True, G=2)
        chosen = torch.rand(2, 37, 4) > 0.7
        chosen &= (chosen.unflatten(1, (37, 1)).flatten(1, 2).cumsum(1) % 2).bool()
        kept = torch.randn(2, 9, 4, 6).double(), torch.randn(2, 9, 4, 5).double()
        kept = [t.requires_grad_() for t in kept]
        live = torch.rand(2, 9) > 0.3
        state = torch.rand(2, 4, 7, 5).double(), torch.rand(2, 4, 7).double()
        found = []
        for backend in ("reference", "torch"):
            for starts in (None, torch.tensor([-15]), torch.tensor([-15, -40])):
                o, after = mixed_attention(
                    *given, near=Near(5, "terraced"), chosen=chosen, per=5, eps=1e-6,
                    kept=(*kept, live), state=state, starts=starts, backend=backend,
                )  # fmt: skip
                loss = o.square().sum() + sum(t.sin().sum() for t in after)
                found.append([o, *after, *torch.autograd.grad(loss, [*given, *kept])])
        for wanted, got in zip(found[:3], found[3:]):
            for a, b in zip(wanted, got):
                close(a, b)


class TestLolcats:
    @pytest.mark.parametrize(("layout", "window"), [("sliding", 40), ("terraced", 20)])
    def test_a_long_window_is_softmax(self, layout, window):
        teacher, student, x = twins("lolcats", window=window, layout=layout, gamma=0.01)
        close(student(x)[0], teacher(x)[0])

    def test_without_gamma_it_is_linear_attention(self):
        """The own token's exact share vanishes beside the earlier ones'."""
        _, student, x = twins("lolcats", window=1, layout="sliding")
        torch.nn.init.constant_(student.window_factors, -30.0)
        got, _ = student.heads_out(x, context(student, x))
        q, k, v = student.qkv(x, context(student, x))
        phi_q, phi_k, _ = student.features(q, k)
        a = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k).tril(-1)[:, :, 1:]
        want = torch.einsum(
            "bhij,bjhv->bihv", a / a.sum(-1, keepdim=True), v.repeat_interleave(2, 2)
        )
        close(got[:, 1:], want, 1e-6)

    @pytest.mark.parametrize("layout", ["sliding", "terraced"])
    def test_weights_give_the_output(self, layout):
        _, student, x = twins("lolcats", window=6, layout=layout)
        padding = torch.zeros(2, 40, dtype=torch.bool)
        padding[0, :9] = True
        given = context(student, x, padding=padding)
        a = student.weights(x, given)
        assert (a >= 0).all()
        close(a[0, :, 9:].sum(-1), torch.ones_like(a[0, :, 9:, 0]))
        v = student.qkv(x, given)[2].repeat_interleave(2, 2)
        want = torch.einsum("bhij,bjhv->bihv", a, v)
        got, _ = student.heads_out(x, given)
        close(got[0, 9:], want[0, 9:])
        close(got[1], want[1])

    def test_gradients_of_the_transfer_loss(self):
        for window, linear in ((4, True), (20, False)):
            teacher, student, x = twins("lolcats", window=window)
            want, _ = teacher.heads_out(x, context(teacher, x))
            got, _ = student.heads_out(x, context(student, x))
            loss = (got - want.detach() + 0.1).square().mean()
            omega, W = student.window_factors, student.feature_map_q.weight
            of_omega, of_W = torch.autograd.grad(loss, (omega, W))
            assert bool((of_omega.abs() > 1e-12).any()) == linear
            assert bool((of_W.abs() > 1e-12).any()) == linear

    def test_only_the_exact_part_sees_the_scores(self):
        """A constant added to a row of scores changes nothing: here, a shift of all keys."""
        q, k, v, phi_q, phi_k = inputs(G=4)
        shift = torch.randn(6, dtype=torch.float64)
        want, _ = mixed_attention(q, k, v, phi_q, phi_k, near=Near(5))
        got, _ = mixed_attention(q, k + shift, v, phi_q, phi_k, near=Near(5))
        close(got, want)

    def test_decode_as_the_authors_do(self):
        """A terraced prefill, then a sliding window of w."""
        _, student, x = twins("lolcats", window=8, decode="sliding")
        _, slides, _ = twins("lolcats", window=8, layout="sliding")
        slides.load_state_dict(student.state_dict())
        y, state = student(x[:, :27])
        _, plain, _ = twins("lolcats", window=8)
        plain.load_state_dict(student.state_dict())
        close(y, plain(x[:, :27])[0])
        _, want_state = slides(x[:, :27])
        close(state["S"], want_state["S"])
        for t in range(27, 32):
            y, state = student(x[:, t : t + 1], state=state)
            want, want_state = slides(x[:, t : t + 1], state=want_state)
            close(y, want)

    @pytest.mark.parametrize("map_rotary", [True, False])
    def test_maps_that_know_no_place(self, map_rotary):
        """The same text further on: another output where the maps see the rotation only."""
        _, student, x = twins("lolcats", window=8, map_rotary=map_rotary)
        places = torch.arange(40).expand(2, -1)
        here, later = (student(x, positions=places + shift)[0] for shift in (0, 3000))
        assert torch.allclose(here[:, :16], later[:, :16])  # all near
        assert torch.allclose(here, later) is not map_rotary

    def test_state_does_not_grow(self):
        _, student, _ = twins("lolcats", window=8)
        assert student.state_bytes(10_000) == student.state_bytes(16)


def test_softmax_weights_give_the_output():
    teacher, _, x = twins("lolcats")
    assert type(teacher) is Softmax
    given = context(teacher, x)
    a, v = teacher.weights(x, given), teacher.qkv(x, given)[2].repeat_interleave(2, 2)
    close(torch.einsum("bhij,bjhv->bihv", a, v), teacher.heads_out(x, given)[0])
    with pytest.raises(ValueError, match="whole texts"):
        teacher.weights(x, context(teacher, x, state=teacher(x)[1]))


def test_weights_by_definition():
    """One row by hand: two near keys and one in the state."""
    q, k, _, phi_q, phi_k = inputs(T=3, B=1, H=1, G=1)
    a = mixed_weights(q, k, phi_q, phi_k, How(Near(2), 0.5))[0, 0, 2]
    s = 0.5 * (k[0, :, 0] @ q[0, 2, 0])
    top = s[1:].max()
    by_hand = torch.stack([phi_q[0, 2, 0] @ phi_k[0, 0, 0], *(s[1:] - top).exp()])
    close(a, by_hand / by_hand.sum())


@pytest.mark.parametrize("key", ["hedgehog", "lolcats", "still"])
def test_maps_of_queries_and_keys_begin_alike_and_learn_apart(key):
    options = {"feature_init": "kaiming"} if key == "hedgehog" else {}
    mixer = subquad.create_mixer(key, dim=16, heads=2, **options)
    a, b = (dict(m.named_parameters()) for m in (mixer.feature_map_q, mixer.feature_map_k))
    for name in a:
        assert torch.equal(a[name], b[name])
        assert a[name] is not b[name]


@pytest.mark.parametrize("key", ["hedgehog", "lawcat", "lolcats"])
def test_the_authors_names_load(key):
    options = {"hedgehog": {"feature_bias": False}, "lawcat": {"tied": False}}.get(key, {})
    mixer = subquad.create_mixer(key, dim=16, heads=2, **options)
    names = {f"feature_map_{n}.weight": f"feature_map_{n}.mlp.layer" for n in "qk"}
    names |= {f"{n}_conv.weight": f"{n}_conv1d.weight" for n in "qk"}
    theirs = {names.get(n, n): t for n, t in mixer.state_dict().items()}
    assert "feature_map_k.mlp.layer" in theirs
    mixer.load_state_dict(mixer.translate(theirs))


class TestHedgehog:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("feature_map", ["softmax_dim", "exp", "exp_dim"])
    def test_weights_are_shares(self, feature_map, causal):
        _, mixer, x = twins("hedgehog", feature_map=feature_map, causal=causal)
        given = context(mixer, x)
        a = mixer.weights(x, given)
        assert (a >= 0).all()
        close(a.sum(-1), torch.ones_like(a[..., 0]))
        if causal:
            close(a[:, :, 0, 0], torch.ones_like(a[:, :, 0, 0]))
        v = mixer.qkv(x, given)[2].repeat_interleave(2, 2)
        close(mixer.heads_out(x, given)[0], torch.einsum("bhij,bjhv->bihv", a, v))

    def test_the_stable_exponential_is_another_map(self):
        """A key's own factor does not cancel; a query's does where both halves share it."""
        found = {}
        for kind in ("exp", "exp_dim"):
            _, mixer, x = twins("hedgehog", feature_map=kind)
            found[kind] = mixer.weights(x, context(mixer, x))
        assert (found["exp"] - found["exp_dim"]).abs().max() > 1e-3

    def test_large_inputs_are_spiky(self):
        entropies = []
        for factor in (1.0, 4.0, 16.0):
            _, mixer, x = twins("hedgehog")
            torch.nn.init.normal_(mixer.q_proj.weight, std=0.3 * factor)
            torch.nn.init.normal_(mixer.k_proj.weight, std=0.3 * factor)
            a = mixer.weights(x, context(mixer, x)).detach()
            entropies.append(float(-(a * a.clamp_min(1e-12).log()).sum(-1).mean()))
        assert entropies == sorted(entropies, reverse=True)

    def test_distillation_copies_softmax(self):
        """Loss, entropy and order after 300 steps, beside elu + 1 and relu in as many."""
        results = {}
        for kind in ("softmax_dim", "elu", "relu"):
            results[kind] = distill(kind)
        learned = results["softmax_dim"]
        assert learned["losses"][-1] < learned["losses"][0]
        assert learned["losses"][-1] > learned["floor"]
        gap = {kind: r["losses"][-1] - r["floor"] for kind, r in results.items()}
        assert gap["softmax_dim"] < 0.5 * min(gap["elu"], gap["relu"])
        off = {kind: abs(r["entropy"] - r["floor"]) for kind, r in results.items()}
        assert off["softmax_dim"] < 0.5 * min(off["elu"], off["relu"])
        assert learned["order"] > 0.9
        assert learned["order"] > results["elu"]["order"]


def distill(kind):
    """Feature maps trained to copy the softmax weights of fixed queries and keys."""
    torch.manual_seed(0)
    mixer = subquad.create_mixer("hedgehog", dim=16, heads=2, head_dim=16, feature_map=kind)
    few = torch.randn(3, 16)  # directions that queries and keys lie in
    q, k = torch.randn(4, 24, 2, 3) @ few, torch.randn(4, 24, 2, 3) @ few
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / 4
    future = torch.ones(24, 24, dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    learned = [*mixer.feature_map_q.parameters(), *mixer.feature_map_k.parameters()]
    optimizer, losses = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0), []
    for _ in range(300):
        a = torch.einsum("bihf,bjhf->bhij", *mixer.features(q, k)).masked_fill(future, 0)
        a = a / (a.sum(-1, keepdim=True) + 1e-12)
        loss = -(p * a.clamp_min(1e-12).log()).sum(-1).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a = a.detach()
    ranks = [t[:, :, -1].argsort(-1).argsort(-1).float() for t in (a, scores)]
    centred = [r - r.mean(-1, keepdim=True) for r in ranks]
    order = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))

    def entropy(w):
        return float(-(w * w.clamp_min(1e-12).log()).sum(-1).mean())

    return {
        "losses": losses,
        "floor": entropy(p),
        "entropy": entropy(a),
        "order": float(order.mean()),
    }


class TestLawcat:
    def test_plain_convolution_and_no_gate_is_hedgehog_without_rotation(self):
        _, mixer, x = twins("lawcat")
        _, plain, _ = twins("hedgehog", features=2, feature_bias=False, rope_theta=None, eps=1e-10)
        with torch.no_grad():
            mixer.q_conv.weight[..., :-1] = 0
            mixer.k_conv.weight[..., :-1] = 0
            mixer.gk_proj[1].bias += 1e3
        close(mixer(x)[0], plain(x)[0], 1e-7)

    def test_a_constant_value_comes_back(self):
        _, mixer, x = twins("lawcat", bias=True)
        torch.nn.init.zeros_(mixer.v_proj.weight)
        torch.nn.init.constant_(mixer.v_proj.bias, 3.0)
        o, _ = mixer.heads_out(x, context(mixer, x))
        close(o, torch.full_like(o, 3.0), 1e-7)

    def test_a_strong_gate_leaves_the_present(self):
        _, mixer, x = twins("lawcat", gate_normalizer=1e-3)
        torch.nn.init.constant_(mixer.gk_proj[1].bias, -1.0)
        given = context(mixer, x)
        v = mixer.qkv(x, given)[2].repeat_interleave(2, 2)
        close(mixer.heads_out(x, given)[0], v, 1e-6)

    def test_the_scale_of_phi_q_cancels(self):
        _, mixer, x = twins("lawcat", feature_map="exp", tied=False, eps=0.0)
        want = mixer(x)[0]
        mixer.feature_map_q.register_forward_hook(lambda *args: 7.0 * args[-1])
        close(mixer(x)[0], want)

    @pytest.mark.parametrize("window", [0, 5])
    def test_weights(self, window):
        _, mixer, x = twins("lawcat", window=window)
        given = context(mixer, x)
        a = mixer.weights(x, given)
        assert (a >= 0).all()
        close(a.sum(-1), torch.ones_like(a[..., 0]), 1e-6)
        v = mixer.qkv(x, given)[2].repeat_interleave(2, 2)
        close(mixer.heads_out(x, given)[0], torch.einsum("bhij,bjhv->bihv", a, v))

    def test_old_tokens_fade(self):
        _, mixer, _ = twins("lawcat")
        x = torch.ones(1, 40, 16, dtype=torch.float64)
        a = mixer.weights(x, context(mixer, x))[:, :, -1, 4:]
        assert (a.diff() > 0).all()

    def test_it_begins_near_the_teacher(self):
        errors = {"identity": 0.0, "random": 0.0}
        for name in errors:
            teacher, mixer, x = twins("lawcat")
            if name == "random":
                for conv in (mixer.q_conv, mixer.k_conv):
                    torch.nn.init.normal_(conv.weight)
                torch.nn.init.normal_(mixer.feature_map_q.weight)
            want, _ = teacher.heads_out(x, context(teacher, x))
            got, _ = mixer.heads_out(x, context(mixer, x))
            errors[name] = float((got - want).square().mean())
        assert errors["identity"] < errors["random"]


class TestStill:
    def test_the_map_keeps_norms(self):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
        for features in (8, 12):
            n = NormMap(3, 8, features).double().directed(x)
            close(n.norm(dim=-1), x.norm(dim=-1))

    @pytest.mark.parametrize(("chunk", "ratio"), [(4, 1.0), (20, 0.25)])
    def test_all_salient_or_a_short_text_is_softmax(self, chunk, ratio):
        teacher, student, x = twins("still", chunk=chunk, ratio=ratio, eps=0.0)
        close(student(x)[0], teacher(x)[0])

    def test_none_salient_is_lolcats_with_its_map(self):
        _, student, x = twins("still", chunk=4, ratio=0.0, eps=0.0)
        _, plain, _ = twins("lolcats", window=4)
        student.g_proj.register_forward_hook(lambda *args: torch.full_like(args[-1], 1e4))
        plain.feature_map_q, plain.feature_map_k = student.feature_map_q, student.feature_map_k
        torch.nn.init.constant_(plain.window_factors, 1e4)
        close(student(x)[0], plain(x)[0])

    def test_only_salient_old_tokens_are_seen_beside_the_state(self):
        """With the gate shut, S is not read: a value changed shows where its token is salient."""
        _, student, x = twins("still", chunk=4, ratio=0.25)
        student.g_proj.register_forward_hook(lambda *args: torch.full_like(args[-1], -1e4))
        given = context(student, x)
        q, k, v = student.qkv(x, given)
        span = Span(given, {"k": k, "score": torch.zeros(2, 40, 4).double()})
        chosen = student._choose(q, k, span, given).chosen
        for j in range(8):
            values = v.clone()
            values[:, j] += 1.0
            outs = []
            for t in (v, values):
                student.qkv = lambda *_, t=t: (q, k, t)
                outs.append(student.heads_out(x, given)[0][:, -1])
            assert torch.equal((outs[0] - outs[1]).abs().amax(-1) > 1e-12, chosen[:, j])

    def test_scores(self):
        q = torch.zeros(1, 12, 1, 4, dtype=torch.float64)
        k = torch.zeros(1, 12, 1, 4, dtype=torch.float64)
        q[0, 9, 0, 0] = k[0, 9, 0, 0] = 30.0
        for kind in ("smooth", "paper"):
            score = saliency(q, k, 5, scale=1.0, kind=kind)[0, :, 0]
            assert score[0] == torch.inf
            assert score[1:].argmax() == 8
            uniform = score[4:9]
            close(uniform, uniform[:1].expand(5))
        a = torch.full((5,), 0.2, dtype=torch.float64) + 1e-8
        b = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]).double() + 1e-8
        close(uniform[0], ((a - 1e-8) * (a / b).log()).sum())

    def test_scores_read_the_last_tokens_only(self):
        torch.manual_seed(0)
        q, k = torch.randn(1, 23, 2, 4).double(), torch.randn(1, 23, 1, 4).double()
        for kind in ("smooth", "paper", "authors_chunk"):
            whole = saliency(q, k, 5, scale=0.5, kind=kind)
            if kind != "authors_chunk":
                part = saliency(q[:, -1:], k[:, -5:], 5, scale=0.5, kind=kind)
                close(part[0, 0], whole[0, -1])
            starts = torch.tensor([-5])
            part = saliency(q[:, 16:], k[:, 5:], 5, scale=0.5, kind=kind, starts=starts)
            close(part, whole[:, 16:])

    def test_the_chunk_of_zeros(self):
        """The authors' code lets chunk 0 see it: the outputs differ there, and not in chunk 1."""
        _, plain, x = twins("still", chunk=4, ratio=0.0)
        _, quirk, _ = twins("still", chunk=4, ratio=0.0, score="authors_chunk")
        quirk.load_state_dict(plain.state_dict())
        a, b = plain(x)[0], quirk(x)[0]
        assert (a - b)[:, :4].abs().amax(-1).min() > 1e-6
        close(a[:, 4:], b[:, 4:])
        given = context(plain, x)
        q, k, v = (t[:, :1] for t in plain.qkv(x, given))
        s = 0.5 * (q * k.repeat_interleave(2, 2)).sum(-1)
        top = s.clamp_min(0)
        share = (s - top).exp() / ((s - top).exp() + 4 * (-top).exp() + 1e-6)
        want = share[..., None] * v.repeat_interleave(2, 2)
        close(quirk.heads_out(x, given)[0][:, :1], want)

    def test_loads_the_authors_names(self):
        _, student, x = twins("still", chunk=4, features=3)
        want, ours = student(x)[0], student.state_dict()
        theirs = {"window_factors": torch.zeros(1, 4, 1, 1)}
        for name, t in ours.items():
            owner = name.partition(".")[0]
            if name.endswith("map_q.weight") or name.endswith("map_k.weight"):
                theirs |= {f"{owner}.mlp.linears.{h}.weight": w.mT for h, w in enumerate(t)}
            else:
                theirs[name.replace(".u", ".hh.u")] = t
        _, other, _ = twins("still", chunk=4, features=3)
        for p in other.parameters():
            torch.nn.init.zeros_(p)
        other.load_state_dict(other.translate(theirs))
        close(other(x)[0], want)

    def test_each_head_draws_its_own_map(self):
        weight = NormMap(4, 24, 8).weight.detach()
        assert (6 / 24) ** 0.5 * 0.9 < weight.abs().max() <= (6 / 24) ** 0.5

    def test_norms_help_the_transfer(self):
        """Beside the same map that sees directions alone."""
        errors = {}
        for name in ("still", "directions"):
            teacher, student, _ = twins("still", dtype=torch.float32, chunk=4, ratio=0.0)
            if name == "directions":
                for m in (student.feature_map_q, student.feature_map_k):
                    m.register_forward_pre_hook(
                        lambda _, args: torch.nn.functional.normalize(args[0], dim=-1)
                    )
            errors[name] = transfer(teacher, student)
        assert errors["still"] < errors["directions"]


def transfer(teacher, student, steps=100):
    """The last error of maps and gate trained to give the teacher's outputs; inputs of unequal
    length make some scores large."""
    with torch.no_grad():
        for layer in (teacher, student):
            layer.q_proj.weight.mul_(2)
            layer.k_proj.weight.mul_(2)
    new = [p for n, p in student.named_parameters() if n not in dict(teacher.named_parameters())]
    optimizer, errors = torch.optim.AdamW(new, lr=1e-2, weight_decay=0), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 32, 16, generator=generator)
        x = x * (1 + 2 * torch.rand(8, 32, 1, generator=generator))
        want, _ = teacher.heads_out(x, context(teacher, x))
        got, _ = student.heads_out(x, context(student, x))
        loss = (got - want.detach()).square().mean()
        errors.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(errors[-20:]) / 20


class TestSala:
    def test_slopes(self):
        close(slopes(8, wide=True), 2.0 ** -torch.arange(1.0, 9, dtype=torch.float64))
        want = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
        close(slopes(6, wide=True), torch.tensor(want, dtype=torch.float64))

    @pytest.mark.parametrize(("H", "G", "theta"), [(6, 2, 1e4), (4, 4, 1e6)])
    def test_token_by_token_under_the_authors_names(self, H, G, theta):
        torch.manual_seed(0)
        C, D, T = 12, 6, 21
        shapes = {
            "q_proj": (H * D, C), "k_proj": (G * D, C), "v_proj": (G * D, C), "z_proj": (H * D, C),
            "o_proj": (C, H * D), "q_norm": (D,), "k_norm": (D,), "o_norm": (H * D,),
        }  # fmt: skip
        w = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes.items()}
        mixer = subquad.create_mixer(
            "sala", dim=C, heads=H, kv_heads=G, head_dim=D, rope_theta=theta
        ).double()
        mixer.load_state_dict(mixer.translate({f"{n}.weight": t for n, t in w.items()}))
        x = torch.randn(2, T, C, dtype=torch.float64)

        def normed(t, weight):
            return t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

        def turned(t):
            angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0.0, D, 2).double() / D)
            cos, sin, (a, b) = angle.cos()[:, None], angle.sin()[:, None], t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, D)) for n in "qkv")
        q, k = turned(normed(q, w["q_norm"])), turned(normed(k, w["k_norm"]))
        k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
        S, outs = torch.zeros(2, H, D, D, dtype=torch.float64), []
        gate = (-slopes(H, wide=True)).exp()[:, None, None]
        for t in range(T):
            S = gate * S + k[:, t, :, :, None] * v[:, t, :, None]
            outs.append((D**-0.5 * q[:, t, :, None] @ S).flatten(1))
        o = normed(torch.stack(outs, 1), w["o_norm"]) * torch.sigmoid(x @ w["z_proj"].T)
        close(mixer(x)[0], o @ w["o_proj"].T)

    def test_the_authors_name_of_the_sparse_layers_gate(self):
        mixer = subquad.create_mixer("infllm_v2", dim=16, heads=4, out_gate=True)
        theirs = {n.replace("g_proj", "o_gate"): t for n, t in mixer.state_dict().items()}
        mixer.load_state_dict(mixer.translate(theirs))

    def test_without_decay_and_norms_it_is_linear_attention(self):
        teacher, mixer, x = twins("sala", decay=False, norm=False, qk_norm=False)
        mixer.g_proj.register_forward_hook(lambda *args: torch.full_like(args[-1], 1e4))
        q, k, v = teacher.qkv(x, context(teacher, x))
        a = 0.5 * torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(2, 2)).tril()
        want = torch.einsum("bhij,bjhv->bihv", a, v.repeat_interleave(2, 2))
        close(mixer.heads_out(x, context(mixer, x))[0], want)

    def test_positions(self):
        """Rotation shows differences only; a sparse layer has none to show."""
        sparse = {"rope_theta": None, "block": 4, "local": 0, "topk": 2, "dense_len": 0}
        for key, options in (("sala", {}), ("infllm_v2", sparse)):
            _, mixer, x = twins(key, **options)
            at = torch.arange(40)[None].expand(2, -1)
            close(mixer(x, positions=at)[0], mixer(x, positions=at + 1000)[0], 1e-7)

    @pytest.mark.parametrize("key", ["sala", "infllm_v2"])
    def test_gate(self, key):
        _, mixer, x = twins(key, **({} if key == "sala" else {"out_gate": True}))
        found = []
        for value in (1e4, -1e4):
            hook = mixer.g_proj.register_forward_hook(
                lambda *args, value=value: torch.full_like(args[-1], value)
            )
            found.append(mixer(x)[0])
            hook.remove()
        assert found[0].abs().min() > 0
        assert found[1].abs().max() == 0

    def test_sparse_off_is_dense_attention_without_positions(self):
        options = {"rope_theta": None, "block": 4, "local": 0, "topk": 2}
        _, sparse, x = twins("infllm_v2", dense_len=0, **options)
        _, dense, _ = twins("infllm_v2", dense_len=1000, **options)
        _, plain, _ = twins("softmax", rope_theta=None)
        for mixer in (sparse, plain):
            mixer.load_state_dict(dense.state_dict())
        close(dense(x)[0], plain(x)[0])
        assert (sparse(x)[0] - plain(x)[0]).abs().max() > 1e-6

    def test_logit_scaling_serves_inference(self):
        _, mixer, x = twins("infllm_v2", logit_scaling=500.0)
        _, plain, _ = twins("infllm_v2")
        plain.load_state_dict(mixer.state_dict())
        close(mixer.train()(x)[0], plain(x)[0])
        scaled = mixer.eval()(x)[0]
        close(scaled[:, 0], plain(x)[0][:, 0])
        assert (scaled - plain(x)[0])[:, 1:].abs().max() > 1e-6

    def test_the_plan(self):
        assert sparse_layers(32) == (0, 9, 16, 17, 22, 29, 30, 31)
        for depth in (1, 2, 3, 8, 24):
            plan = sparse_layers(depth)
            assert {0, depth - 1} <= set(plan)
            assert len(plan) == min(depth, max(2, depth // 4))

    def test_the_measure_of_layers(self):
        got = layer_importance([0.9, 0.5, 0.8], [0.6, 0.6, 0.5])
        assert got[0] == 0.0
        assert got[1] == 50.0
        assert abs(got[2] - 1.0) < 1e-6
        with pytest.raises(ValueError, match="one score a layer, got 1 and 2"):
            layer_importance([0.1], [0.1, 0.2])

    def test_first_alignment(self):
        """Error after the output projection, from the teacher's weights and from random ones."""
        errors = {}
        for name in ("teacher", "random"):
            teacher, student, _ = twins("sala", dtype=torch.float32, norm_eps=1e-5)
            if name == "random":
                torch.manual_seed(1)
                for layer in (student.q_proj, student.k_proj, student.v_proj, student.o_proj):
                    torch.nn.init.normal_(layer.weight, std=layer.weight.std().item())
            optimizer, errors[name] = torch.optim.AdamW(student.parameters(), lr=3e-3), []
            generator = torch.Generator().manual_seed(0)
            for _ in range(60):
                x = torch.randn(8, 32, 16, generator=generator)
                loss = (student(x)[0] - teacher(x)[0].detach()).square().mean()
                errors[name].append(float(loss.detach()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        start, end = errors["teacher"][0], sum(errors["teacher"][-5:]) / 5
        assert start < errors["random"][0]
        assert end < 0.5 * start
