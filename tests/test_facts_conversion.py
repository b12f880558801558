"""What the conversion mixers' definitions claim of them."""

import pytest
import torch

import subquad
from kit import close
from subquad.mixers.softmax import Softmax
from subquad.ops.kernel_attention import Near, mixed_attention
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

    def test_last_queries_of_many_keys(self, layout):
        q, k, v, phi_q, phi_k = inputs(T=12, S=50)
        want = mixed_attention(q, k, v, phi_q, phi_k, near=Near(4, layout), backend="reference")
        got = mixed_attention(q, k, v, phi_q, phi_k[:, :46], near=Near(4, layout))
        close(got[0], want[0])
        close(got[1], want[1])

    def test_rows_of_the_mask(self, layout):
        near = Near(4, layout)
        place, _ = places(13, None, None, torch.device("cpu"))
        p, j = place[0, :, None], place[0]
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
    a = mixed_weights(q, k, phi_q, phi_k, near=Near(2), scale=0.5)[0, 0, 2]
    s = 0.5 * (k[0, :, 0] @ q[0, 2, 0])
    top = s[1:].max()
    by_hand = torch.stack([phi_q[0, 2, 0] @ phi_k[0, 0, 0], *(s[1:] - top).exp()])
    close(a, by_hand / by_hand.sum())
