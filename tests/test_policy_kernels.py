"""The kernels of the policies in Triton's interpreter: the same as without them."""

import pytest
import torch

from kit import in_the_interpreter
from subquad.ops.attention import token
from subquad.ops.backend import interpreted
from subquad.ops.select import pages, top
from subquad.policies import quest
from subquad.policies.base import Call, Site, create_policy
from subquad.policies.parts import lines

inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")


def test_in_the_interpreter():
    in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize(("T", "S", "M"), [(211, 211, 16), (60, 211, 32), (20, 70, 64)])
def test_diagonals(T, S, M, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def drawn(n):
        order = torch.rand(2, 2, S, generator=generator).argsort(-1)
        return order[..., :n].sort(-1).values

    columns, distances = drawn(40), drawn(25)
    found = lines.blocks(columns, distances, T, S, M)
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    for a, b in zip(found, lines.blocks(columns, distances, T, S, M), strict=True):
        assert torch.equal(lines.trimmed(a.long()), b)


@inside
@pytest.mark.parametrize(("L", "S", "window"), [(64, 211, None), (90, 300, 70), (30, 30, None)])
def test_last_rows(L, S, window):
    torch.manual_seed(0)
    q, k = torch.randn(2, L, 4, 24), torch.randn(2, S, 2, 24)
    found = lines.last_rows(q, k, 0.3, window)
    torch.testing.assert_close(found, lines.last_rows(q.double(), k.double(), 0.3, window).float())


@inside
@pytest.mark.parametrize(("v", "s"), [(10, 12), (3, 70), (500, 1)])
def test_best_lines(v, s):
    """Many equal sums, more asked for than there are, forced ones among them and beyond."""
    sums = torch.randint(0, 9, (2, 2, 3, 211), generator=torch.Generator().manual_seed(v)).float()
    found = lines.best(sums, (v, 4), (s, 20))
    for score, n, forced, own in zip(sums, (v, s), (4, 20), found, strict=True):
        score = score.clone()
        score[..., : min(forced, n)] = torch.inf
        order = score.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        assert torch.equal(own, order.sort(-1).values.int())


@inside
@pytest.mark.parametrize(("T", "S"), [(150, 150), (60, 170)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_topk", {"block": 8, "topk": 4}),
        ("block_topk", {"block": 5, "topk": 3, "variant": "minference"}),
        ("flexprefill", {"gamma": 0.8, "tau": 0.0, "block": 16, "unit": 16, "min_budget": 16}),
        ("flexprefill", {"gamma": 0.6, "tau": 0.0, "block": 16, "unit": 4, "min_budget": 32,
                         "max_budget": 64}),
        ("flexprefill", {"gamma": 0.5, "tau": 0.6, "block": 16, "unit": 16, "min_budget": 16}),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_choose(name, options, T, S):
    """The kernels' blocks are those of the definition."""
    torch.manual_seed(0)
    policy = create_policy(name, **options)
    q, k = torch.randn(2, T, 4, 16), torch.randn(2, S, 2, 16)
    scale = () if name == "block_topk" else (0.5,)
    found = policy.select(q, k, *scale)
    want = policy.select(q.double(), k.double(), *scale)
    assert torch.equal(lines.trimmed(found.long()), lines.trimmed(want.long()))


@inside
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40, 90])
def test_top(k, causal):
    """Many equal scores, some that are never taken."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-3, 4, (1, 2, 12, 70), generator=generator).float()
    scores[..., 3] = -torch.inf
    options = {"size": 16, "rows": 8, "causal": causal, "sinks": int(k > 2), "offset": 20}
    options["local"] = 2 * options["sinks"]
    want = top(scores.double(), k, **options)
    assert torch.equal(top(scores, k, **options), want)


@inside
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("options", [{}, {"variant": "frontier"}, {"page": 5, "budget": 20}])
def test_quest(options, window, monkeypatch):
    """Pages that fill up token by token; the model's own window bites."""
    torch.manual_seed(0)
    policy = quest.Quest(**{"budget": 32, "page": 8, "dense_layers": 0, **options})
    site, S = Site(0, 1, 4, 2, 24, window), 101
    q, k, v = (torch.randn(2, S, n, 24) for n in (4, 2, 2))

    def answers():
        layer, out = policy.layer(site), []
        for a, b in ((0, 90), *((t, t + 1) for t in range(90, S))):
            new = q[:, a:b], k[:, a:b], v[:, a:b]
            layer.update(*(x.transpose(1, 2) for x in new[1:]))
            places = torch.arange(a, b).expand(2, -1)
            if b - a == 1:
                out.append(policy.decode(Call(site, *new, layer, 0.2, None, places, None)))
        return torch.cat(out, 1)

    found = answers()
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    torch.testing.assert_close(found, answers())


@inside
@pytest.mark.parametrize(
    "name", ["full", "quest", "quest, frontier", "duo", "streaming", "streaming, filling"]
)
def test_counted_on_the_device(name, monkeypatch):
    """A token's kernels with its place in a tensor; memory that runs out and grows."""
    from policy_kit import tiny
    from test_steps import CASES, answer

    model = tiny().float()
    found, _ = answer(model, CASES[name](), counted=True, B=1, new=8)
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    want, _ = answer(model, CASES[name](), counted=False, B=1, new=8)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@inside
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize(("tokens", "P"), [(5, 25), (16, 25), (17, 25), (320, 25), (3000, 200)])
def test_best_pages(tokens, P, current):
    """Many equal scores, fewer pages than asked for or sets of them than pages, a window, pages
    that nobody wrote."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randint(-1, 2, (2, 4, 16), generator=generator).float()
    low = torch.randint(-1, 1, (2, P, 2, 16), generator=generator).float()
    high = low + 1
    there, window = -(-tokens // 16), 130
    low[:, there:], high[:, there:] = torch.nan, torch.nan
    options = {"page": 16, "share": current, "current": current}
    for own in (None, window):
        found = pages.best(q, low, high, 6, tokens=tokens, window=own, **options)
        clock = torch.tensor([tokens - 3])
        by_clock = pages.best(q, low, high, 6, tokens=3, clock=clock, window=own, **options)
        assert torch.equal(by_clock, found)
        score = pages.bounds(q.double(), low.double(), high.double(), share=current)
        page, last = torch.arange(P), (tokens - 1) // 16
        seen = (page < last) if current else (page <= last)
        if own is not None:
            seen &= page >= max(tokens - own, 0) // 16
        score = score.masked_fill(~seen, -torch.inf)
        order = score.sort(dim=-1, descending=True, stable=True)
        best = torch.where(order[0][..., :6] > -torch.inf, order[1][..., :6], P).sort(-1)[0]
        want = torch.where(best < P, best * 16, -1).int()
        assert torch.equal(found[..., :6], want)
        if current:
            assert (found[..., 6] == last * 16).all()


@inside
@pytest.mark.parametrize("clock", [None, 40, 90])
def test_a_token_of_latents(clock, monkeypatch):
    """576 features of a key, 512 of them its value, in memory that is not filled."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 8, 576).half(), torch.randn(2, 91, 1, 576).half()
    if clock is not None:
        k[:, clock + 1 :] = torch.nan
        clock = torch.tensor([clock])
    found = token.token(q, k, k[..., :512], clock, scale=0.05)
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    want = token.token(q.double(), k.double(), k[..., :512].double(), clock, scale=0.05)
    torch.testing.assert_close(found.double(), want, atol=2e-3, rtol=2e-3)
