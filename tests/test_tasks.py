"""Tasks: labels that an oracle finds in the inputs, no answer shown twice, the authors' data."""

import math
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from subquad.tasks import EVAL_SEEDS, IGNORED, TASKS, create_task
from subquad.tasks.haystack import Background, fill, insert
from subquad.tasks.listops import CLOSE, evaluate
from subquad.tasks.mqar import MQAR, slot_weights
from subquad.tasks.niah import ASK, IS, NEEDLE
from subquad.tasks.passkey import PasskeyText
from subquad.tasks.prose import NOISE, essay
from subquad.tasks.ruler import FORMS, NIAHText
from subquad.tasks.state_tracking import permutations, products
from subquad.tasks.text import split
from subquad.tasks.tokens import encode, encode_all
from subquad.tasks.words import NEEDLE_ADJECTIVES, NEEDLE_NOUNS

# Every task, small, in each of its variants.
SMALL = [
    ("mqar", {"pairs": 4}),
    ("mqar", {"pairs": 4, "fill": "random"}),
    ("mqar", {"pairs": 6, "forgets": 3}),
    ("mqar", {"pairs": 5, "num_passes": 2}),
    ("induction", {"length": 20}),
    ("copy", {"segment": 7}),
    ("copy", {"segment": 7, "blanks": False}),
    ("selective_copy", {"context": 40, "items": 9}),
    ("passkey", {"length": 128}),
    ("passkey_text", {"length": 600}),
    ("niah", {"length": 128}),
    ("niah", {"length": 128, "kind": "multikey", "key_tokens": 2, "value_tokens": 3}),
    ("niah", {"length": 128, "kind": "multikey", "distractors": "full"}),
    ("niah", {"length": 128, "kind": "multivalue"}),
    ("niah", {"length": 128, "kind": "multiquery", "value_tokens": 2}),
    ("niah_text", {"length": 1024}),
    ("parity", {"length": 20}),
    ("parity", {"length": 20, "last_only": True}),
    ("group", {"group": "A5", "length": 12}),
    ("group", {"group": "S5", "length": 12, "swaps": True}),
    ("listops", {"length": 60, "shortest": 5}),
    ("text", {"length": 32}),
]
each_task = pytest.mark.parametrize(("name", "options"), SMALL)


def perfect(batch, vocab: int) -> torch.Tensor:
    """Logits that are sure of the labels."""
    return 20.0 * F.one_hot(batch.labels.clamp_min(0), vocab).float()


@each_task
class TestContract:
    def test_same_seed_same_data(self, name, options):
        a = create_task(name, **options).batch(6, 3)
        b = create_task(name, **options).batch(6, 3)
        other = create_task(name, **options).batch(6, 4)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.labels, other.labels) or name == "passkey"

    def test_ids_fit_the_vocabulary(self, name, options):
        task = create_task(name, **options)
        batch = task.batch(6, 0)
        assert batch.inputs.dtype == batch.labels.dtype == torch.int64
        assert batch.inputs.shape == batch.labels.shape
        assert batch.inputs.shape[1] <= task.length
        assert batch.inputs.min() >= 0
        assert batch.inputs.max() < task.vocab_size
        scored = batch.labels[batch.labels != IGNORED]
        assert scored.min() >= 0
        assert scored.max() < task.vocab_size
        assert (batch.labels != IGNORED).any(1).all()

    def test_scores_of_the_perfect_and_of_the_random(self, name, options):
        task = create_task(name, **options)
        batch = task.batch(48, 0)
        best = task.score(perfect(batch, task.vocab_size), batch)
        assert best["accuracy"] == 1
        assert best["loss"] < 1e-3
        assert task.metric in best
        noise = torch.randn(*batch.labels.shape, task.vocab_size)
        chance = task.score(noise, batch)["accuracy"]
        scored = int((batch.labels != IGNORED).sum())
        # A multi-value question has four right answers.
        expected = (1 + 3 * (options.get("kind") == "multivalue")) / task.vocab_size
        assert abs(chance - expected) < 4 * (expected / scored) ** 0.5 + 1e-9

    def test_bad_calls_are_refused(self, name, options):
        task = create_task(name, **options)
        with pytest.raises(ValueError, match="n must be a positive int, got 0"):
            task.batch(0, 1)
        with pytest.raises(ValueError, match="seed must be a non-negative int, got -1"):
            task.batch(1, -1)
        batch = task.batch(2, 0)
        with pytest.raises(ValueError, match=r"logits must be \[n,T,vocab\]"):
            task.score(torch.zeros(2, task.vocab_size), batch)

    def test_options_change_the_stream(self, name, options):
        task = create_task(name, **options)
        drawn = task.generator(0).integers(2**60)
        assert drawn != create_task("induction", length=33).generator(0).integers(2**60)
        assert drawn != task.generator(EVAL_SEEDS).integers(2**60)


