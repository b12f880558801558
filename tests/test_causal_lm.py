"""The language model: every mixer in it, generation, checkpoints, packing, compilation."""

import copy
import errno
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

import subquad
from kit import close, poisoned
from rows import ROWS
from subquad.caches import StateCache
from subquad.mixers.softmax import Softmax
from subquad.models import CausalLM, CausalLMConfig, based, create_model, hybrid, kimi_linear
from subquad.models import loss as losses

VOCAB = 31
TINY = {
    "gated_deltanet": {"heads": 2, "head_dim": 4},
    "softmax": {"heads": 2},
    "hgrn2": {"heads": 2},
    "kimi_linear": {"heads": 2},
}


def first_rows():
    """One small row of every causal mixer."""
    rows = {}
    for row in ROWS:
        if row.causal and "layer" not in row.options:
            rows.setdefault(row.key, row)
    return list(rows.values())


def build(layers="gated_deltanet softmax", *, dtype=torch.float64, **config):
    torch.manual_seed(0)
    used = {token.partition("*")[0] for token in layers.split()}
    mixers = {alias: TINY[alias] for alias in used if alias in TINY} | config.pop("mixers", {})
    sizes = {"vocab_size": VOCAB, "dim": 16, "depth": 2, "mlp_dim": 24, "init_std": 0.3}
    config = CausalLMConfig(layers=layers, mixers=mixers, **sizes | config)
    return CausalLM(config).to(dtype).eval()


def build_row(row, **config):
    options = {name: value for name, value in row.options.items() if name != "dim"}
    mixers = {"m": {"mixer": row.key, **options}}
    return build("m", mixers=mixers, dim=row.options["dim"], **config)


def tokens(B=2, T=12, seed=1):
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def decoded(model, ids, start, cache=None):
    """Logits of prefill up to ``start`` and then one token at a time."""
    out = model(ids[:, :start], past_key_values=cache, use_cache=True)
    logits = [out.logits]
    for t in range(start, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1), out.past_key_values


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def hybrid_model():
    return build(depth=4)


@pytest.mark.parametrize("row", first_rows(), ids=lambda row: row.key)
class TestEveryMixer:
    @torch.no_grad()
    def test_forward_is_prefill_and_decode(self, row):
        model, ids = build_row(row), tokens()
        logits, cache = decoded(model, ids, 7)
        close(logits, model(ids).logits)
        assert cache.get_seq_length() == 12
        assert [state.seen.tolist() for state in cache.states] == [[12, 12]] * 2

    @torch.no_grad()
    def test_state_bytes(self, row):
        model = build_row(row, dtype=torch.float32)
        for T in (1, 12):
            cache = model(tokens(1, T)).past_key_values
            held = [t for state in cache.states for t in state.tensors.values()]
            assert model.state_bytes(T) == sum(t.numel() * t.element_size() for t in held)
        assert 0 < model.flops(8) < model.flops(16)

    def test_left_padded_batch_generates_as_alone(self, row):
        model = build_row(row)
        alone = [tokens(1, 4, seed=2), tokens(1, 9, seed=3)]
        batch = torch.full((2, 9), 0)
        mask = torch.zeros(2, 9, dtype=torch.int64)
        for n, ids in enumerate(alone):
            batch[n, 9 - ids.shape[1] :], mask[n, 9 - ids.shape[1] :] = ids[0], 1
        got = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for n, ids in enumerate(alone):
            want = model.generate(ids, max_new_tokens=6, do_sample=False)
            assert got[n, 9:].tolist() == want[0, ids.shape[1] :].tolist()

    def test_beam_search_reorders_the_states(self, row):
        """Beams with a cache = beams that read everything again at every step."""
        model, ids = build_row(row), tokens(2, 5)
        beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        beams |= {"output_scores": True, "return_dict_in_generate": True, "num_return_sequences": 2}
        got, want = model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False)
        assert got.sequences.tolist() == want.sequences.tolist()
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores)

    @torch.no_grad()
    def test_saved_and_loaded(self, row, tmp_path):
        model, ids = build_row(row, dtype=torch.float32), tokens()
        model.save_pretrained(tmp_path)
        loaded = CausalLM.from_pretrained(tmp_path)
        assert loaded.config.pattern == model.config.pattern
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)

    def test_checkpointing_keeps_the_gradients(self, row):
        ids, want = tokens(), None
        for checkpointed in (False, True):
            model = build_row(row).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(ids, labels=ids).loss.backward()
            got = grads(model)
            assert want is None or set(got) == set(want)
            want = want or got
        for name in want:
            close(got[name], want[name])

    @torch.no_grad()
    def test_packed_is_looped(self, row):
        if not row.packs:
            pytest.skip(f"{row.key} does not take packed sequences")
        model, ids = build_row(row), tokens(1, 15)
        cu = torch.tensor([0, 6, 7, 15], dtype=torch.int32)
        out = model(ids, cu_seqlens=cu, labels=ids)
        parts = [ids[:, a:b] for a, b in ((0, 6), (6, 7), (7, 15))]
        close(out.logits, torch.cat([model(part).logits for part in parts], 1))
        summed = sum(model(p, labels=p).loss * (p.shape[1] - 1) for p in (parts[0], parts[2]))
        close(out.loss, summed / 12)


