"""What must hold of SLA: limits, the dense definition, states of blocks, gradients, a toy fit."""

import pytest
import torch
import torch.nn.functional as F

from kit import close, in_the_interpreter
from subquad import create_mixer
from subquad.ops.attention.chosen_rows import chosen_rows
from subquad.ops.backend import interpreted
from subquad.ops.kernel_attention import bidirectional
from subquad.ops.kernel_attention.marginal import PHI, marginal, states


def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def mixer(**options):
    torch.manual_seed(3)
    return create_mixer("sla", **{"dim": 16, "heads": 2, "block": 8, **options}).double()


def trained(made):
    """W and b of a layer that has learned."""
    with torch.no_grad():
        for seed, p in enumerate(made.linear_proj.parameters()):
            p.copy_(randn(*p.shape, seed=seed + 7))
    return made


def softmax_of(made):
    twin = create_mixer("softmax", dim=16, heads=2, causal=False, rope_theta=None).double()
    twin.load_state_dict(made.state_dict(), strict=False)
    return twin


def qkv(made, x):
    layers = made.q_proj, made.k_proj, made.v_proj
    return [layer(x).unflatten(-1, (-1, made.head_dim)) for layer in layers]


def dense(q, k, v, W, b, *, bq, bk, topk, kl, phi, variant="paper"):
    """The sheet of the paper by masks ``[T,T]``, one head and one row of blocks at a time."""
    o = torch.empty_like(q)
    for n in range(q.shape[0]):
        for h in range(q.shape[2]):
            Q, K, V = q[n, :, h], k[n, :, h], v[n, :, h]
            means = torch.stack([part.mean(0) for part in (K - K.mean(0)).split(bk)])
            N = len(means)
            c, low = max(1, int(topk * N)), int(kl * N)
            for m, rows in enumerate(Q.split(bq)):
                order = (means @ rows.mean(0)).argsort(descending=True).tolist()
                kinds = torch.zeros(N, dtype=torch.int64)
                kinds[order[:c]] = 2
                kinds[order[c : N - low]] = 1
                kinds = kinds.repeat_interleave(bk)[: len(K)]
                s = (rows @ K.T * K.shape[1] ** -0.5).masked_fill(kinds != 2, -torch.inf)
                part = phi(rows) @ phi(K).T
                if variant == "paper":
                    part = part * (kinds == 1)
                linear = part @ V / (part.sum(1, keepdim=True) + 1e-5)
                o[n, m * bq : m * bq + len(rows), h] = s.softmax(-1) @ V + linear @ W.T + b
    return o


# 1 to 8: the sheet's list


def test_all_blocks_critical_is_softmax_and_the_bias():
    made, x = trained(mixer(topk=1.0)), randn(2, 37, 16)
    o = F.linear(made.linear_proj.bias.repeat(2), made.o_proj.weight)
    close(made(x)[0], softmax_of(made)(x)[0] + o)


def test_fresh_w_is_block_sparse_softmax():
    made, x = mixer(topk=0.4), randn(2, 37, 16)
    q, k, v = qkv(made, x)
    o = chosen_rows(q, k, v, made.choose(q, k)[0], 8)
    close(made(x)[0], made.o_proj(o.flatten(-2)))


def test_nothing_critical_and_w_one_is_linear_attention(monkeypatch):
    made, x = mixer(negligible=0.0), randn(2, 37, 16)
    with torch.no_grad():
        made.linear_proj.weight.copy_(torch.eye(8))
    q, k, v = qkv(made, x)
    index, rest = made.choose(q, k)
    nothing = torch.full_like(index, -1), torch.ones_like(rest)
    monkeypatch.setattr(made, "choose", lambda q, k: nothing)
    o = bidirectional(q.softmax(-1), k.softmax(-1), v, "divide", scale=1.0, eps=1e-5 / 37)
    close(made(x)[0], made.o_proj(o.flatten(-2)))


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize(
    ("T", "bq", "bk", "variant"), [(37, 8, 8, "paper"), (37, 16, 4, "paper"), (40, 8, 8, "main")]
)
def test_definition(T, bq, bk, variant, phi):
    made = trained(
        mixer(block=bk, query_block=bq, topk=0.3, negligible=0.2, feature_map=phi, variant=variant)
    )
    x = randn(2, T, 16).requires_grad_()
    W, b = made.linear_proj.weight, made.linear_proj.bias
    how = {"bq": bq, "bk": bk, "topk": 0.3, "kl": 0.2, "phi": PHI[phi], "variant": variant}
    want = made.o_proj(dense(*qkv(made, x), W, b, **how).flatten(-2))
    found = made(x)[0]
    close(found, want)
    over = [x, *made.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), over) for y in (found, want)]
    for got, expected in zip(*grads, strict=True):
        close(got, expected)