def test_every_task_is_tested():
    assert {name for name, _ in SMALL} == set(TASKS) - {"images"}  # has tests of its own


BAD = [
    ("mqra", {}, "did you mean 'mqar'"),
    ("mqar", {"pair": 3}, "did you mean 'pairs'"),
    ("mqar", {"length": 63}, "length must be even, got 63"),
    ("mqar", {"vocab_size": 64}, "vocab_size must be larger than length=64, got 64"),
    ("mqar", {"pairs": 17}, "pairs must be an int in 1..16"),
    ("mqar", {"pairs": 14, "forgets": 8}, "pairs must be an int in 1..12"),
    ("mqar", {"pairs": 4, "forgets": 5}, "forgets must be an int in 0..4"),
    ("mqar", {"pairs": 11, "num_passes": 2}, "pairs must be an int in 1..10"),
    ("mqar", {"fill": "noise"}, "fill must be one of"),
    ("mqar", {"power": 0.0}, "power must be positive, got 0.0"),
    ("induction", {"length": 2}, "at least 3"),
    ("copy", {"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
    ("copy", {"segment": 0}, "segment must be a positive int, got 0"),
    ("selective_copy", {"items": 300}, "items must be an int in 1..256"),
    ("passkey", {"length": 10}, "length must be at least 11, got 10"),
    ("passkey", {"vocab_size": 12}, "vocab_size must be at least 13, got 12"),
    ("passkey", {"depth": 1.5}, "depth must lie in 0..1"),
    ("passkey_text", {"length": 100}, "length must leave room for"),
    ("passkey_text", {"tokenizer": object()}, "tokenizer must have encode"),
    ("niah", {"kind": "multi"}, "did you mean"),
    ("niah", {"length": 16, "kind": "multikey"}, "length must be at least 18"),
    ("niah", {"length": 512, "distractors": "full"}, "needles must be at most 41"),
    ("niah", {"kind": "multivalue", "value_tokens": 2}, "value_tokens must be 1"),
    ("niah", {"kind": "multiquery", "depth": 0.5}, "depth must be None"),
    ("niah", {"key_tokens": 4}, "key_tokens must be an int in 1..3"),
    ("niah_text", {"task": "single_4"}, "did you mean"),
    ("niah_text", {"task": "multiquery", "keys": 3}, "keys must be at least 4"),
    ("niah_text", {"length": 300}, "length must leave room for"),
    ("parity", {"length": 0}, "length must be a positive int, got 0"),
    ("group", {"group": "D4"}, "group must be S<n>"),
    ("group", {"group": "S7"}, "at most 1024 elements"),
    ("group", {"group": "A5", "swaps": True}, "swaps must go with"),
    ("listops", {"arguments": 1}, "arguments must be at least 2, got 1"),
    ("listops", {"length": 20}, "length must be at least shortest"),
    ("text", {"path": "/no/such/place"}, "path must be a file or a folder"),
    ("text", {"length": 10**10}, "length must be less than"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_task(name, **options).batch(1, 0)


# --- MQAR ---------------------------------------------------------------------------------------


def look_up(batch, row: int, start: int) -> list[int]:
    """The labels of a row by a dictionary of the pairs before ``start``."""
    ids = batch.inputs[row].tolist()
    known = dict(zip(ids[0:start:2], ids[1:start:2], strict=True))
    asked = [t for t in range(start, len(ids)) if batch.labels[row, t] != IGNORED]
    return [known[ids[t]] for t in asked]


@pytest.mark.parametrize(
    "options",
    [{"pairs": 4}, {"pairs": 4, "fill": "random"}, {"pairs": 6, "forgets": 4}]
    + [{"pairs": 5, "num_passes": 2, "forgets": 2}, {"vocab_size": 8192, "length": 512}],
)
def test_mqar_dictionary_finds_every_answer(options):
    task = create_task("mqar", **options)
    batch = task.batch(16, 0)
    start = task.length - 2 * task.space
    for row in range(16):
        labels = batch.labels[row]
        wanted = labels[labels != IGNORED].tolist()
        assert look_up(batch, row, start) == wanted
        assert len(wanted) == task.pairs
        if options.get("fill") != "random":
            # The answer stands in the list alone, once for every time that it is read out.
            counts = Counter(batch.inputs[row].tolist())
            shown = [task.num_passes, 1]
            assert all(counts[value] in shown for value in wanted)
            assert not set(wanted) & set(batch.inputs[row, start:].tolist())


def test_mqar_forgetting_asks_the_newest():
    task = create_task("mqar", pairs=6, forgets=3)
    batch = task.batch(32, 0)
    newer = batch.inputs[:, 13:18:2]
    older = [dict(batch.inputs[r, :12].view(6, 2).tolist()) for r in range(32)]
    places = []
    for row in range(32):
        keys = batch.inputs[row, 12:18:2].tolist()
        labels = batch.labels[row]
        assert len(set(keys)) == 3
        assert set(keys) <= set(older[row])
        assert set(newer[row].tolist()) <= set(labels.tolist())
        assert not {older[row][key] for key in keys} & set(labels.tolist())
        places += [list(older[row]).index(key) for key in keys]
    assert set(places) == set(range(6))  # any of the pairs, not always the first


@pytest.mark.parametrize(
    ("name", "options", "seed"),
    [
        ("mqar_a", {"vocab_size": 128, "length": 64, "pairs": 8}, 0),
        ("mqar_b", {"vocab_size": 256, "length": 96, "pairs": 16}, 1),
    ],
)
def test_mqar_golden(shared, name, options, seed):
    """The authors' draws, made by the same calls to numpy's old generator: equal to the bit."""
    golden = load_file(shared / "golden" / "eval_tasks.safetensors")
    task = MQAR(**options)
    half, D, n = task.vocab_size // 2, task.pairs, 8
    np.random.seed(seed)  # noqa: NPY002

    def draw(pool, **more):
        rows = np.tile(pool, (n, 1))
        choice = np.random.choice
        return np.apply_along_axis(choice, 1, rows, replace=False, size=D, **more)

    keys = draw(np.arange(1, half))
    values = draw(np.arange(half, 2 * half))
    slots = draw(np.arange(task.space), p=slot_weights(task.space, task.power))
    inputs, labels = task.arrange(keys, values, slots, np.empty((n, 0), dtype=int))
    assert np.array_equal(inputs, golden[f"{name}.inputs"])
    assert np.array_equal(labels, golden[f"{name}.labels"])


def test_mqar_asks_early_as_the_weights_say():
    """The first slot drawn, over many rows, follows the power law."""
    task = create_task("mqar", pairs=1, length=16, power=0.3)
    batch = task.batch(20_000, 0)
    slots = ((batch.labels != IGNORED).int().argmax(1) - 2) // 2
    seen = torch.bincount(slots, minlength=task.space) / 20_000
    wanted = torch.tensor(slot_weights(task.space, 0.3))
    assert (seen - wanted).abs().max() < 0.015


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_mqar_holds_its_constraints(pairs, forgets, passes, seed):
    forgets = min(forgets, pairs)
    length = 2 * (pairs * passes + forgets) + 2 * pairs
    task = MQAR(
        vocab_size=length + 4, length=length, pairs=pairs, forgets=forgets, num_passes=passes
    )
    batch = task.batch(2, seed)
    assert ((batch.labels != IGNORED).sum(1) == pairs).all()
    start = length - 2 * task.space
    for row in range(2):
        assert look_up(batch, row, start) == batch.labels[row][batch.labels[row] != -100].tolist()


# --- copying ------------------------------------------------------------------------------------


def test_induction_answer_follows_the_trigger():
    task = create_task("induction", vocab_size=40, length=24)
    batch = task.batch(200, 0)
    trigger = batch.inputs == 39
    assert (trigger.sum(1) == 2).all()
    assert trigger[:, -1].all()
    at = trigger.int().argmax(1)
    assert set(at.tolist()) == set(range(22))  # i < T - 2
    assert torch.equal(batch.inputs[torch.arange(200), at + 1], batch.labels[:, -1])
    assert (batch.labels[:, :-1] == IGNORED).all()


@pytest.mark.parametrize("blanks", [True, False])
def test_copy(blanks):
    task = create_task("copy", segment=9, blanks=blanks)
    batch = task.batch(8, 0)
    assert batch.inputs.shape == (8, task.length)
    assert torch.equal(batch.labels[:, -9:], batch.inputs[:, :9])
    assert (batch.inputs[:, 9] == 1).all()
    behind = batch.inputs[:, 10:]
    assert torch.equal(behind, torch.zeros(8, 9).long() if blanks else batch.inputs[:, :8])


def test_selective_copy_asks_in_order():
    task = create_task("selective_copy", context=60, items=12)
    batch = task.batch(16, 0)
    for row in range(16):
        front = batch.inputs[row, :60]
        assert front[front > 1].tolist() == batch.labels[row, 60:].tolist()
    assert (batch.inputs[:, 60:] == 1).all()


# --- state tracking -----------------------------------------------------------------------------


def matrices(group: str) -> np.ndarray:
    """Permutation matrices M[p[i], i] = 1, whose product is the matrix of p*q."""
    return np.eye(permutations(group).shape[1])[:, permutations(group)].transpose(1, 0, 2)


@pytest.mark.parametrize(
    ("group", "order", "swaps"),
    [("S5", 120, False), ("S5", 120, True), ("A5", 60, False), ("Z60", 60, False)]
    + [("A4xZ5", 60, False), ("S2", 2, False), ("Z1", 1, False)],
)
def test_group_by_matrix_multiplication(group, order, swaps):
    task = create_task("group", group=group, length=9, swaps=swaps)
    assert task.vocab_size == order
    elements = permutations(group)
    assert np.array_equal(elements, np.array(sorted(elements.tolist())))  # lexicographic
    batch = task.batch(4, 0)
    M = matrices(group)
    for row in range(4):
        product = np.eye(M.shape[1])
        for token, label in zip(batch.inputs[row], batch.labels[row], strict=True):
            product = product @ M[token]
            assert np.array_equal(product, M[label])


def test_groups_are_the_groups_that_they_say():
    """Orders of elements and commutativity tell them apart."""
    for group, abelian in (("S5", False), ("A5", False), ("A4xZ5", False), ("Z60", True)):
        table = products(group)
        assert np.array_equal(table, table.T) == abelian
        assert all(len(set(row)) == len(row) for row in table.tolist())
    moved = (permutations("S5") != np.arange(5)).sum(1)
    tokens = create_task("group", length=64, swaps=True).batch(16, 0).inputs.unique()
    assert tokens.tolist() == np.flatnonzero(moved == 2).tolist()
    assert len(tokens) == 10


def test_parity_is_the_word_problem_of_s2():
    batch = create_task("parity", length=50).batch(8, 0)
    table = products("S2")
    for row in range(8):
        state = 0
        for token, label in zip(batch.inputs[row], batch.labels[row], strict=True):
            state = table[state, token]
            assert state == label
    last = create_task("parity", length=50, last_only=True).batch(8, 0)
    assert (last.inputs[:, -1] == 2).all()
    assert torch.equal(last.labels[:, -1], last.inputs[:, :-1].sum(1) % 2)


# --- needles as tokens --------------------------------------------------------------------------


def test_passkey_tokens():
    batch = create_task("passkey", length=128).batch(64, 0)
    for row in range(64):
        ids = batch.inputs[row].tolist()
        at = ids.index(62)
        assert ids[at + 1 : at + 6] == batch.labels[row, -5:].tolist()
        assert ids[-5] == 63
        assert ids[-4:] == ids[at + 1 : at + 5]
        # Once in the needle and, all but the last, once under teacher forcing.
        assert sum(i < 10 for i in ids) == 9
        assert ids.count(62) == ids.count(63) == 1
    assert sorted((batch.meta["depth"] * 64).floor().clamp(max=63).tolist()) == pytest.approx(
        list(range(64)), abs=1.01
    )


@pytest.mark.parametrize("options", [o for n, o in SMALL if n == "niah"])
@pytest.mark.parametrize("length", [128, 500])
def test_niah_dictionary_finds_every_answer(options, length):
    options = {**options, "length": length, "vocab_size": 500}
    task = create_task("niah", **options)
    batch = task.batch(12, 0)
    k, m = task.key_tokens, task.value_tokens
    for row in range(12):
        ids, labels = batch.inputs[row].tolist(), batch.labels[row].tolist()
        known = {}
        starts = [t for t, token in enumerate(ids) if token == NEEDLE]
        assert len(starts) == task.needles
        for t in starts:
            key, value = ids[t + 1 : t + 1 + k], ids[t + 2 + k : t + 2 + k + m]
            assert ids[t + 1 + k] == IS
            known.setdefault(tuple(key), []).append(value)
        questions = [t for t, token in enumerate(ids) if token == ASK]
        assert len(questions) == task.asked
        for number, t in enumerate(questions):
            values = known[tuple(ids[t + 1 : t + 1 + k])]
            answer = labels[t + k : t + k + m]
            assert answer == values[number if task.kind == "multivalue" else 0]
            assert ids[t + k + 1 : t + k + m] == answer[:-1]
            first = [value[0] for values in known.values() for value in values]
            shown = ids.count(answer[0])
            assert m > 1 or shown == first.count(answer[0]) == 1
    if task.kind == "multivalue":
        assert all(len(v) == (4 if len(v) > 1 else 1) for v in known.values())


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("kind", ["single", "multikey"])
def test_niah_depth_is_the_one_asked_for(kind, depth):
    task = create_task("niah", kind=kind, depth=depth, vocab_size=300)
    batch = task.batch(32, 0)
    for row in range(32):
        ids = batch.inputs[row].tolist()
        key = ids[ids.index(ASK) + 1]
        place = ids.index(key) - 1
        assert abs(place - depth * (task.haystack - task.width)) <= task.width
        assert batch.meta["depth"][row] == pytest.approx(place / (task.haystack - task.width))


def test_niah_multivalue_takes_any_order_but_no_value_twice():
    task = create_task("niah", kind="multivalue")
    batch = task.batch(8, 0)
    places = batch.labels != IGNORED
    answers = batch.labels[places].view(8, 4)

    def scored(given):
        logits = torch.zeros(8, task.length, task.vocab_size)
        rows, columns = places.nonzero(as_tuple=True)
        logits[rows, columns, given.flatten()] = 1
        return task.score(logits, batch)

    assert scored(answers.flip(1))["accuracy"] == 1
    assert scored(answers.flip(1))["exact_match"] == 1
    once = scored(answers[:, :1].expand(-1, 4))
    assert once["accuracy"] == 0.25
    assert once["exact_match"] == 0


def test_a_window_reaches_needles_within_layers_times_window():
    """The answer cannot depend on a needle farther away, and does on one that is nearer."""
    pytest.importorskip("transformers")
    from subquad.models.causal_lm import CausalLM, CausalLMConfig

    window, depth = 16, 2
    torch.manual_seed(0)
    mixers = {"softmax": {"heads": 2, "window": window}}
    config = CausalLMConfig(vocab_size=128, dim=32, depth=depth, layers="softmax", mixers=mixers)
    model = CausalLM(config).eval()
    for place, seen in ((1.0, True), (0.95, True), (0.7, False), (0.0, False)):
        task = create_task("niah", length=128, depth=place)
        inputs = task.batch(1, 0).inputs
        value = (inputs[0] == NEEDLE).nonzero().item() + task.width - 1
        assert (127 - value <= depth * (window - 1)) == seen
        other = inputs.clone()
        other[0, value] += 1
        with torch.no_grad():
            a, b = (model(x, use_cache=False).logits[0, -1] for x in (inputs, other))
        assert torch.equal(a, b) != seen


# --- needles in text ----------------------------------------------------------------------------


class Words:
    """A tokenizer of words, as coarse as bytes are fine."""

    vocab_size = 50_000

    def encode(self, text: str) -> list[int]:
        return [hash(word) % self.vocab_size for word in re.findall(r"\w+|[^\w\s]", text)]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["bytes", "words"])
@pytest.mark.parametrize("task", FORMS)
def test_ruler(task, tokenizer):
    niah = NIAHText(task=task, length=4096, tokenizer=tokenizer)
    prompts = niah.prompts(3, 0)
    form = FORMS[task]
    for prompt in prompts:
        assert prompt.length == len(niah.tokens(prompt.text))
        assert 0.95 * 4096 < prompt.length + niah.reserve <= 4096
        assert len(prompt.targets) == form.queries * form.values
        fact = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
        known = {}
        for kind, key, value in fact.findall(prompt.text):
            assert kind == form.value
            known.setdefault(key, []).append(value)
        question = prompt.text.rsplit("\n", 1)[1]
        asked = [key for key in known if key in question]
        assert len(asked) == form.queries
        assert sorted(v for key in asked for v in known[key]) == sorted(prompt.targets)
        assert all(prompt.text.count(target) == 1 for target in prompt.targets)
        if form.haystack != "needle":
            assert len(known) == form.keys
        else:
            assert len(known) > 10
        pattern = r"\d{7}" if form.value == "numbers" else r"[0-9a-f]{8}-[0-9a-f-]{27}"
        assert all(re.fullmatch(pattern, target) for target in prompt.targets)
    oracle = [" are " + ", ".join(p.targets).upper() for p in prompts]
    assert niah.score_text(oracle, prompts)["string_match_all"] == 100
    assert len({p.text for p in prompts}) == 3


def test_ruler_partial_answers_count_in_part():
    niah = NIAHText(task="multiquery")
    prompts = niah.prompts(1, 0)
    some = "I found " + prompts[0].targets[1] + " and 1234567, no more."
    assert niah.score_text([some], prompts) == {"accuracy": 0.25, "string_match_all": 25.0}
    assert niah.score_text([""], prompts)["accuracy"] == 0


@pytest.mark.parametrize("task", ["single_1", "single_2"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_ruler_depth_is_within_a_sentence(task, depth):
    (prompt,) = NIAHText(task=task, depth=depth, length=8192, intro=False).prompts(1, 0)
    before, after = re.split(r"One of the special magic .*?\d{7}\.", prompt.text)
    sentences = [text.count(".") for text in (before, after.rsplit("\n", 1)[0])]
    piece = 5 if task == "single_1" else 1  # the noise comes in lines of five
    assert abs(sentences[0] - depth * sum(sentences)) <= piece
    assert abs(prompt.depth - depth) < 0.02


def test_ruler_over_real_text(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("".join(f"line {i} of a long story\n" for i in range(3000)))
    prompt = NIAHText(path=story, keys=8, length=6000, intro=False).prompts(1, 0)[0]
    facts = re.findall(r"^One of the special magic numbers for \S+ is: \d{7}\.$", prompt.text, re.M)
    assert len(facts) == 8
    assert prompt.text.count(" of a long story") > 100
    with pytest.raises(ValueError, match="path must be None with a haystack of noise"):
        NIAHText(task="single_1", path=story)


@pytest.mark.parametrize("length", [400, 3000])
@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["bytes", "words"])
def test_passkey_text(length, tokenizer):
    task = PasskeyText(length=length, tokenizer=tokenizer)
    prompts = task.prompts(8, 0)
    for prompt in prompts:
        (key,) = prompt.targets
        assert 1 <= int(key) <= 50_000
        assert re.findall(r"\d+", prompt.text) == [key, key]
        assert 0.95 * length < prompt.length + task.reserve <= length
        before, after = prompt.text.split(f"\nThe pass key is {key}.")
        haystack = len(before) + len(after.split("pass key.\n")[1].split("\nWhat")[0])
        assert abs(len(before) - prompt.depth * haystack) <= 20  # a sentence of the noise
    said = [f"  {p.targets[0]}. The grass is 7." for p in prompts]
    assert task.score_text(said, prompts) == {"accuracy": 1.0}
    said = [f" 7, {p.targets[0]}" for p in prompts]
    assert task.score_text(said, prompts) == {"accuracy": 0.0}
    assert task.score_text(["no idea"] * 8, prompts) == {"accuracy": 0.0}
    grid = PasskeyText(length=length, tokenizer=tokenizer, depth=0.25, digits=5).prompts(3, 0)
    assert {p.depth for p in grid} == {0.25}
    assert all(len(p.targets[0]) == 5 for p in grid)


def test_text_tasks_as_tokens():
    """The labels, read back, are the answer behind the prompt."""
    task = PasskeyText(length=500)
    prompts, batch = task.prompts(4, 7), task.batch(4, 7)
    for row, prompt in enumerate(prompts):
        labels = batch.labels[row]
        scored = (labels != IGNORED).nonzero()[:, 0]
        assert task.text(labels[scored].tolist()) == " " + prompt.targets[0]
        assert task.text(batch.inputs[row, : scored[0] + 1].tolist()) == prompt.text


def test_pretrained_tokenizer(shared):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        shared / "models" / "needle-16m"
    )
    task = create_task("niah_text", task="multikey_1", length=1024, tokenizer=tokenizer)
    assert task.vocab_size == 8192
    (prompt,) = task.prompts(1, 0)
    assert 0.95 * 1024 < prompt.length + 128 <= 1024
    assert tokenizer.decode(tokenizer.encode(prompt.text)) == prompt.text
    text = create_task("text", length=64, tokenizer=tokenizer)
    batch = text.batch(3, 0)
    assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])


def test_texts_encoded_at_once_are_as_one_by_one(shared):
    transformers = pytest.importorskip("transformers")
    folder = shared / "models" / "needle-16m"
    pretrained = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    cuts = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    cuts.backend_tokenizer.enable_truncation(3)
    written = [Path(re.__file__).read_text()[:3000], "", "é\n  x = 1"]
    for tokenizer in (None, pretrained, pretrained.backend_tokenizer, cuts):
        want = [encode(tokenizer, text) for text in written]
        assert encode_all(tokenizer, written) == want
        assert min(map(len, want)) == 0
        assert max(map(len, want)) > 500


def test_prose_holds_no_needle_and_no_digit():
    rng = np.random.default_rng(0)
    sentences = essay(rng)
    words = set(re.findall(r"\w+", " ".join(next(sentences) for _ in range(4000)).lower()))
    assert not words & {*NEEDLE_ADJECTIVES, *NEEDLE_NOUNS}
    assert not any(re.search(r"\d", word) for word in words)
    assert len(words) > 1000
    assert len(set(NEEDLE_ADJECTIVES)) == len(set(NEEDLE_NOUNS)) == 300
    assert len(re.findall(r"[^.]+\.", NOISE)) == 5


def test_fill_comes_close_from_below():
    background = Background(iter(lambda: "five little words were here", None))
    for limit in (37, 100, 1000, 54321):
        text, tokens = fill(lambda c: "?" + "\n".join(background.take(c)), len, limit)
        assert len(text) == tokens
        assert limit - max(10, 0.01 * limit) <= tokens <= limit
    assert insert("abc", ["x", "y", "z"], [3, 0, 1], "") == "yazbcx"


# --- ListOps ------------------------------------------------------------------------------------


def test_listops_golden(shared):
    golden = load_file(shared / "golden" / "eval_tasks.safetensors")
    for tokens, value in zip(golden["listops.tokens"], golden["listops.value"], strict=True):
        assert evaluate([t for t in tokens.tolist() if t >= 0]) == value


def test_listops_expressions():
    task = create_task("listops", length=80, shortest=10, depth=4)
    batch = task.batch(64, 0)
    values = []
    for row in range(64):
        tokens = [t for t in batch.inputs[row].tolist() if t < 15]
        assert 10 < len(tokens) < 80
        depth = np.cumsum([(9 < t < CLOSE) - (t == CLOSE) for t in tokens])
        assert depth.max() <= 3  # digits of depth 4 lie in three lists
        assert depth[-1] == 0
        assert batch.labels[row, -1] == evaluate(tokens)
        values.append(int(batch.labels[row, -1]))
    assert len(set(values)) >= 8


@pytest.mark.parametrize("tokens", [[], [10], [10, CLOSE], [1, 2], [CLOSE], [10, 1, CLOSE, CLOSE]])
def test_listops_refuses_half_expressions(tokens):
    with pytest.raises(ValueError, match="whole expression"):
        evaluate(tokens)


def test_listops_median_is_truncated():
    assert evaluate([12, 1, 2, 4, 9, CLOSE]) == 3
    assert evaluate([12, 1, 2, 3, 9, CLOSE]) == 2
    assert evaluate([13, 9, 8, CLOSE]) == 7


# --- text ---------------------------------------------------------------------------------------


def test_text_reads_the_standard_library():
    train, held_out = split()
    files = {path for path, *_ in train.spans}, {path for path, *_ in held_out.spans}
    assert not files[0] & files[1]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert stdlib / "json" / "decoder.py" in files[0] | files[1]
    assert not any("site-packages" in path.parts for path in files[0] | files[1])
    # Which files these are, and so how many bytes, is another thing in every build of Python.
    assert len(files[1]) == math.ceil(0.05 * len(files[0] | files[1]))
    batch = create_task("text", length=100).batch(4, 0)
    assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])


