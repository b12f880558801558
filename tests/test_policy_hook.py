"""The hook: a policy that changes nothing on models of transformers, and what is refused."""

import pytest
import torch
from torch import nn

import subquad
from policy_kit import NEW, T, applied, close, read, tiny, tokens
from subquad.ops.attention import attention
from subquad.policies import BlockTopK, Quest, StreamingLLM, VerticalSlash
from subquad.policies.base import Call, Policy, Tally, create_policy

WINDOWED = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": 4}),
    ("Llama", {"num_key_value_heads": 1, "rope_theta": 1e6}),
    ("Qwen3", {}),
    ("Mistral", {"sliding_window": 9}),
    ("Mistral", {"sliding_window": None}),
    ("Gemma3", WINDOWED),
]


class Late(Policy):
    """Full attention from keys that are rotated on reading."""

    late_rope = True

    def prefill(self, call: Call):
        real = call.real
        if real is None:
            real = torch.ones(call.layer.keys.shape[:2], dtype=torch.bool)
        places = (real.long().cumsum(1) - 1).clamp_min(0)
        q, k = call.rotate(call.q, call.positions), call.rotate(call.layer.keys, places)
        return attention(q, k, call.layer.values, call.mask(), scale=call.scale)

    decode = prefill


@pytest.fixture(params=MODELS, ids=lambda p: "-".join([p[0], *map(str, p[1].values())]))
def model(request):
    return tiny(request.param[0], **request.param[1])


def _prompts():
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "do_sample": False}


@pytest.mark.parametrize("policy", [Policy(), Late()], ids=["early", "late"])
def test_generate_is_the_models_own(model, policy):
    """Greedy and beam search over a padded batch, token by token what the model writes alone."""
    prompts = _prompts()
    greedy = model.generate(**prompts, max_new_tokens=12)
    beams = model.generate(**prompts, max_new_tokens=8, num_beams=3)
    with subquad.apply(model, policy):
        assert model.generate(**prompts, max_new_tokens=12).equal(greedy)
        assert model.generate(**prompts, max_new_tokens=8, num_beams=3).equal(beams)
    assert model.generate(**prompts, max_new_tokens=12).equal(greedy)


def test_logits_with_and_without_a_cache(model):
    ids = tokens(2, 30)
    with torch.no_grad():
        want = model(ids).logits
        with subquad.apply(model, Policy()):
            close(model(ids).logits, want)
            close(model(ids, use_cache=False).logits, want)


def test_pieces_and_turns(model):
    """A prompt in pieces, and a second turn on the cache of the first."""
    ids, turn = tokens(2), tokens(2, 11, seed=2)
    with torch.no_grad():
        want = model(torch.cat([ids, turn], 1)).logits[:, -11:]
    with applied(model, Policy()) as on:
        whole, _ = read(model, on, ids)
        parts, cache = read(model, on, ids, pieces=(30, 1, 20))
        close(parts, whole)
        assert cache.get_seq_length() == T + NEW
        _, cache = read(model, on, ids, new=0)
        close(model(turn, past_key_values=cache).logits, want)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma3"])
@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(sinks=2, window=90),
        StreamingLLM(sinks=2, window=90, position="absolute"),
        VerticalSlash(vertical=90, slash=90),
        BlockTopK(block=8, topk=20) + Quest(budget=96, dense_layers=0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_covering_policies_on_every_model(kind, policy):
    """With budgets that cover the text every model stays as it is, window layers included."""
    changes = {"Gemma3": WINDOWED, "Mistral": {"sliding_window": 9}}.get(kind, {})
    model, ids = tiny(kind, **changes), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    with applied(model, Policy()) as on:
        want, _ = read(model, on, ids, mask)
    if kind in ("Mistral", "Gemma3") and isinstance(policy, StreamingLLM):
        policy = StreamingLLM(sinks=0, window=90, position=policy.position)
    with applied(model, policy) as on:
        got, _ = read(model, on, ids, mask)
    # In places of the cache, float32 rotations round otherwise.
    close(got, want, 1e-6 if policy.late_rope else 1e-9)


def test_window_layers_keep_their_window():
    """What the model's own window hides is freed, and nothing changes by it."""
    model, ids = tiny("Gemma3", **WINDOWED), tokens(2, 220)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[:, -1:]
    with applied(model, Policy()) as on:
        got, cache = read(model, on, ids[:, :213], mask[:, :213], pieces=(100, 90), new=0)
        for t in range(213, 220):
            places = (mask[:, : t + 1].cumsum(1) - 1)[:, -1:]
            got = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=places,
                past_key_values=cache,
            ).logits
    # Without position_ids the model counts padding too, and float32 rotations round otherwise.
    close(got, want, 1e-6)
    slides, whole = cache.held
    assert whole.keys.shape[1] == slides.get_seq_length() == 220
    assert slides.keys.shape[1] < 9 + 64
    assert slides.nbytes < whole.nbytes / 2


