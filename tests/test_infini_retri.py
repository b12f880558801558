"""Facts of InfiniRetri: sentences, phrase scores, what survives, and how generation goes on."""

import pytest
import torch
from torch.nn.functional import one_hot

import subquad
from policy_kit import applied, close, tiny, tokens
from subquad.policies import InfiniRetri, Policy, SnapKV
from subquad.policies.base import Call, Tally
from subquad.policies.infini_retri import hit, sentences


class Letters:
    """A letter is a token."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) - 30 if c != "\n" else 1 for c in text]

    def decode(self, ids):
        return "".join("\n" if i == 1 else chr(i + 30) for i in ids)


TEXT = "A cat sat. A dog ran off! Did it rain? It cost 3.5 or so, e.g. a lot. The end."
LETTERS = Letters()


def _policy(**options):
    return InfiniRetri(**{"tokenizer": LETTERS, "window": 32, "topk": 6, "phrase": 4} | options)


def test_sentences():
    """Punctuation stays with its sentence, short rests stay with what they were cut from."""
    found = sentences(TEXT + "\n\nNew paragraph。And on")
    assert "".join(found) == TEXT + "\n\nNew paragraph。And on"
    assert found[:3] == ["A cat sat.", " A dog ran off!", " Did it rain?"]
    assert found[3] == " It cost 3."
    assert found[4] == "5 or so, e.g. a lot."
    assert sentences("") == []


@pytest.mark.parametrize("window", [5, 16, 1000])
def test_chunks(window):
    """All of the text, in order, in chunks that fit; a sentence that does not is cut at a space."""
    found = list(_policy(window=window).chunks(TEXT))
    assert LETTERS.decode([i for chunk in found for s in chunk for i in s]) == TEXT
    if window > 10:
        assert all(sum(map(len, chunk)) <= window for chunk in found)
    assert (len(found) == 1) == (window == 1000)


@pytest.mark.parametrize("phrase", [1, 2, 5, 8])
def test_phrases_are_scipys_convolution(phrase):
    signal = pytest.importorskip("scipy.signal")
    attention = torch.rand(3, 20, dtype=torch.float64)
    ones = torch.ones(1, phrase).numpy()
    by = torch.rand(3, dtype=torch.float64)
    want = torch.tensor(signal.convolve2d(attention.numpy(), ones, mode="same"))
    close(_policy(phrase=phrase).scores(attention, by), (by[:, None] ** 2 * want).sum(0))
    close(_policy(method=2).scores(attention, by), (by[:, None] ** 2 * attention).sum(0))
    close(_policy(method=1).scores(attention, by), attention.sum(0))


def test_hit():
    assert hit([[1, 2, 3], [4], [5, 6]], torch.tensor([5, 2])) == [[1, 2, 3], [5, 6]]
    assert hit([[1], [2]], torch.tensor([])) == []


def test_template():
    policy = _policy(template="Read: {context} Now {question} Answer:")
    parts = policy.parts("Read: a b Now c. Now what? Answer:")
    assert parts == ("Read: ", "a b Now c.", " Now ", "what? Answer:")
    with pytest.raises(ValueError, match="the prompt must be of the template"):
        policy.parts("a b Now what? Answer:")


@pytest.mark.parametrize("layer", [None, 0])
def test_looks_at_the_models_attention(layer):
    """A layer's queries and keys give the rows that the model itself returns."""
    from subquad.policies.parts.compress import weights

    model, ids = tiny(), tokens()
    with torch.no_grad(), applied(model, Policy()) as on:
        call = on.look(ids, layer)
    got = sum(a.sum(0) for a in weights(call.q[0, -9:], call.k[0], call.scale))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    close(got, attentions[-1 if layer is None else layer][0].sum(0)[-9:], 1e-6)


def planted(question):
    """``look`` of a model whose last layer looks at letters that are in the question."""
    asked = torch.tensor(LETTERS.encode(question))

    def look(ids, layer):
        k = 10 * one_hot(ids[0], 128).double()[None, :, None]
        q = torch.where(torch.isin(ids, asked)[..., None, None], k, 0 * k)
        return Call(SITE, q, k, k, None, 1.0, None, ids, lambda x, _: x)

    return look


SITE = subquad.policies.base.Site(0, 1, 1, 1, 128, None)


def test_the_needle_survives_every_window():
    """However long the text, what is kept is bounded, in order, and holds what was asked for."""
    hay, needle, question = "The mole dug a hole. ", "Key ZXQ is 7. ", "ZXQ"
    for length in (3, 30, 300):
        text = hay * length + needle + hay * length
        ids = torch.tensor([LETTERS.encode(f"{text}\n\n{question}")])
        kept = LETTERS.decode(_policy(window=64, topk=4).read(ids, planted(question))[0].tolist())
        assert "Key ZXQ is 7." in kept
        assert kept.endswith(question)
        assert len(kept) <= 4 * len(hay) + 5


def test_order_is_kept():
    text = "a Q here. nothing. b Q there. nothing. c Q last. "
    ids = torch.tensor([LETTERS.encode(f"{text}\n\nQ")])
    policy = _policy(window=20, topk=3, phrase=1)
    kept = LETTERS.decode(policy.read(ids, planted("Q"))[0].tolist())
    assert kept == "a Q here. b Q there. c Q last. \n\nQ"


def test_one_window_and_enough_tokens_keep_everything():
    ids = torch.tensor([LETTERS.encode(f"{TEXT}\n\nWhat?")])
    assert torch.equal(_policy(window=200, topk=200).read(ids, planted("What?")), ids)


def test_generation_goes_on_from_what_was_kept():
    """``generate`` under the policy = ``generate`` from the kept text, whatever was dropped."""
    model = tiny(vocab_size=128)
    ids = torch.tensor([LETTERS.encode(f"{TEXT * 3}\n\nWhat is it?")])
    with applied(model, _policy(topk=3)) as on:
        on.tally = Tally()
        kept = _policy(topk=3).read(ids, on.look)
        cache = on.new_cache()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert cache.get_seq_length() == out.shape[1] - 1
        assert cache.held[0].seen == kept.shape[1] + 5
        assert on.tally.decode.fraction < 1
        assert on.tally.prefill.visible == 2 * 4 * ids.shape[1] * (ids.shape[1] + 1) // 2
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
        mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
        same = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert kept.shape[1] < ids.shape[1]
    want = model.generate(kept, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, ids.shape[1] :], want[:, kept.shape[1] :])
    assert torch.equal(same[:, padded.shape[1] :], want[:, kept.shape[1] :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a positive int, got 0"),
        ({"topk": -2}, "topk must be a positive int, got -2"),
        ({"method": 4}, "method must be one of"),
        ({"template": "{question}{context}"}, "template must hold {context} and after it"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        InfiniRetri(**options)


def test_refusals():
    model = tiny()
    with pytest.raises(ValueError, match="tokenizer must be given"):
        subquad.apply(model, InfiniRetri())
    with pytest.raises(ValueError, match=r"layer_index must lie in 0\.\.1, got 2"):
        subquad.apply(model, _policy(layer_index=2))
    with pytest.raises(ValueError, match="reads the prompt in its own way, alone"):
        InfiniRetri() + SnapKV()
    with applied(model, _policy()) as on:
        with pytest.raises(ValueError, match="InfiniRetri needs input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64))
        assert on.watched is None