class TestForward:
    def test_loss_is_of_the_next_token(self, hybrid_model):
        ids, labels = tokens(), tokens()
        labels[0, :5] = -100
        out = hybrid_model(ids, labels=labels)
        want = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        close(out.loss, want)
        count = hybrid_model(ids, labels=labels, num_items_in_batch=7).loss
        close(count, want * (labels[:, 1:] != -100).sum() / 7)

    @pytest.mark.parametrize("keep", [0, 1])
    def test_loss_in_chunks(self, hybrid_model, monkeypatch, keep):
        """The same loss and gradients from a few rows of logits at a time."""
        ids = tokens(3, 9)
        hybrid_model(ids, labels=ids).loss.backward()
        want = grads(hybrid_model)
        hybrid_model.zero_grad()
        widest = []
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * VOCAB)
        hybrid_model.lm_head.register_forward_hook(lambda m, x, y: widest.append(y.shape[:-1]))
        hybrid_model(ids, labels=ids, logits_to_keep=keep).loss.backward()
        for name, gradient in grads(hybrid_model).items():
            close(gradient, want[name])
        if keep:
            assert max(shape.numel() for shape in widest) <= 5

    def test_loss_without_labels_that_count(self, hybrid_model):
        assert hybrid_model(tokens(), labels=torch.full((2, 12), -100)).loss == 0

    @torch.no_grad()
    def test_logits_to_keep(self, hybrid_model):
        ids = tokens()
        whole = hybrid_model(ids).logits
        close(hybrid_model(ids, logits_to_keep=3).logits, whole[:, -3:])
        close(hybrid_model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])

    @torch.no_grad()
    def test_embeddings_as_input(self, hybrid_model):
        ids = tokens()
        close(
            hybrid_model(inputs_embeds=hybrid_model.embed_tokens(ids)).logits,
            hybrid_model(ids).logits,
        )

    @torch.no_grad()
    def test_hidden_states(self, hybrid_model):
        out = hybrid_model(tokens(), output_hidden_states=True)
        assert len(out.hidden_states) == 5
        close(hybrid_model.lm_head(out.hidden_states[-1]), out.logits)

    @torch.no_grad()
    def test_right_padding_needs_no_care(self, hybrid_model):
        ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
        mask[0, 8:] = 0
        out = hybrid_model(ids, attention_mask=mask)
        close(out.logits[0, :8], hybrid_model(ids[:1, :8]).logits[0])
        assert out.past_key_values is None
        with pytest.raises(ValueError, match="on the left"):
            hybrid_model(ids, attention_mask=mask, use_cache=True)

    @torch.no_grad()
    def test_learned_positions(self):
        model = build("gated_deltanet", max_positions=12)
        ids = tokens()
        whole = model(ids).logits
        close(decoded(model, ids, 5)[0], whole)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[:, :4] = 0
        close(model(ids, attention_mask=mask).logits[:, 4:], model(ids[:, 4:]).logits)
        assert (model(ids.flip(0)).logits - whole.flip(0)).abs().max() == 0
        with pytest.raises(ValueError, match="max_positions=12, got 12"):
            model(tokens(1, 13))

    def test_no_cache_while_training(self, hybrid_model):
        assert hybrid_model.train()(tokens()).past_key_values is None
        assert hybrid_model(tokens(), use_cache=True).past_key_values is not None

    def test_no_cache_where_layers_run_twice(self, hybrid_model):
        hybrid_model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="takes no cache"):
            hybrid_model(tokens(), use_cache=True)

    @torch.no_grad()
    def test_wide_residual(self):
        model = build(dtype=torch.bfloat16, residual_float32=True)
        out = model(tokens(), output_hidden_states=True)
        assert [h.dtype for h in out.hidden_states] == [torch.float32] * 2 + [torch.bfloat16]

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ({}, "exactly one of input_ids"),
            ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be .*got \[2, 3\]"),
            ({"past_key_values": DynamicCache()}, "must be a StateCache, got DynamicCache"),
            ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, r"labels must have shape \[2, 12\]"),
            ({"attention_mask": torch.eye(12)[[3, 7]]}, "padding must lie on the left"),
        ],
    )
    def test_bad_input(self, hybrid_model, inputs, said):
        with pytest.raises(ValueError, match=said):
            hybrid_model(*([tokens()] if inputs else []), **inputs)

    def test_cache_of_another_model(self, hybrid_model):
        cache = build()(tokens()).past_key_values
        with pytest.raises(ValueError, match="must hold 4 layers"):
            hybrid_model(tokens(), past_key_values=cache)

    def test_traces_whole(self):
        """One graph without a break, forward and backward, the cache included."""
        torch._dynamo.reset()
        model, ids = build(mlp_dim=0), tokens()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out, want = compiled(ids, labels=ids), model(ids, labels=ids)
        close(out.logits, want.logits)
        got, expected = (
            torch.autograd.grad(o.loss, model.embed_tokens.weight) for o in (out, want)
        )
        close(got[0], expected[0])
        assert out.past_key_values.get_seq_length() == 12

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiles_whole(self):
        torch._dynamo.reset()
        model, ids = build(mlp_dim=0, dtype=torch.float32), tokens()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-4
        )