def test_sum_less_the_critical_is_the_marginal():
    q, k, v = (randn(2, 50, 2, 6, seed=s).float() for s in range(3))
    read = torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    h, z = states(k.softmax(-1), v, 8)
    left = (~read).float()
    S = h.sum(2, keepdim=True) - (left @ h.flatten(3)).view(2, 2, 7, 6, 6)
    Z = z.sum(2, keepdim=True) - left @ z
    own = F.pad(q.softmax(-1), (0, 0, 0, 0, 0, 6)).transpose(1, 2).unflatten(2, (7, 8))
    want = own @ S / ((own @ Z[..., None]).clamp_min(0) + 1e-5)
    close(marginal(q, k, v, read, 8), want.flatten(2, 3)[:, :, :50].transpose(1, 2), 1e-4)


def test_moving_whole_key_blocks_changes_nothing():
    made = trained(mixer(topk=0.3, negligible=0.2))
    q, k, v = (randn(1, 40, 2, 8, seed=s) for s in range(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    found = []
    for i in (torch.arange(5), order):
        own = [t.unflatten(1, (5, 8))[:, i].flatten(1, 2) for t in (k, v)]
        index, rest = made.choose(q, own[0])
        o = marginal(q, *own, rest, 8)
        found.append(chosen_rows(q, *own, index, 8) + made.linear_proj(o))
    close(*found)


def test_gradients_at_the_start():
    made, x = mixer(topk=0.3), randn(2, 37, 16)
    W = made.linear_proj.weight
    y = made(x)[0]
    assert torch.autograd.grad(y.square().sum(), W)[0].abs().max() > 1e-3
    q, k, v = (t.detach().requires_grad_() for t in qkv(made, x))
    linear = marginal(q, k, v, made.choose(q, k)[1], 8) @ W.T
    for g in torch.autograd.grad(linear.square().sum() + linear.sum(), (q, k, v)):
        assert g.abs().max() == 0


def test_toy_fit():
    """Three layers learn what softmax attention reads; a fifth of the pairs is left to two."""
    torch.manual_seed(0)
    teacher = create_mixer("softmax", dim=32, heads=1, causal=False, rope_theta=None)
    with torch.no_grad():
        for p in (teacher.q_proj.weight, teacher.k_proj.weight):
            p.mul_(2.5)
    students, errors = {}, {}
    for name in ("both", "sparse", "linear"):
        made = create_mixer("sla", dim=32, heads=1, block=16, topk=0.2, negligible=0.0)
        made.load_state_dict(teacher.state_dict(), strict=False)
        if name == "sparse":
            made.linear_proj.requires_grad_(False)
        if name == "linear":
            torch.nn.init.eye_(made.linear_proj.weight)
            made.choose = lambda q, k, own=made.choose: nothing_critical(*own(q, k))
        learns = [p for p in made.parameters() if p.requires_grad]
        students[name] = made, torch.optim.Adam(learns, 1e-3)
    for step in range(200):
        x = images(4, step)
        with torch.no_grad():
            want = teacher(x)[0]
        for name, (made, optimizer) in students.items():
            error = (made(x)[0] - want).square().mean() / want.square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.setdefault(name, []).append(error.item())
    last = {name: sum(e[-20:]) / 20 for name, e in errors.items()}
    assert last["both"] < 0.9 * last["sparse"], last
    assert last["both"] < 0.9 * last["linear"], last


def nothing_critical(index, rest):
    return torch.full_like(index, -1), torch.ones_like(rest)


def images(n, seed):
    """Tokens of 16 x 16 images that vary slowly, ``[n,256,32]``."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 32, 4, 4, generator=g)
    x = F.interpolate(coarse, (16, 16), mode="bilinear") + 0.3 * torch.randn(
        n, 32, 16, 16, generator=g
    )
    return x.flatten(2).mT


@pytest.mark.parametrize("T", [1, 8, 9, 200])
def test_counts(T):
    made = mixer(topk=0.05, negligible=0.1)
    N = -(-T // 8)
    index, rest = made.choose(*(randn(1, T, 2, 8, seed=s) for s in range(2)))
    assert index.shape[-1] == max(1, int(0.05 * N))
    assert (rest.sum(-1) == N - index.shape[-1] - int(0.1 * N)).all()
    assert not rest.gather(-1, index.long()).any()
    assert (index.diff(dim=-1) > 0).all()
    assert made(randn(1, T, 16))[0].isfinite().all()


def test_ties_are_read_once():
    made = mixer(topk=0.4, negligible=0.4)
    index, rest = made.choose(torch.zeros(1, 40, 2, 8), torch.ones(1, 40, 2, 8))
    assert (rest.sum(-1) == 1).all()
    assert (index == torch.tensor([0, 1])).all()


def test_grouped_heads_are_repeated_ones():
    q, k, v = randn(2, 21, 4, 6), randn(2, 21, 2, 6, seed=1), randn(2, 21, 2, 5, seed=2)
    index = torch.tensor([[0, 2], [1, -1], [-1, -1]]).expand(2, 4, 3, 2).clone()
    index[1, 3] = torch.tensor([[2, -1], [0, 1], [1, 2]])
    read = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    wide = [t.repeat_interleave(2, 2) for t in (k, v)]
    o = chosen_rows(q, k, v, index, 8)
    close(o, chosen_rows(q, *wide, index, 8))
    assert (o[0, 16:] == 0).all()
    close(marginal(q, k, v, read, 8), marginal(q, *wide, read, 8))


def test_blocks_of_queries_in_turns(monkeypatch):
    q, k, v = (randn(2, 37, 2, 6, seed=s).requires_grad_() for s in range(3))
    index = torch.tensor([0, 3]).expand(2, 2, 5, 2)
    found = []
    for copied in (1 << 24, 1000):
        monkeypatch.setattr("subquad.ops.attention.chosen_rows.COPIED", copied)
        o = chosen_rows(q, k, v, index, 8)
        found.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 1.5}, "topk must be a part of the blocks, in 0..1, got 1.5"),
        ({"negligible": -0.1}, "negligible must be a part"),
        ({"block": 0}, "block must be a positive int, got 0"),
        ({"feature_map": "sofmax"}, "did you mean 'softmax'"),
        ({"variant": "paper2"}, "did you mean 'paper'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        mixer(**options)
    assert message in str(error.value)


def test_bad_inputs():
    q, k, v = (randn(1, 20, 2, 6, seed=s) for s in range(3))
    index = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="index must list 3 blocks of 8 queries, got 2"):
        chosen_rows(q, k, v, index, 8)
    with pytest.raises(ValueError, match=r"read must have shape \[1, 2, 3, 3\]"):
        marginal(q, k, v, torch.ones(1, 2, 2, 3, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match="takes no state, padding or cu_seqlens"):
        mixer()(randn(1, 4, 16), padding=torch.zeros(1, 4, dtype=torch.bool))


# The sparse branch on the GPU kernels, run by Triton's interpreter


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    in_the_interpreter(__file__, "-k", "on_kernels")


@pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("phi", "dtype", "shape"),
    [
        ("softmax", torch.float32, (70, 37, 4, 2, 12, 20, 32, 16)),
        ("elu", torch.bfloat16, (70, 37, 4, 2, 12, 20, 32, 16)),
        ("relu", torch.float32, (20, 21, 1, 1, 16, 16, 8, 8)),
        ("softmax", torch.bfloat16, (130, 100, 1, 1, 16, 16, 128, 70)),
    ],
)
def test_linear_part_on_kernels(phi, dtype, shape):
    T, S, H, G, K, V, rows, size = shape
    q, k, v = randn(2, T, H, K), randn(2, S, G, K, seed=1), randn(2, S, G, V, seed=2)
    do = randn(2, T, H, V, seed=3).float()
    read = torch.rand(
        2, H, -(-T // rows), -(-S // size), generator=torch.Generator().manual_seed(0)
    )
    read = read < 0.6
    read[0, 0, 0] = False
    found = []
    for kind in (dtype, torch.float64):
        own = [t.to(dtype).to(kind).requires_grad_() for t in (q, k, v)]
        o = marginal(*own, read, size, rows=rows, phi=phi)
        o.backward(do.to(o.dtype))
        found.append([o.detach(), *(t.grad for t in own)])
    assert (found[0][0][0, :rows, 0] == 0).all()
    for got, want in zip(*found, strict=True):
        limit = 1e-5 if dtype == torch.float32 or got.dtype != dtype else 4e-3
        assert (got.double() - want).norm() < limit * want.norm()


@pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize(("T", "bq", "bk"), [(40, 32, 16), (70, 64, 64)])
def test_layer_on_kernels(T, bq, bk):
    wide = trained(mixer(block=bk, query_block=bq, topk=0.4))
    narrow = mixer(block=bk, query_block=bq, topk=0.4).float()
    narrow.load_state_dict(wide.state_dict())
    found = []
    for made in (narrow, wide):
        x = randn(2, T, 16).to(made.o_proj.weight.dtype).requires_grad_()
        y = made(x)[0]
        y.square().sum().backward()
        found.append((y.detach().double(), x.grad.double()))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()
