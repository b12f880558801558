"""The kernels of the policies in Triton's interpreter: the same as without them."""

import os
import subprocess
import sys

import pytest
import torch

from subquad.ops.backend import interpreted
from subquad.policies import quest
from subquad.policies.base import Call, Site
from subquad.policies.parts import chosen, lines

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
    for module in (quest, chosen):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    torch.testing.assert_close(found, answers())