def test_a_twentieth_is_held_out(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text("a" * (10 + 37 * i))
    train, held_out = split(tmp_path)
    assert [len(part.spans) for part in (train, held_out)] == [190, 10]
    assert 0.02 < held_out.size / (train.size + held_out.size) < 0.1


@pytest.fixture
def folder(tmp_path):
    """Files whose bytes tell where they come from; some that are no text."""
    for i in range(40):
        (tmp_path / f"f{i:02d}.txt").write_text(chr(65 + i) * 50 + "\n")
    (tmp_path / ".hidden").write_text("secret\n")
    (tmp_path / "picture.bin").write_bytes(b"\0" * 100)
    return tmp_path


def test_text_holds_files_out(folder):
    task = create_task("text", path=folder, length=20)
    seen = set(task.batch(800, 0).inputs.unique().tolist())
    held = set(task.batch(100, EVAL_SEEDS).inputs.unique().tolist())
    assert len(held) == 3  # two files of forty, and the newline
    assert seen & held == {10}
    assert len(seen | held) == 41


def test_text_of_a_single_file(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(32, 232)) * 10)
    train, held_out = split(tmp_path / "one.txt")
    assert (train.size, held_out.size) == (1900, 100)
    assert train.read(0, 200) == bytes(range(32, 232))
    assert held_out.read(0, 100) == bytes(range(132, 232))
    assert train.read(1895, 10) == (bytes(range(32, 232)) * 10)[1895:1900] + bytes(range(32, 37))


def test_corpus_reads_across_files(folder):
    train, _ = split(folder)
    whole = b"".join(path.read_bytes() for path, *_ in train.spans)
    assert train.size == len(whole)
    for start, count in [(0, 10), (40, 200), (51, 1), (len(whole) - 3, 6)]:
        assert train.read(start, count) == (whole + whole)[start : start + count]


def test_text_refuses_a_folder_without_text(tmp_path):
    with pytest.raises(ValueError, match="at least two text files"):
        create_task("text", path=tmp_path)


def test_text_perplexity_is_that_of_the_mean_loss(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 200)
    task = create_task("text", path=tmp_path / "a.txt", length=16)
    batch = task.batch(4, 0)
    scores = task.score(torch.zeros(4, 16, 256), batch)
    assert scores["perplexity"] == pytest.approx(256, rel=1e-4)
    both = task.combine([{"loss": 1.0, "accuracy": 0.0}, {"loss": 3.0, "accuracy": 1.0}])
    assert both == pytest.approx({"loss": 2.0, "accuracy": 0.5, "perplexity": np.exp(2.0)})
