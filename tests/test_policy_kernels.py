"""The kernels of the policies in Triton's interpreter: the same as without them."""

import os
import subprocess
import sys

import pytest
import torch

from subquad.ops import cache
from subquad.ops.attention import token
from subquad.ops.backend import interpreted
from subquad.ops.select import pages
from subquad.policies import quest
from subquad.policies.base import Call, Site
from subquad.policies.parts import lines

inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")


def test_in_the_interpreter():
    """Triton reads the variable when it is imported, so this runs in a process of its own."""
    if interpreted():
        pytest.skip("these are the tests")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@inside
@pytest.mark.parametrize(("T", "S", "M"), [(211, 211, 16), (60, 211, 32), (20, 70, 64)])
def test_diagonals(T, S, M, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def drawn(n):
        order = torch.rand(2, 2, S, generator=generator).argsort(-1)
        return order[..., :n].sort(-1).values

    columns, distances = drawn(40), drawn(25)
    found = lines.blocks(columns, distances, T, S, M)
    monkeypatch.setattr(lines, "interpreted", lambda: False)
    for a, b in zip(found, lines.blocks(columns, distances, T, S, M), strict=True):
        assert torch.equal(lines.trimmed(a.long()), b)


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
    for module in (cache, pages, token):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    torch.testing.assert_close(found, answers())


@inside
@pytest.mark.parametrize("name", ["full", "quest", "quest, frontier", "duo"])
def test_counted_on_the_device(name, monkeypatch):
    """A token's kernels with its place in a tensor; memory that runs out and grows."""
    from policy_kit import tiny
    from test_steps import CASES, answer

    model = tiny().float()
    found, _ = answer(model, CASES[name](), counted=True, B=1, new=8)
    for module in (cache, pages, token):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    want, _ = answer(model, CASES[name](), counted=False, B=1, new=8)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@inside
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("tokens", [5, 16, 17, 311, 320])
def test_best_pages(tokens, current):
    """Many equal scores, fewer pages than asked for, a window, pages that nobody wrote."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randint(-1, 2, (2, 4, 16), generator=generator).float()
    low = torch.randint(-1, 1, (2, 25, 2, 16), generator=generator).float()
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
        page, last = torch.arange(25), (tokens - 1) // 16
        seen = (page < last) if current else (page <= last)
        if own is not None:
            seen &= page >= max(tokens - own, 0) // 16
        score = score.masked_fill(~seen, -torch.inf)
        order = score.sort(dim=-1, descending=True, stable=True)
        best = torch.where(order[0][..., :6] > -torch.inf, order[1][..., :6], 99).sort(-1)[0]
        want = torch.where(best < 99, best * 16, -1).int()
        assert torch.equal(found[..., :6], want)
        if current:
            assert (found[..., 6] == last * 16).all()