class TestGenerate:
    greedy = {"max_new_tokens": 6, "do_sample": False}

    def test_with_and_without_cache(self, hybrid_model):
        ids = tokens()
        want = hybrid_model.generate(ids, **self.greedy, use_cache=False)
        assert hybrid_model.generate(ids, **self.greedy).tolist() == want.tolist()

    def test_sampling(self, hybrid_model):
        drawn = []
        for _ in range(2):
            torch.manual_seed(5)
            out = hybrid_model.generate(
                tokens(), do_sample=True, max_new_tokens=8, num_return_sequences=3
            )
            drawn.append(out.tolist())
        assert drawn[0] == drawn[1]
        assert len({tuple(row) for row in drawn[0]}) > 2

    @pytest.mark.parametrize("chunk", [1, 2, 5, 64])
    def test_chunked_prefill(self, hybrid_model, chunk):
        """In chunks, also where a row's padding fills the first ones."""
        ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
        mask[0, :7] = 0
        for inputs in ({}, {"attention_mask": mask}):
            want = hybrid_model.generate(ids, **inputs, **self.greedy)
            got = hybrid_model.generate(ids, **inputs, **self.greedy, prefill_chunk_size=chunk)
            assert got.tolist() == want.tolist()

    def test_several_turns(self, hybrid_model):
        """A kept cache saves reading the earlier turns again, and changes nothing."""
        ids, cache = tokens(), StateCache()
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :3] = 0
        for turn in range(3):
            want = hybrid_model.generate(ids, attention_mask=mask, **self.greedy)
            got = hybrid_model.generate(
                ids, attention_mask=mask, past_key_values=cache, **self.greedy
            )
            assert got.tolist() == want.tolist()
            assert cache.get_seq_length() == got.shape[1] - 1
            ids = torch.cat([got, tokens(2, 4, seed=turn)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 10)], 1)

    @torch.no_grad()
    def test_one_prompt_many_endings(self, hybrid_model):
        prompt, ends = tokens(), [tokens(2, 3, seed) for seed in (4, 5)]
        cache = hybrid_model(prompt).past_key_values
        for end in ends:
            out = hybrid_model(end, past_key_values=copy.deepcopy(cache))
            close(out.logits, hybrid_model(torch.cat([prompt, end], 1)).logits[:, 12:])

    def test_other_caches_are_refused(self, hybrid_model):
        with pytest.raises(ValueError, match="cache_implementation must be None"):
            hybrid_model.generate(tokens(), cache_implementation="static", **self.greedy)