def test_exception_restores():
    model, ids = tiny(), tokens()
    before = model.config._attn_implementation
    with torch.no_grad():
        want = model(ids).logits
        with pytest.raises(ValueError, match="padding on the left"), subquad.apply(model, Quest()):
            model(ids, attention_mask=torch.arange(T, 0, -1)[None] > 9)
        assert model.config._attn_implementation == before
        assert not any(m._forward_pre_hooks for m in model.modules())
        close(model(ids).logits, want, 0)


def test_for_good_and_removed():
    model = tiny()
    on = subquad.apply(model, StreamingLLM(sinks=1, window=8))
    out = model(tokens())
    assert out.past_key_values.get_seq_length() == T
    assert out.past_key_values.nbytes == 2 * 2 * (1 + 8 + 1) * 2 * 8 * 8
    on.remove()
    on.remove()
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_patched():
    """Other models keep their attention while a policy is on one."""
    model, other, ids = tiny(), tiny("Qwen3"), tokens()
    with torch.no_grad():
        want = other(ids).logits
        with subquad.apply(model, StreamingLLM(sinks=0, window=1)):
            close(other(ids).logits, want, 0)


def test_two_models_at_once():
    one, two, ids = tiny(), tiny("Qwen3"), tokens()
    with torch.no_grad(), subquad.apply(one, Policy()), subquad.apply(two, StreamingLLM()):
        assert one(ids).logits.isfinite().all()
        assert two(ids).logits.isfinite().all()


def test_pairs_are_counted():
    model, ids = tiny(), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    with applied(model, Policy()) as on:
        on.tally = Tally()
        read(model, on, ids, mask, new=1)
        # Two layers of four heads; 75 and 50 tokens, and one more each.
        assert on.tally.prefill.attended == on.tally.prefill.visible == 8 * (75 * 38 + 25 * 51)
        assert on.tally.decode.attended == on.tally.decode.visible == 8 * (76 + 51)
        assert on.tally.prefill.fraction == 1
    with applied(model, StreamingLLM(sinks=2, window=8)) as on:
        on.tally = Tally()
        read(model, on, ids, mask, new=1)
        assert on.tally.decode.attended == 8 * (10 + 10)


class _Plain(nn.Module):
    pass


def _encoder():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )


def _own():
    """A decoder of transformers without attention layers that a policy could reach."""
    return subquad.CausalLM(
        subquad.CausalLMConfig(vocab_size=20, dim=16, depth=1, layers="gated_deltanet")
    )


def _capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=4,
            num_key_value_heads=1,
            intermediate_size=8,
        )
    )


def _chunked():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"num_local_experts": 1, "intermediate_size_mlp": 16, "pad_token_id": 0}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **more, attention_chunk_size=8))


def _learned_sinks():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_chunked, r"Llama4ForCausalLM has layers of .*chunked_attention"),
        (_learned_sinks, "GptOssForCausalLM has learned attention sinks"),
        (_Plain, "model must be a transformers PreTrainedModel, got _Plain"),
        (_encoder, "model must be a decoder that generates, got BertModel"),
        (_own, "CausalLM"),
        (_capped, r"caps its scores \(attn_logit_softcapping\)"),
    ],
)
def test_models_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        subquad.apply(make(), Quest())


@pytest.mark.parametrize("policy", [Late(), StreamingLLM(sinks=3, window=40)], ids=["all", "ring"])
def test_layers_without_positions_are_not_rotated_late(policy):
    """SmolLM 3 rotates in three of four layers: a policy that rotates for it does so there."""
    model, ids = tiny("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]), tokens(1, 20)
    with torch.no_grad():
        want = model(ids).logits
    with applied(model, policy) as on:
        close(model(ids, past_key_values=on.new_cache()).logits, want, 1e-6)


def test_each_kind_of_layer_is_rotated_as_its_own():
    """OLMo 3 has frequencies by kind, and its attention does not say of which kind it is."""
    kinds = ["sliding_attention", "full_attention"]
    model, ids = tiny("Olmo3", sliding_window=9, layer_types=kinds), tokens(1, 20)
    with torch.no_grad():
        want = model(ids).logits
    with applied(model, Late()) as on:
        close(model(ids, past_key_values=on.new_cache()).logits, want, 1e-6)


def test_two_attentions_in_a_layer_are_refused():
    model = tiny("DiffLlama")
    with (
        subquad.apply(model, Policy()),
        pytest.raises(ValueError, match="DiffLlamaAttention attends more than once"),
    ):
        model(tokens(1, 5))


def test_what_does_not_rotate_last_is_not_rotated_late():
    """HunYuan norms what it has rotated, Phi joins what it rotates with the rest of a head."""
    for kind in ("HunYuanDenseV1", "Phi"):
        model = tiny(kind, num_key_value_heads=4)
        for norm in model.modules():
            if "norm" in type(norm).__name__.lower():
                nn.init.normal_(norm.weight, 1.0, 0.3)  # one alone would not tell
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=f"layer 0 of {kind}.* must rotate whole queries"):
            subquad.apply(model, Late())
        assert model.config._attn_implementation == before
        with subquad.apply(model, Policy()):
            model(tokens(1, 5))


