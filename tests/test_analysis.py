"""Analyses of pretrained decoders: the sheets' facts, on made maps and small random models."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import subquad
from subquad.analysis import retrieval_heads as rh
from subquad.analysis import secondary_sinks as ss
from subquad.analysis import words
from subquad.analysis.watch import Watch, row

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})).eval()


def logits(model, ids, steps=3):
    """Of a prompt and some single-token steps."""
    with torch.inference_mode():
        out = model(ids[:, :-steps], use_cache=True)
        found = [out.logits[:, -1]]
        for t in ids[:, -steps:].split(1, 1):
            out = model(t, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found)


class TestScore:
    IDS = torch.tensor([9, 1, 2, 3, 9, 9])
    SPAN = (1, 4)

    def test_a_copy_head_scores_one_others_nothing(self):
        said = [1, 2, 3]
        looked = torch.tensor([[[1, 0, 5]], [[2, 0, 6]], [[3, 0, 7]]])  # copy, sink, recency
        torch.testing.assert_close(
            rh.score(looked, said, self.IDS, self.SPAN), torch.tensor([[1.0, 0.0, 0.0]])
        )

    def test_a_look_at_another_token_of_the_needle_is_no_copy(self):
        looked = torch.tensor([[[2]], [[3]], [[1]]])
        assert rh.score(looked, [1, 2, 3], self.IDS, self.SPAN).item() == 0

    def test_repeated_copies_count_once_as_a_set(self):
        looked = torch.tensor([[[1]], [[1]], [[2]]])
        raw = rh.score(looked, [1, 1, 2], self.IDS, self.SPAN)
        one = rh.score(looked, [1, 1, 2], self.IDS, self.SPAN, dedup=True)
        assert raw.item() == pytest.approx(1.0)
        assert one.item() == pytest.approx(2 / 3)
        assert torch.equal(
            rh.score(looked[1:], [1, 2], self.IDS, self.SPAN),
            rh.score(looked[1:], [1, 2], self.IDS, self.SPAN, dedup=True),
        )

    @pytest.mark.parametrize(("shape", "apart"), [((32, 32), 100), ((4, 8), 3)])
    def test_random_heads_are_none_of_the_best(self, shape, apart):
        scores = torch.linspace(0, 0.09, shape[0] * shape[1]).view(shape).flip(0)
        scores[1, :3] = 0.5
        found = rh.RetrievalScores(scores, scores[None], 1)
        others = found.others()
        assert len(others) == scores.numel() - apart
        assert not set(others) & set(found.top(apart))
        assert set(found.heads()) == {(1, 0), (1, 1), (1, 2)}

    def test_wrong_spans(self):
        for span in ((3, 3), (-1, 2), (2, 9)):
            with pytest.raises(ValueError, match="span"):
                rh.score(torch.zeros(1, 1, 1, dtype=torch.int64), [1], self.IDS, span)

    def test_the_needle_is_found_by_overlap(self):
        needle = list(range(100, 111))
        ids = [1, 2, *needle[:-1], 77, 3]
        assert rh.locate(ids, needle)[0] in (1, 2)
        with pytest.raises(ValueError, match="needle"):
            rh.locate([1, 2, 3], [4, 5])

    def test_recall_counts_words(self):
        assert rh.recall("Eat a sandwich", "a SANDWICH, eat!") == 1
        assert rh.recall("a a b", "a") == pytest.approx(1 / 3)
        assert rh.recall("hopping ponies", "a pony hopped") == 1

    def test_stems(self):
        """Porter's own examples, some of each of his steps."""
        pairs = (
            "caresses caress, ponies poni, feed feed, agreed agre, plastered plaster, sing sing, "
            "conflated conflat, troubled troubl, sized size, hopping hop, falling fall, is is, "
            "filing file, happy happi, sky sky, conditional condit, rational ration, "
            "vietnamization vietnam, operator oper, hopefulness hope, sensibility sensibl, "
            "triplicate triplic, formalize formal, revival reviv, replacement replac, "
            "adoption adopt, probate probat, rate rate, cease ceas, controlling control, "
            "generalizations gener, oscillators oscil, roll roll, fizzed fizz"
        )
        for pair in pairs.split(", "):
            word, expected = pair.split()
            assert words.stem(word) == expected