class TestStateCache:
    @torch.no_grad()
    def test_crop_takes_back(self):
        model, ids = build("softmax"), tokens()
        cache = model(ids).past_key_values
        assert cache.is_croppable
        cache.crop(-5)
        close(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])

    @torch.no_grad()
    def test_crop_of_a_recurrence_is_refused(self, hybrid_model):
        cache = hybrid_model(tokens()).past_key_values
        assert not cache.is_croppable
        with pytest.raises(ValueError, match="keeps its past"):
            cache.crop(-1)
        assert cache.get_seq_length() == 12

    @torch.no_grad()
    def test_rows(self, hybrid_model):
        ids, next_ids = tokens(), tokens(4, 1)
        cache = hybrid_model(ids).past_key_values
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        want = hybrid_model(torch.cat([ids.repeat_interleave(2, 0), next_ids], 1)).logits[:, -1]
        close(hybrid_model(next_ids, past_key_values=cache).logits[:, -1], want)
        cache.reset()
        assert cache.get_seq_length() == len(cache) == cache.nbytes == 0


class TestConfig:
    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"layers": "gated_deltanett"}, "did you mean 'gated_deltanet'"),
            ({"layers": "a", "mixers": {"a": {"mixer": "softmx"}}}, "mixer of 'a'.*'softmax'"),
            ({"layers": "softmax*0"}, r"got 'softmax\*0' in 'softmax\*0'"),
            ({"layers": "softmax * 3"}, r"got '\*'"),
            ({"layers": ""}, "must name 1..depth=4 layers, got 0"),
            ({"layers": "softmax*5"}, "must name 1..depth=4 layers, got 5"),
            ({"mixers": {"softmax": {}}}, "alias in mixers must be one of .*got 'softmax'"),
            ({"mixers": {"gated_deltanet": {"dim": 3}}}, "leave out dim"),
            ({"mixers": {"gated_deltanet": {"heads": {1}}}}, "JSON values.*set"),
            ({"heads": 2}, "options go into mixers.*got 'heads'"),
            ({"dephts": 2}, "did you mean 'depth'"),
            ({"dim": 0}, "dim must be a positive int, got 0"),
            ({"mlp_dim": -1}, "mlp_dim must be a non-negative int"),
        ],
    )
    def test_bad_values(self, config, said):
        with pytest.raises(ValueError, match=said):
            CausalLMConfig(**config)

    def test_unknown_options(self):
        with pytest.raises(ValueError, match=r"options of mixer 'softmax'.*window_size"):
            build("softmax", mixers={"softmax": {"window_size": 3}})

    def test_not_causal(self):
        options = {"mixer": "linear_attention", "heads": 2, "causal": False}
        with pytest.raises(ValueError, match="must be causal"):
            build("a", mixers={"a": options})

    def test_is_data(self, tmp_path):
        config = build().config
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["layers"] == "gated_deltanet softmax"
        assert saved["mixers"]["softmax"] == {"heads": 2}
        assert CausalLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()

    def test_transformers_arguments_are_known(self):
        config = CausalLMConfig(
            hidden_size=32,
            attn_implementation="eager",
            name_or_path="a",
            max_length=9,
            num_labels=3,
        )
        assert config.dim == 32
        assert CausalLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    def test_list_of_layers(self):
        config = CausalLMConfig(layers=["gla", "softmax*2"], depth=5)
        assert config.pattern == ("gla", "softmax", "softmax", "gla", "softmax")

    def test_widths(self):
        assert CausalLMConfig(dim=64).inner_dim == 192
        assert CausalLMConfig(dim=96).inner_dim == 256
        assert build(mlp_dim=0).layers[0].mlp is None
        assert build(tie_embeddings=True).num_parameters() == build().num_parameters() - 31 * 16

    def test_initialisation(self):
        sizes = {"dim": 128, "depth": 8, "mlp_dim": 256, "init_std": 0.02}
        model = build("softmax", **sizes, scale_residual_init=True)
        block = model.layers[0]
        for weight in (
            model.embed_tokens.weight,
            block.mixer.q_proj.weight,
            block.mlp.up_proj.weight,
        ):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        for weight in (block.mixer.o_proj.weight, block.mlp.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)

    def test_a_mixers_own_initialisation_stays(self):
        block = build("retnet", mixers={"retnet": {"heads": 2}}, dim=128, init_std=1e-3).layers[0]
        assert block.mixer.q_proj.weight.std() > 0.01
        assert block.mlp.up_proj.weight.std() < 0.01

    def test_lower_bounds_belong_to_the_model(self):
        model = build("softmax hgrn2", depth=4)
        names = [name for name, _ in model.named_parameters() if "bound" in name]
        assert names == ["lower_bounds.weight"]
        assert model.lower_bounds.weight.shape == (4, 16)
        model(tokens(), labels=tokens()).loss.backward()
        assert model.lower_bounds.weight.grad.abs().max() > 0
        assert model.layers[3].mixer.bound().min() > model.layers[1].mixer.bound().min() > 0


