import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import mask
from subquad.ops.attention import attention
from subquad.ops.select import block_mass, cover, halving, pool, top, window_mass


def golden(shared, key):
    from safetensors.torch import load_file

    path = shared / "golden" / f"{key}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden vectors for {key}")
    return load_file(path)


@pytest.mark.parametrize("kind", ["mean", "max", "min", "sum"])
def test_pool_covers_every_token(kind):
    x = torch.randn(2, 21, 3, 4, dtype=torch.float64)
    got = pool(x, 8, kind=kind)
    assert got.shape == (2, 3, 3, 4)
    reduce = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}[kind]
    for n in range(3):
        torch.testing.assert_close(got[:, n], reduce(x[:, 8 * n : 8 * n + 8], 1))
    windows = pool(x, 8, stride=3, kind=kind)
    assert windows.shape[1] == (21 - 8) // 3 + 1
    torch.testing.assert_close(windows[:, 2], reduce(x[:, 6:14], 1))
    assert pool(x[:, :5], 8, stride=3).shape[1] == 0
    assert pool(x[:, :5], 8, kind=kind).shape[1] == 1


def dense_probabilities(q, k, causal, offset):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[3] ** -0.5
    if causal:
        s = s.masked_fill(~mask.causal().dense(q.shape[1], k.shape[1], offset), -torch.inf)
    return s.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(29, 29), (7, 40), (1, 17)])
