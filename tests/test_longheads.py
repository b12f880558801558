"""Facts of LongHeads, and of attention that is dispatched by the chunk."""

import dataclasses

import pytest
import torch

from longheads_definition import LongHeadsDefinition, summary
from policy_kit import applied, calls, close, read, rotate, tiny, tokens
from subquad.policies import LongHeads, Policy
from subquad.policies.base import Tally
from subquad.policies.parts.dispatch import dispatch


def test_as_many_chunks_as_there_are():
    """Then all are chosen, in order: full attention."""
    model, ids = tiny(), tokens(2)
    with applied(model, Policy()) as on:
        want, _ = read(model, on, ids)
    with applied(model, LongHeads(chunk=8, length=88, after=0)) as on:
        close(read(model, on, ids)[0], want, 1e-6)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_never_beyond_the_length(exclude_self):
    """No token attends to more than ``length`` keys, whatever the text."""
    policy = LongHeads(chunk=4, length=20, exclude_self=exclude_self)
    call, definition = next(calls(policy, prompt=160)), LongHeadsDefinition()
    close(policy.prefill(call), definition(policy, call))
    assert call.tally.prefill.attended == definition.pairs
    for t in range(20, 160):
        alone = dataclasses.replace(call, tally=Tally())
        policy._piece(alone, t, 1)
        assert alone.tally.prefill.attended <= 20 * 4


def test_heads_choose_for_themselves():
    policy = LongHeads(chunk=4, length=20)
    call = next(calls(policy, prompt=160))
    policy.prefill(call)
    m = torch.arange(40, 160) // 4
    choice = policy._choose(call, call.q[0, 40:], 40, 2, 2)
    assert (choice[:, 0] != choice[:, 1]).any()
    assert bool((choice.diff(dim=-1) > 0).all())
    assert int(choice.min()) >= 1
    assert bool((choice.amax((1, 2)) <= m - 2).all())


def test_summary_of_a_chunk():
    policy = LongHeads(chunk=8, length=32)
    call = next(calls(policy, prompt=24))
    q, k, v = (x[0].unflatten(0, (3, 8)) for x in (call.q, call.k, call.v))
    got = policy.summaries(call, q, k, v)
    for c in range(3):
        for h in range(4):
            close(got[c, h], summary(q[c, :, h], k[c, :, h // 2], v[c, :, h // 2], call.scale))
    same = torch.ones(1, 8, 2, 8, dtype=torch.float64)
    place = torch.arange(8)[None]
    even = dataclasses.replace(call, scale=0.0)  # every key weighs the same
    close(policy.summaries(even, q[:1], same, v[:1])[0, 0], rotate(same, place)[0, :, 0].mean(0))


@pytest.mark.parametrize("n", [1, 7, 300])
def test_dispatch(n):
    """Equal to each query over its chosen chunks."""
    q, (k, v) = torch.randn(3, n, 4, 8).double(), torch.randn(2, 9, 5, 2, 8).double()
    choice = torch.rand(9, n, 4).argsort(0)[:3]
    o, lse = dispatch(q, choice, k, v, scale=0.3)
    for i in range(0, n, 37):
        for h in range(4):
            picked = choice[:, i, h]
            scores = torch.cat([k[c, :, h // 2] @ q[p, i, h] * 0.3 for p, c in enumerate(picked)])
            close(lse[i, h], scores.logsumexp(0))
            close(o[i, h], scores.softmax(0) @ v[picked][:, :, h // 2].flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be a positive int, got 0"),
        ({"chunk": 100}, "length must be a multiple of chunk=100"),
        ({"chunk": 512, "length": 1536}, "4 of it or more, got 1536"),
        ({"after": -1}, "after must be a non-negative int, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LongHeads(**options)
