"""A CausalLM's tokens, recorded once and repeated, are the tokens that it writes otherwise."""

import pytest
import torch

from kit import close, poisoned
from subquad.caches import StateCache
from subquad.caches.steps import decoding
from subquad.models import CausalLM
from test_causal_lm import build, build_row, first_rows, tokens

HYBRIDS = {
    "softmax": {"layers": "softmax"},
    "hybrid": {"layers": "gated_deltanet softmax"},
    "window": {"layers": "w", "mixers": {"w": {"mixer": "softmax", "heads": 2, "window": 20}}},
    "latent": {"layers": "kimi_linear m", "mixers": {
        "kimi_linear": {"heads": 2}, "m": {"mixer": "mla", "heads": 2, "latent_dim": 6,
        "nope_dim": 4, "rope_dim": 2, "value_dim": 4, "rope_theta": 1e4},
    }},
    "residual": {"layers": "softmax gated_deltanet", "residual_float32": True},
}  # fmt: skip


def models():
    for row in first_rows():
        model = build_row(row)
        if model.blocks[0].mixer.repeats:
            yield pytest.param(lambda row=row: build_row(row), id=row.key)
    for name, options in HYBRIDS.items():
        yield pytest.param(lambda options=options: build(**options), id=name)


class Replay:
    """A CUDA graph without a GPU: what is recorded leaves no tensor changed, what is repeated none
    of the host's numbers."""

    def __init__(self, graph=None, stream=None):
        pass

    def __enter__(self):
        states = self.step.cache._states
        held = [self.step._clock, *(t for s in states for t in (*s.tensors.values(), s.seen))]
        self.before = [(t, t.clone()) for t in held]

    def __exit__(self, *exception):
        for t, before in self.before:
            t.copy_(before)

    def replay(self):
        cache = self.step.cache
        tokens = cache.tokens
        self.step._logits.copy_(self.step._counted())
        cache.tokens = tokens


@pytest.mark.parametrize("make", models())
@torch.no_grad()
def test_repeated(make, monkeypatch):
    """Room that runs out, and text in between that nobody recorded."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", Replay)
    model, ids, outs, recorded = make(), tokens(2, 40), [], 0
    for repeats in (False, True):
        cache, out = StateCache(), []
        with poisoned():
            model(input_ids=ids[:, :15], past_key_values=cache)
            Replay.step = step = model.steps(cache, room=5)
            assert not step.repeats  # for want of a GPU
            step.repeats = repeats
            for t in range(15, 35):
                if t == 27:
                    model(input_ids=ids[:, :3], past_key_values=cache)
                out.append(step(ids[:, t : t + 1]).clone())
                recorded += step._graph is not None
        assert cache.get_seq_length() == 15 + 20 + 3
        assert {n for s in cache.states for n in s.seen.tolist()} == {38}
        out.append(model(input_ids=ids[:, 35:], past_key_values=cache).logits[:, -1])
        outs.append(torch.stack(out))
    close(*outs)
    assert recorded > 3


@pytest.mark.parametrize("repeats", [False, True])
@torch.no_grad()
def test_generate_by_steps(repeats, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", Replay)
    model, ids, make = build(), tokens(2, 9), CausalLM.steps

    def steps(self, cache):
        Replay.step = step = make(self, cache, room=5)
        step.repeats = repeats
        return step

    monkeypatch.setattr(CausalLM, "steps", steps)
    by = {"custom_generate": decoding(model)}
    plain, steps = (model.generate(ids, max_new_tokens=20, **more) for more in ({}, by))
    assert torch.equal(plain, steps)
    assert (Replay.step._graph is not None) == repeats


@torch.no_grad()
def test_what_is_not_recorded():
    model, ids = build("softmax"), tokens(2, 9)
    assert model.repeats
    assert not build(max_positions=64).repeats
    sinks = {"mixer": "softmax", "heads": 2, "window": 8, "sinks": 2}
    assert not build("gated_deltanet s", mixers={"s": sinks}).repeats
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    cache = StateCache()
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    model(input_ids=ids[:, :1], past_key_values=cache)
    assert not cache.steady  # a row is padded
    cache = filled(model)
    assert not cache.steady  # not a token
    model(input_ids=ids[:, :1], past_key_values=cache)
    assert cache.steady
    with pytest.raises(ValueError, match="cache must hold a prompt"):
        model.steps(StateCache())


def filled(model):
    cache = StateCache()
    model(input_ids=tokens(2, 9), past_key_values=cache)
    return cache