class TestPresets:
    @pytest.mark.parametrize(
        ("ratio", "full"),
        [
            (0, set(range(24))),
            (3, {3, 7, 11, 15, 19, 23}),
            (6, {6, 13, 20}),
            (12, {12}),
            (24, {23}),
            (None, set()),
            (float("inf"), set()),
        ],
    )
    def test_placement(self, ratio, full):
        pattern = hybrid("gla", ratio, depth=24).pattern
        assert {l for l, alias in enumerate(pattern) if alias == "softmax"} == full
        assert set(pattern) <= {"gla", "softmax"}

    def test_hybrid_options(self):
        mixers = {"gla": {"heads": 2}, "softmax": {"heads": 4}}
        assert hybrid("gla", None, mixers=mixers).mixers == {"gla": {"heads": 2}}
        with pytest.raises(ValueError, match="ratio must be a non-negative int"):
            hybrid(ratio=0.5)

    @pytest.mark.parametrize("linear", ["gated_deltanet", "hgrn2", "retnet", "gla", "deltanet"])
    @pytest.mark.parametrize("ratio", [0, 1, 3, None])
    @torch.no_grad()
    def test_hybrid_decodes(self, linear, ratio):
        sizes = {"dim": 16, "depth": 4, "vocab_size": VOCAB, "mlp_dim": 16}
        options = {"mixers": {linear: {"heads": 2}, "softmax": {"heads": 2}}}
        model = (
            create_model("hybrid", linear=linear, ratio=ratio, **sizes, **options).double().eval()
        )
        ids = tokens()
        close(decoded(model, ids, 11)[0], model(ids).logits)

    @torch.no_grad()
    def test_cache_grows_with_the_full_layers_alone(self):
        """Bytes measured while decoding: the growth is |F|/L of the Transformer's."""
        growth = {}
        for ratio in (0, 1, 3, 7, None):
            mixers = {"gated_deltanet": {"heads": 2, "head_dim": 4}, "softmax": {"heads": 2}}
            sizes = {"dim": 16, "depth": 8, "vocab_size": VOCAB, "mlp_dim": 0}
            model = CausalLM(hybrid(ratio=ratio, mixers=mixers, **sizes)).eval()
            held = []
            for T in (10, 30):
                _, cache = decoded(model, tokens(1, T), 8)
                tensors = [t for state in cache.states for t in state.tensors.values()]
                held.append(sum(t.numel() * t.element_size() for t in tensors))
                assert held[-1] == model.state_bytes(T)
            growth[ratio] = held[1] - held[0]
        assert growth[0] == 8 * 20 * 2 * 16 * 4
        assert [growth[0] / growth[r] for r in (1, 3, 7)] == [2, 4, 8]
        assert growth[None] == 0

    def test_kimi_linear(self):
        assert kimi_linear(depth=8).pattern == ("kimi_linear",) * 3 + ("mla",) + (
            "kimi_linear",
        ) * 3 + ("mla",)
        published = [
            l + 1 for l, alias in enumerate(kimi_linear(depth=27).pattern) if alias == "mla"
        ]
        assert published == [4, 8, 12, 16, 20, 24, 27]
        config = kimi_linear(dim=2048, heads=16, mixers={"mla": {"rope_dim": 32}})
        assert config.mixers["mla"]["latent_dim"] == 512
        assert config.mixers["mla"]["rope_dim"] == 32
        model = create_model("kimi_linear", dim=16, heads=2, depth=8, mlp_dim=16)
        full = CausalLM(
            CausalLMConfig(
                dim=16,
                depth=8,
                layers="mla",
                mlp_dim=16,
                mixers={"mla": model.config.mixers["mla"]},
            )
        )
        grown = [m.state_bytes(2000) - m.state_bytes(1000) for m in (model, full)]
        assert grown[1] == 4 * grown[0] > 0

    def test_based(self):
        def places(depth, alias):
            return [l for l, name in enumerate(based(depth=depth).pattern) if name == alias]

        assert places(27, "based") == [1, 6, 11, 16, 21]
        assert places(27, "window") == [2, 7, 12, 17, 22]
        assert places(36, "based") == [1, 6, 11, 16, 21, 27, 33]
        assert places(36, "window") == [2, 7, 12, 17, 22, 28, 34]
        assert based(depth=4).layers == "base_conv based window base_conv"
        model = create_model("based", dim=16, heads=2, feature_dim=4, window=5, vocab_size=VOCAB)
        assert model.config.inner_dim == 32
        assert model.lm_head.weight is model.embed_tokens.weight
        assert model.layers[2].mixer.window == 5
        assert model.state_bytes(50) == model.state_bytes(5000)

    def test_create_model_takes_patterns(self):
        model = create_model(
            "gla*3 softmax", dim=16, mixers={"gla": {"heads": 2}, "softmax": {"heads": 2}}
        )
        assert [type(block.mixer).__name__ for block in model.layers][2:] == [
            "GLA",
            "Softmax",
        ]