class TestWatch:
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize(
        "model",
        [
            llama(),
            MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval(),
        ],
        ids=["llama", "mistral"],
    )
    def test_watching_changes_nothing(self, model):
        before = model.config._attn_implementation
        want = logits(model, self.ids)
        with Watch(model, rows=True) as watch:
            assert torch.equal(logits(model, self.ids), want)
        assert model.config._attn_implementation == before
        for rows in watch.rows.values():
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))

    def test_rows_are_those_of_eager_attention(self):
        model = llama()
        with torch.inference_mode(), Watch(model, rows=True) as watch:
            past = model(self.ids[:, :-1], use_cache=True).past_key_values
            model(self.ids[:, -1:], past_key_values=past, use_cache=True)
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            maps = model(self.ids, output_attentions=True).attentions
        for layer, rows in watch.rows.items():
            torch.testing.assert_close(rows, maps[layer][:, :, -1], atol=1e-5, rtol=1e-4)

    def test_a_windows_rows_are_placed_in_the_whole_text(self):
        """Its cache holds the last tokens alone: a needle before them is never looked at."""
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval()
        ids, tokenizer = self.ids[0], SimpleNamespace(eos_token_id=None, decode=lambda said: "")
        with Watch(model, rows=True) as watch:
            _, looked = rh._answer(model, tokenizer, ids, rh._read(model, ids), 4, watch)
        for step, places in enumerate(looked):
            assert len(ids) + step - 6 <= places.min()
            assert places.max() < len(ids) + step

    def test_padding_draws_nothing(self):
        model, padding = llama(), torch.ones(2, 20, dtype=torch.int64)
        padding[1, :5] = 0
        with torch.inference_mode(), Watch(model, rows=True) as watch:
            past = model(self.ids[:, :-1], attention_mask=padding[:, :-1]).past_key_values
            model(self.ids[:, -1:], attention_mask=padding, past_key_values=past)
        assert float(watch.rows[0][1, :, :5].abs().max()) == 0

    def test_uniform_is_the_mean_value(self):
        q, k = torch.zeros(1, 2, 1, 8), torch.randn(1, 1, 7, 8)
        torch.testing.assert_close(row(q, k, None, None), torch.full((1, 2, 7), 1 / 7))

    @pytest.mark.parametrize("phase", ["decode", "all"])
    @pytest.mark.parametrize("mode", ["uniform", "zero"])
    def test_ablation_is_that_of_the_output(self, mode, phase):
        """Against eager attention with the head's output replaced by hand."""
        model, heads = llama(), [(1, 2)]
        want, outs = logits(model, self.ids), []
        with Watch(model, heads=heads, mode=mode, phase=phase):
            got = logits(model, self.ids)
            handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
                lambda m, a: outs.append(a[0][..., 16:24])
            )
            logits(model, self.ids)
            handle.remove()
        assert not torch.allclose(got[1:], want[1:])
        assert torch.equal(got[0], want[0]) == (phase == "decode")
        if mode == "zero":
            assert float(outs[-1].abs().max()) == 0

    def test_no_head_is_the_plain_model(self):
        model = llama()
        want = logits(model, self.ids)
        with Watch(model, heads=[]):
            assert torch.equal(logits(model, self.ids), want)

    def test_an_exception_restores_the_model(self):
        model = llama()
        before = model.config._attn_implementation
        with pytest.raises(RuntimeError), Watch(model):
            raise RuntimeError
        assert model.config._attn_implementation == before

    def test_wrong_heads_and_modes(self):
        model = llama()
        with pytest.raises(ValueError, match="heads"):
            Watch(model, heads=[(3, 0)])
        with pytest.raises(ValueError, match="mode"):
            Watch(model, mode="mean")
        with Watch(model), pytest.raises(ValueError, match="watched"), Watch(model):
            pass