def test_block_mass_is_the_probabilities_by_blocks(causal, T, S, monkeypatch):
    monkeypatch.setattr("subquad.ops.select.score.CHUNK", 1000)
    q, k = torch.randn(2, T, 4, 8).double(), torch.randn(2, S, 2, 8).double()
    p = dense_probabilities(q, k, causal, S - T)
    for rows, size in ((8, 8), (4, 16)):
        padded = torch.nn.functional.pad(p, (0, -S % size, 0, -T % rows))
        by_block = padded.unflatten(3, (-1, size)).unflatten(2, (-1, rows))
        got = block_mass(q, k, size, rows=rows, causal=causal)
        torch.testing.assert_close(got, by_block.sum((3, 5)))
        got = block_mass(q, k, size, rows=rows, causal=causal, reduce="max")
        torch.testing.assert_close(got, by_block.amax((3, 5)))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_top_keeps_what_is_forced_and_what_is_best(data):
    R, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    rows, offset = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9))
    sinks, local = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    n = -(-(R * rows + offset) // size)
    k = data.draw(st.integers(max(1, sinks + local), n + 5))
    scores = torch.randn(
        2, R, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    options = {"size": size, "rows": rows, "sinks": sinks, "local": local, "offset": offset}
    index = top(scores, k, **options)
    share = cover(scores.exp(), 0.6, most=k, **options)
    mask.blocks(index, size, rows)  # rising, -1 at the end
    mask.blocks(share, size, rows)
    for b in range(2):
        for r in range(R):
            diagonal = (r * rows + rows - 1 + offset) // size
            may = set(range(min(n, diagonal + 1)))
            forced = may & (set(range(sinks)) | set(range(diagonal - local + 1, diagonal + 1)))
            kept = {x for x in index[b, r].tolist() if x >= 0}
            assert forced <= kept <= may
            assert len(kept) == min(k, len(may))
            left, taken = may - kept, kept - forced
            if left and taken:
                assert max(scores[b, r, list(left)]) <= min(scores[b, r, list(taken)])
            covered = {x for x in share[b, r].tolist() if x >= 0}
            assert forced <= covered <= may
            own = scores[b, r].exp()
            total = float(own[list(may)].sum())
            if len(covered) < min(k, len(may)):
                assert float(own[list(covered)].sum()) >= 0.6 * total - 1e-5
            free = covered - forced
            if free and len(covered) > 1:
                least = min(free, key=lambda x: own[x])
                assert float(own[list(covered - {least})].sum()) < 0.6 * total + 1e-5


def test_budgets_that_keep_everything():
    scores = torch.rand(1, 3, 5, 5)
    everything = mask.blocks(top(scores, 9, size=4), 4).dense(20, 20)
    assert torch.equal(
        everything[0, 0], mask.blocks(cover(scores, 1.0, size=4), 4).dense(20, 20)[0, 0]
    )
    tril = torch.ones(5, 5).tril().repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    assert torch.equal(everything[0, 0], tril)
    assert (cover(scores, 0.0, size=4, local=1)[..., 1:] == -1).all()


def test_infllm_masses_are_the_authors(shared):
    g = golden(shared, "infllm_v2")
    q, k = g["q"][None], g["k"][None]
    k1, k2 = pool(k, 32, stride=16), pool(k, 128, stride=64)
    torch.testing.assert_close(k1[0], g["k1"])
    torch.testing.assert_close(k2[0], g["k2"])
    exact = window_mass(q, k1, 32, 16)
    torch.testing.assert_close(exact[0], g["score_exact"], rtol=1e-4, atol=1e-6)
    approx = window_mass(q, k1, 32, 16, by=(k2, 128, 64))
    torch.testing.assert_close(approx[0], g["score_lse_approx"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "keep", "rows", "size", "window"), [("a", 32, 10, 1, 16), ("b", 12, 25, 4, 20)]
)
def test_halving_finds_the_authors_blocks(shared, name, keep, rows, size, window):
    g = golden(shared, "hip")
    q, k = g["q"].transpose(0, 1)[None], g["k"].transpose(0, 1)[None]
    got = halving(q, k, keep, rows=rows, size=size, window=window)[0]
    want, count = g[f"indices.{name}"], g[f"ks.{name}"]
    for n in range(2):
        for r in range(want.shape[1]):
            found = got[n, r][got[n, r] >= 0] * size
            assert found.tolist() == want[n, r, : int(count[n, r])].tolist(), (n, r)


def test_halving_finds_a_single_peak():
    """Scores with one peak: the best block is always reached."""
    S, K = 512, 8
    angle = torch.linspace(0, math.pi, S)
    k = torch.zeros(1, S, 1, K)
    k[0, :, 0, 0], k[0, :, 0, 1] = angle.cos(), angle.sin()
    for peak in (3, 100, 257, 480):
        q = torch.zeros(1, 1, 1, K)
        q[0, 0, 0, 0], q[0, 0, 0, 1] = angle[peak].cos(), angle[peak].sin()
        for center in (True, False):
            got = halving(q, k, 16, rows=1, center=center)
            assert peak in got[0, 0, 0].tolist()
    few = halving(q, k[:, :9], 16, rows=1)[0, 0, 0]
    assert few.tolist() == [*range(9), *[-1] * 7]


def test_a_choice_feeds_attention():
    q, k, v = (torch.randn(1, 96, h, 8) for h in (4, 2, 2))
    index = top(block_mass(q, k, 16), 3, size=16, sinks=1, local=1)
    o = attention(q, k, v, mask.blocks(index, 16) & mask.causal())
    want = attention(q, k, v, mask.blocks(index, 16) & mask.causal(), backend="reference")
    torch.testing.assert_close(o, want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, q: top(s, 0, size=4), "k must be a positive"),
        (lambda s, q: top(s, 1, size=4, sinks=1, local=1), "k must hold the 1 sinks and 1 local"),
        (lambda s, q: top(s, 3, size=4, sinks=-1), "sinks must be a non-negative"),
        (lambda s, q: cover(s, 1.5, size=4), "mass must lie in 0..1, got 1.5"),
        (lambda s, q: pool(q, 4, kind="median"), "kind must be one of"),
        (lambda s, q: pool(q, 0), "size must be a positive"),
        (lambda s, q: pool(s, 2), "x must be"),
        (lambda s, q: block_mass(q, q, 4, reduce="mean"), "reduce must be one of"),
        (lambda s, q: block_mass(q, q[..., :3], 4), "k must have K=8"),
        (lambda s, q: halving(q, q, 4, rows=0), "rows must be a positive"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.rand(3, 5, 5), torch.rand(1, 12, 2, 8))