class TestCheckpoints:
    def test_tied_weights_stay_tied(self, tmp_path):
        build(tie_embeddings=True, dtype=torch.float32).save_pretrained(tmp_path)
        loaded = CausalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.embed_tokens.weight

    def test_shards_and_dtype(self, tmp_path):
        model = build(dtype=torch.float32)
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        files = {path.name for path in tmp_path.iterdir()}
        assert "model.safetensors" not in files
        assert "model.safetensors.index.json" in files
        loaded = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        model.save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors*"))) == 1
        torch.testing.assert_close(
            CausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict()
        )

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda w: w.pop("norm.weight"), "missing: norm.weight"),
            (lambda w: w.update({"more.weight": torch.ones(2)}), "unexpected: more.weight"),
            (
                lambda w: w.update({"norm.weight": torch.ones(3)}),
                r"another shape: norm.weight \[3\] instead of \[16\]",
            ),
        ],
        ids=["missing", "unexpected", "shape"],
    )
    def test_keys_that_do_not_fit(self, tmp_path, change, said):
        build(dtype=torch.float32).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            CausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("left", [0, 5, 3000])
    def test_truncated(self, tmp_path, left):
        build(dtype=torch.float32).save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(ValueError, match=f"checkpoint {tmp_path} is corrupt"):
            CausalLM.from_pretrained(tmp_path)

    def test_config_of_another_model(self, tmp_path):
        build(dtype=torch.float32).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"subquad"', '"llama"'))
        with pytest.raises(
            ValueError, match="model_type must be 'subquad', the config has 'llama'"
        ):
            CausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("where", ["weights", "config", "sync"])
    def test_full_disk_leaves_the_old_checkpoint(self, tmp_path, monkeypatch, where):
        folder = tmp_path / "model"
        build(dtype=torch.float32).save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        home = {
            "weights": "transformers.modeling_utils.safe_save_file",
            "config": "subquad.models.config.CausalLMConfig.save_pretrained",
            "sync": "os.fsync",
        }
        monkeypatch.setattr(home[where], full)
        with pytest.raises(OSError, match=r"was left as it was.*No space left") as caught:
            build("softmax", dtype=torch.float32).save_pretrained(folder)
        assert caught.value.errno == errno.ENOSPC
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_constants_come_back(self, tmp_path, monkeypatch):
        """A mixer's buffers that no checkpoint holds have their values after loading."""

        class Scaled(Softmax):
            def __init__(self, **options):
                super().__init__(**options)
                self.register_buffer("factor", torch.full((3,), 2.0), persistent=False)

        monkeypatch.setattr("subquad.mixers.softmax.Softmax", Scaled)
        build(dtype=torch.float32).save_pretrained(tmp_path)
        with poisoned():
            loaded = CausalLM.from_pretrained(tmp_path)
        assert loaded.layers[1].mixer.factor.tolist() == [2, 2, 2]

    def test_other_files_stay(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        build(dtype=torch.float32).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").read_text() == "{}"

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "model").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            build().save_pretrained(tmp_path / "model")