def planted(layers=20, tokens=12, width=16, first=6, life=9, at=5):
    """Hidden states with a primary sink at 0 and a secondary one."""
    h = torch.randn(layers, tokens, width, generator=torch.Generator().manual_seed(2))
    primary = F.normalize(torch.arange(1.0, width + 1), dim=0)
    h[2:18, 0] = 100 * primary
    h[first : first + life, at] = -7 * primary + 0.1 * h[first : first + life, at]
    return h


class TestSinks:
    def test_clip(self):
        norms = torch.ones(30)
        norms[3:26] = 50
        assert ss.clip(norms) == (3, 26)
        assert ss.clip(torch.arange(10.0))[1] == 10

    def test_finds_the_planted_one(self):
        found = ss.detect(planted())
        assert (found.primary, found.start, found.end) == (0, 2, 18)
        (sink,) = [s for s in found.sinks if s.label != ss.NOISE]
        assert (sink.position, sink.first, sink.lifetime, sink.label) == (5, 6, 9, ss.SECONDARY)
        assert ss.levels([found]) == {(6, 9): 1}

    def test_scale_sign_and_rotation_change_nothing(self):
        h = planted().double()
        want = ss.detect(h)
        turned = h @ torch.linalg.qr(torch.randn(16, 16).double())[0]
        assert ss.detect(turned) == want
        h[:, 5] *= -3
        assert ss.detect(h) == want

    def test_labels_at_their_borders(self):
        assert ss.label(4, 40) == ss.NOISE
        assert ss.label(5, 40) == ss.SECONDARY
        assert ss.label(40 - 13, 40) == ss.PRIMARY
        assert ss.label(24, 40, max_gap=15) == ss.SECONDARY
        assert ss.label(25, 40, max_gap=15) == ss.PRIMARY

    def test_padding_is_left_out(self):
        real = torch.ones(12, dtype=torch.bool)
        real[5] = False
        assert all(s.position != 5 for s in ss.detect(planted(), real=real).sinks)

    def test_scores_streamed_and_dense(self):
        q, k = torch.randn(33, 4, 8), torch.randn(33, 2, 8)
        scores = torch.einsum("ihk,jhk->hij", q, k.repeat_interleave(2, 1)) * 0.3
        maps = (scores + torch.full((33, 33), -torch.inf).triu(1)).softmax(-1)
        torch.testing.assert_close(maps.sum(-2).mean(0).sum(), torch.tensor(33.0))
        for block in (7, 64):
            torch.testing.assert_close(
                ss.streamed_sink_score(q, k, 0.3, block), ss.sink_score(maps)
            )
        near = scores.masked_fill(~torch.ones(33, 33).tril().triu(-4).bool(), -torch.inf)
        want = near.softmax(-1).sum(-2).mean(0) / torch.arange(33, 0, -1).clamp_max(5)
        torch.testing.assert_close(ss.streamed_sink_score(q, k, 0.3, 7, window=5), want)

    def test_layers_keep_their_own_scale_and_window(self):
        sizes = {**SIZES, "sliding_window": 6}
        seen = ss.capture(MistralForCausalLM(MistralConfig(**sizes)).eval(), torch.arange(20))
        assert set(seen.windows) == {6}
        assert seen.scales == [pytest.approx(seen.qkv[0][0].shape[-1] ** -0.5)] * len(seen.qkv)

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="hidden"):
            ss.detect(torch.randn(3, 4))
        with pytest.raises(ValueError, match="bos"):
            ss.detect(torch.randn(3, 4, 5), bos=[4])
        with pytest.raises(ValueError, match="layer"), ss.steer(llama(), 3, 1.0):
            pass


