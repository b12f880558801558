"""Tokens counted on the device, as a recorded launch needs them, are the tokens that they were."""

from typing import Any

import pytest
import torch

from policy_kit import applied, close, tiny, tokens
from subquad.caches.kv import PolicyCache
from subquad.caches.steps import decoding
from subquad.policies import Policy, StreamingLLM, create_policy

GATES = ((1, 0), (0.2, 0.8))
CASES = {
    "full": Policy,
    "prefill": lambda: create_policy("block_topk", block=8, topk=3),
    "quest": lambda: create_policy("quest", budget=24, page=8, dense_layers=0),
    "quest, dense": lambda: create_policy("quest", budget=24, page=8, dense_layers=1),
    "quest, frontier": lambda: create_policy("quest", budget=24, page=8, variant="frontier"),
    "quest, alone": lambda: create_policy(
        "quest", budget=24, page=8, variant="frontier", share=False
    ),
    "snapkv": lambda: create_policy("snapkv", capacity=20, window=8),
    "snapkv, wide": lambda: create_policy("snapkv", capacity=20, window=8, share="none"),
    "snapkv, pieces": lambda: create_policy("snapkv", capacity=20, window=8, pieces=True),
    "snapkv, all": lambda: create_policy("snapkv", capacity=200, window=8),
    "duo": lambda: create_policy("duo", gates=GATES, sinks=2, window=5),
    "duo, filling": lambda: create_policy("duo", gates=GATES, sinks=40, window=40),
    "streaming": lambda: create_policy("streaming_llm", sinks=2, window=9),
    "streaming, filling": lambda: create_policy("streaming_llm", sinks=4, window=77),
    "streaming, absolute": lambda: create_policy(
        "streaming_llm", sinks=2, window=9, position="absolute"
    ),
}  # fmt: skip
SCALED = {"rope_theta": 1e4, "factor": 4.0}
WINDOWED = ("full", "quest", "quest, frontier", "duo", "streaming, absolute")