class TestAuto:
    @torch.no_grad()
    def test_in_a_fresh_process(self, tmp_path):
        model, ids = build(dtype=torch.float32), tokens()
        model.save_pretrained(tmp_path)
        code = f"""
import subquad, sys
assert "transformers" not in sys.modules
from transformers import AutoConfig
assert AutoConfig.from_pretrained({str(tmp_path)!r}).pattern == ("gated_deltanet", "softmax")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model) is subquad.CausalLM
assert not any(type(finder).__module__.startswith("subquad") for finder in sys.meta_path)
import torch
print(model(torch.tensor({ids.tolist()})).logits.sum().item())
"""
        printed = run_python(code)
        assert float(printed) == pytest.approx(model(ids).logits.sum().item(), abs=1e-4)

    def test_after_transformers(self):
        run_python(
            "from transformers import AutoConfig, AutoModelForCausalLM\n"
            "import subquad\n"
            "config = AutoConfig.for_model('subquad', dim=16, depth=1)\n"
            "assert type(AutoModelForCausalLM.from_config(config)) is subquad.CausalLM"
        )

    def test_after_the_model(self, tmp_path):
        """In this process the model was imported before the Auto classes."""
        from transformers import AutoModelForCausalLM

        build(dtype=torch.float32).save_pretrained(tmp_path)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CausalLM

    def test_public_names(self):
        assert subquad.CausalLM is CausalLM
        assert subquad.CausalLMConfig is CausalLMConfig
        assert subquad.create_model is create_model


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