@pytest.mark.parametrize("key", ["streaming_llm", "duo"])
def test_a_model_that_slides_is_its_own_within_the_budget(key):
    """In its windowed layers sinks would be seen that it never saw."""
    model, ids = tiny("Gemma3", **WINDOWED), tokens(1, 30)
    gates = {"gates": [[0.0, 1.0], [1.0, 0.0]]} if key == "duo" else {}
    with torch.no_grad():
        want = model(torch.cat([ids, ids.flip(1)[:, :8]], 1)).logits[:, 29:]
    with applied(model, create_policy(key, sinks=3, window=60, **gates)) as on:
        close(read(model, on, ids, new=8)[0], want, 1e-6)


def test_policies_that_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="policy must be a subquad Policy, got 'quest'"):
        subquad.apply(model, "quest")
    with (
        subquad.apply(model, Quest()),
        pytest.raises(ValueError, match=r"policy Quest already; remove it, or join them by \+"),
    ):
        subquad.apply(model, VerticalSlash())
    with pytest.raises(ValueError, match=r"Quest \+ VerticalSlash: Quest shapes the decoding"):
        Quest() + VerticalSlash()
    with pytest.raises(ValueError, match="StreamingLLM shapes the prefill, which BlockTopK does"):
        BlockTopK() + StreamingLLM()
    with pytest.raises(ValueError, match="a policy joins with a policy, got 3"):
        BlockTopK() + 3


class _LateDecode(Policy):
    late_rope = True

    def decode(self, call):
        return call.dense()


def test_rotations_must_agree():
    with pytest.raises(ValueError, match="one rotates keys before the cache, the other after"):
        BlockTopK() + _LateDecode()


def test_inputs_that_are_refused():
    model, ids = tiny(), tokens(2, 12)
    filled = model(ids, use_cache=True).past_key_values
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    with subquad.apply(model, Quest()):
        with pytest.raises(ValueError, match="past_key_values was filled without this policy"):
            model(ids[:, :1], past_key_values=filled)
        with pytest.raises(ValueError, match="attention_mask must have its padding on the left"):
            model(ids, attention_mask=holes)
        with pytest.raises(ValueError, match=r"attention_mask must be \[B,S\] under a policy"):
            model(ids, attention_mask=torch.ones(2, 1, 12, 12))


def test_without_a_policy_the_name_is_refused():
    model = tiny()
    with subquad.apply(model, Policy()):
        pass
    model.config._attn_implementation = "subquad"
    with pytest.raises(ValueError, match="no policy is applied to it"):
        model(tokens())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qest", {}, "policy must be one of .* did you mean 'quest'"),
        ("quest", {"bugdet": 4}, "options of policy 'quest' must be one of .* mean 'budget'"),
        ("quest", {"budget": 0}, "budget must be a positive int, got 0"),
        ("quest", {"budget": 8}, "budget must be at least page=16, got 8"),
        ("quest", {"variant": "best"}, "variant must be one of"),
        ("streaming_llm", {"window": 0}, "window must be a positive int, got 0"),
        ("streaming_llm", {"sinks": -1}, "sinks must be a non-negative int, got -1"),
        ("streaming_llm", {"position": "true"}, "position must be one of"),
        ("block_topk", {"topk": 2}, "topk must be at least 3"),
        ("vertical_slash", {"slash": 0}, "slash must be a positive int, got 0"),
        ("vertical_slash", {"variant": "frontier", "slash": 20}, "at least sinks=4 and local=64"),
        ("flexprefill", {"gamma": 1.5}, r"gamma must lie in 0..1, got 1.5"),
        ("flexprefill", {"max_budget": 100}, "max_budget must be at least min_budget=512, got 100"),
        ("flexprefill", {"tau": -1.0}, "tau must be at least 0, got -1.0"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_policy(name, **options)