def answer(model, policy, counted: bool, B: int = 2, new: int = 14):
    """Logits of ``new`` tokens, for which the room runs out, and of plain ones after them."""
    ids, out = tokens(B), []
    text = ids.flip(1)
    with applied(model, policy) as on:
        cache = on.new_cache()
        model(ids, past_key_values=cache)
        for t in range(new):
            one, seen = text[:, t : t + 1], cache.get_seq_length()
            if counted and t > 0 and t % 6 == 1:
                cache.reserve(6)
            if not counted or t == 0:
                out.append(model(one, past_key_values=cache).logits)
                continue
            with cache.counted_by(torch.tensor([seen])):
                places = torch.full((B, 1), seen)
                out.append(model(one, past_key_values=cache, position_ids=places).logits)
        out.append(model(text[:, new : new + 1], past_key_values=cache).logits)
        out.append(model(text[:, new : new + 5], past_key_values=cache).logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("name", CASES)
def test_counted_on_the_device(name):
    made = CASES[name]()
    model = tiny()
    want, plain = answer(model, made, counted=False)
    got, cache = answer(model, made, counted=True)
    close(got, want)
    assert [layer.seen for layer in cache.held] == [layer.seen for layer in plain.held]


@pytest.mark.parametrize("name", WINDOWED)
def test_the_models_own_window(name):
    model, made = tiny("Mistral", sliding_window=11), CASES[name]()
    close(answer(model, made, counted=True)[0], answer(model, made, counted=False)[0])


def parts(layer):
    return [part for _, part in getattr(layer, "parts", [(None, layer)])]


@pytest.mark.parametrize("name", CASES)
def test_a_repeated_token_is_counted(name):
    """``advance`` leaves the host's numbers as a token does."""
    model, made = tiny(), CASES[name]()
    with applied(model, made) as on:
        caches = [on.new_cache(), on.new_cache()]
        for cache in caches:
            model(tokens(), past_key_values=cache)
            model(tokens()[:, :1], past_key_values=cache)
            cache.reserve(20)
        for _ in range(12):
            model(tokens()[:, :1], past_key_values=caches[0])
            caches[1].advance()
    for a, b in zip(caches[0].held, caches[1].held, strict=True):
        assert a.seen == b.seen
        for one, other in zip(parts(a), parts(b), strict=True):
            assert one.held().keys.shape == other.held().keys.shape


def test_steps_without_a_gpu():
    model = tiny()
    with applied(model, create_policy("quest", budget=24, page=8)) as on:
        cache = on.new_cache()
        with pytest.raises(ValueError, match="cache must hold a prompt"):
            on.steps(cache)
        logits = model(tokens(2), past_key_values=cache).logits[:, -1]
        step = on.steps(cache)
        assert not step.repeats
        with pytest.raises(ValueError, match=r"ids must be \[B,1\]"):
            step(tokens(2))
        out = []
        for _ in range(5):
            logits = step(logits.argmax(-1, keepdim=True))
            out.append(logits.argmax(-1))
    with applied(model, create_policy("quest", budget=24, page=8)):
        want = model.generate(tokens(2), max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.stack(out, 1), want[:, -5:])


def test_which_policies_repeat():
    model = tiny()
    with applied(model, create_policy("hip", budget=32)) as on:
        assert not any(on.policy.repeats(site) for site in on.sites)
    joined = create_policy("vertical_slash") + create_policy("quest")
    with applied(model, joined) as on:
        assert all(on.policy.repeats(site) for site in on.sites)
    with applied(tiny("Mistral", sliding_window=11), create_policy("snapkv")) as on:
        assert not on.policy.repeats(on.sites[0])


@pytest.mark.parametrize("name", ["full", "quest", "snapkv, pieces"])
@pytest.mark.parametrize("sample", [False, True])
def test_generate_by_steps(name, sample):
    """The tokens that ``generate`` writes by itself: processors, criteria, a second turn."""
    model, options = tiny(), {"max_new_tokens": 9, "do_sample": sample, "repetition_penalty": 1.3}
    with applied(model, CASES[name]()) as on:
        made = []
        for by_steps in (False, True):
            torch.manual_seed(0)
            cache = on.new_cache()
            more = {"custom_generate": decoding(on)} if by_steps else {}
            text = tokens(2)
            for _ in range(2):
                text = model.generate(text, past_key_values=cache, **options, **more)
            made.append(text)
        assert torch.equal(*made)
        end = made[0][0, 80].item()
        short = [
            model.generate(
                tokens(1),
                past_key_values=on.new_cache(),
                eos_token_id=end,
                max_new_tokens=20,
                **more,
            )
            for more in ({}, {"custom_generate": decoding(on)})
        ]
        assert torch.equal(*short)
        options |= {"past_key_values": on.new_cache(), "custom_generate": decoding(on)}
        mask = torch.arange(75) > torch.tensor([[2], [-1]])
        with pytest.raises(ValueError, match="texts must be of one length"):
            model.generate(tokens(2), attention_mask=mask, **options)


class Replay:
    """A CUDA graph without a GPU: what is recorded leaves no tensor changed, what is repeated none
    of the host's numbers."""

    step: Any = None

    def __init__(self, graph=None, stream=None):
        pass

    def holders(self):
        layers = [part for layer in self.step.cache.held for part in {layer, *parts(layer)}]
        return [
            x for layer in layers for x in (layer, *vars(layer).values()) if hasattr(x, "__dict__")
        ]

    def __enter__(self):
        held = [x for own in self.holders() for x in vars(own).values()]
        flat = [y for x in held for y in (x if isinstance(x, tuple) else (x,))]
        tensors = {
            x.data_ptr(): x for x in (*flat, self.step._clock) if isinstance(x, torch.Tensor)
        }
        self.before = [(x, x.clone()) for x in tensors.values()]

    def __exit__(self, *exception):
        for x, before in self.before:
            x.copy_(before)

    def replay(self):
        before = [(x, dict(vars(x))) for x in self.holders()]
        self.step._logits.copy_(self.step._counted())
        for x, attributes in before:
            vars(x).update(attributes)


@pytest.mark.parametrize("name", CASES)
def test_recorded_and_repeated(name, monkeypatch):
    """Room that runs out, and text in between that nobody recorded."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", Replay)
    reserve = PolicyCache.reserve  # a repeated token is counted twice for a moment
    monkeypatch.setattr(PolicyCache, "reserve", lambda cache, n: reserve(cache, n + 1))
    model, ids, outs = tiny(), tokens(2), []
    with applied(model, CASES[name]()) as on:
        for repeats in (False, True):
            cache = on.new_cache()
            model(ids, past_key_values=cache)
            Replay.step = step = on.steps(cache, room=7)
            step.repeats, out = repeats, []
            for t in range(24):
                if t == 13:
                    model(ids[:, :3], past_key_values=cache)
                out.append(step(ids[:, t : t + 1]).clone())
            outs.append(torch.stack(out))
            assert {layer.seen for layer in cache.held} == {75 + 24 + 3}
    close(*outs)


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("Llama", {}, True),
        ("Llama", {"rope_parameters": SCALED | {"rope_type": "yarn"}}, True),
        ("Llama", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}, False),
        ("Cohere", {}, True),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, True),
        ("Olmo3", {"layer_types": ["sliding_attention", "full_attention"]}, True),
    ],
    ids=["half", "scaled", "follows the length", "pairs", "none", "kinds"],
)
def test_a_rotation_in_numbers(kind, changes, found):
    """A table gives what the model's own function does, for each of its layers."""
    model, calls = tiny(kind, **changes), []

    class Seen(StreamingLLM):
        def decode(self, call):
            calls.append(call)
            return super().decode(call)

    with applied(model, Seen(sinks=2, window=30)) as on:
        cache = on.new_cache()
        model(tokens(1, 9), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        for call in calls:
            rope, place = call.rope(32), torch.arange(32)
            if not found:
                assert rope is None
                continue
            x = torch.randn(1, 32, 3, 8, dtype=torch.float64)
            close(rope(x, place), call.rotate(x, place[None]), 1e-6)
            assert call.rope(32) is rope
    assert len(calls) == 2
