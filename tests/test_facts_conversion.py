"""What the conversion mixers' definitions claim of them."""

import pytest
import torch

import subquad
from kit import close
from subquad.mixers.softmax import Softmax
from subquad.ops.kernel_attention import How, Near, mixed_attention
from subquad.ops.kernel_attention.near import places
from subquad.ops.kernel_attention.reference import mixed_weights

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