def test_a_planted_sink_is_found_made_longer_and_steered_away():
    """Layer 0's MLP makes the primary sink; layer 2's adds to it and makes a secondary one."""
    model = llama(num_hidden_layers=10, num_key_value_heads=4)
    ids = torch.arange(1, 21)
    sink = F.normalize(torch.randn(32), dim=0)
    layers = ss.layers_of(model)
    for layer, gains in ((0, {0: 300.0}), (2, {0: 90.0, 9: 90.0})):
        inner = ss.capture(model, ids).mlp[layer]["product"]
        wanted = torch.zeros(len(ids)).index_put(
            (torch.tensor(list(gains)),), torch.tensor(list(gains.values()))
        )
        with (
            torch.no_grad()
        ):  # answers these tokens with the sink's direction, the others as before
            w = torch.linalg.pinv(inner.double()) @ wanted.double()
            layers[layer].mlp.down_proj.weight += torch.outer(sink, w.float())
    found = ss.detect(ss.capture(model, ids).hidden, max_gap=1)
    sinks = {s.position: s for s in found.sinks}
    assert found.primary == 0
    assert sinks[9].first == 2
    assert sinks[9].lifetime >= 5
    cos = ss.mlp_similarity(ss.capture(model, ids).mlp[2], 0)
    assert set(cos) == set(ss.MLP)
    assert cos["down"][9] > 0.95
    with ss.steer(model, 2, 0.0, made=0.9):
        damped = ss.detect(ss.capture(model, ids).hidden, max_gap=1)
    assert all(s.position != 9 or s.first > 2 for s in damped.sinks)
    again = ss.detect(ss.capture(model, ids).hidden, max_gap=1)
    assert again == found


@pytest.fixture(scope="module")
def needle(request):
    shared = Path(__file__).resolve().parents[2] / "shared" / "models" / "needle-16m"
    if not shared.is_dir():
        pytest.skip("no shared/models/needle-16m beside the checkout")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32).eval()
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(shared))


class TestNeedle:
    def test_retrieval_heads(self, needle, tmp_path):
        found = subquad.analyse(
            needle.model, needle.tokenizer, "retrieval_heads",
            length=256, samples=4, tests=4, ablate=4, draws=1,
        )  # fmt: skip
        summary = found.summary()
        assert 0 < len(summary["heads"]) < 0.25 * found.found.scores.numel()
        last = summary["ablation"][-1]
        assert last["best"] < summary["accuracy"] - 0.3
        assert last["best"] < last["random"]
        assert all(path.stat().st_size > 1000 for path in found.draw(tmp_path))

    def test_the_authors_prompt(self, needle):
        text = "The grass is green. The sky is blue. " * 60
        sample = rh.in_haystack(needle.tokenizer, text, " Eat 7 pies. ", "What to eat?", 400, 0.5)
        s, e = sample.span
        assert "pies" in needle.tokenizer.decode(sample.ids[s:e])
        with pytest.raises(ValueError, match="depth"):
            rh.in_haystack(needle.tokenizer, text, "a", "b", 400, 1.5)
        with pytest.raises(ValueError, match="length"):
            rh.in_haystack(needle.tokenizer, text, "a", "b", 100, 0.5)

    def test_secondary_sinks(self, needle, tmp_path):
        found = subquad.analyse(
            needle.model, needle.tokenizer, "secondary_sinks", length=128, samples=1
        )
        assert found.summary()["layers"] == 8
        assert found.lines()
        assert found.draw(tmp_path)[0].exists()


def test_wrong_options():
    with pytest.raises(ValueError, match="what"):
        subquad.analyse(None, None, "heads")
    with pytest.raises(ValueError, match=r"options.*did you mean 'samples'"):
        subquad.analyse(None, None, "retrieval_heads", sample=3)
    with pytest.raises(ValueError, match="length"):
        subquad.analyse(None, None, "retrieval_heads", length=0)
