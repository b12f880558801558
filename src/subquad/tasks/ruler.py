"""The needle-in-a-haystack tasks of RULER in text (Hsieh et al., What's the Real Context Size of
Your Long-Context Language Models?), under any tokenizer."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import EVAL_SEEDS, Prompt, TextTask, check_depth
from subquad.tasks.haystack import Background, fill, insert, lines
from subquad.tasks.prose import NOISE, essay
from subquad.tasks.text import Corpus, split
from subquad.tasks.words import NEEDLE_ADJECTIVES, NEEDLE_NOUNS

INTRO = (
    "Some special magic {type} are hidden in the text below. Remember them: they are asked for.\n"
)
FACT = "One of the special magic {type} for {key} is: {value}."
ONE = (
    "\nWhat is the special magic {type} for {keys} mentioned in the provided text? "
    "The special magic {type} for {keys} mentioned in the provided text is"
)
MANY = (
    "\nWhat are all the special magic {type}s for {keys} mentioned in the provided text? "
    "The special magic {type}s for {keys} mentioned in the provided text are"
)
DEPTHS = np.linspace(0, 100, 40)


class Form(NamedTuple):
    """One of RULER's tasks: how many keys, values for each and keys asked for."""

    haystack: str
    key: str
    value: str
    keys: int
    values: int
    queries: int


FORMS = {
    "single_1": Form("noise", "words", "numbers", 1, 1, 1),
    "single_2": Form("essay", "words", "numbers", 1, 1, 1),
    "single_3": Form("essay", "words", "uuids", 1, 1, 1),
    "multikey_1": Form("essay", "words", "numbers", 4, 1, 1),
    "multikey_2": Form("needle", "words", "numbers", 1, 1, 1),
    "multikey_3": Form("needle", "uuids", "uuids", 1, 1, 1),
    "multivalue": Form("essay", "words", "numbers", 1, 4, 1),
    "multiquery": Form("essay", "words", "numbers", 4, 1, 4),
    # Not RULER's: keys of one word, for models that were trained on such.
    "single_word": Form("essay", "nouns", "numbers", 1, 1, 1),
}


@dataclass(frozen=True, kw_only=True)
class NIAHText(TextTask):
    """Facts "One of the special magic numbers for {key} is: {value}." in a haystack, asked at the
    end; the answer is scored by the values that it holds.

    Attributes:
        task: a row of RULER's table, "single_1" .. "multiquery", or "single_word".
        keys: another number of keys than the row's, e.g. 8 for one fact of eight.
        length: most tokens of a prompt and its answer.
        depth: place of a single needle in 0..1; None as RULER does: in essays 40 even places, in
            other haystacks any line.
        path: a file or folder whose lines are the essay; None for generated prose.
        intro: whether a sentence in front says what will be asked.
        reserve: tokens kept free for the answer.
    """

    name: ClassVar[str] = "niah_text"
    task: str = "single_2"
    keys: int | None = None
    depth: float | None = None
    path: str | os.PathLike[str] | None = None
    intro: bool = True
    reserve: int = 128
    _parts: tuple[Corpus, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("task", self.task, FORMS)
        checks.positive("reserve", self.reserve, zero=True)
        check_depth(self.depth)
        form, least = self.form, FORMS[self.task].queries
        checks.positive("keys", form.keys)
        if form.keys < least:
            raise ValueError(f"keys must be at least {least} with {self.task}, got {form.keys}")
        if self.depth is not None and form.keys * form.values > 1:
            raise ValueError(f"depth must be None with more than one needle, got {self.depth}")
        if self.path is not None:
            if form.haystack != "essay":
                raise ValueError(f"path must be None with a haystack of {form.haystack}")
            object.__setattr__(self, "_parts", split(self.path))

    @property
    def form(self) -> Form:
        form = FORMS[self.task]
        return form if self.keys is None else form._replace(keys=self.keys)

    def prompts(self, n: int, seed: int) -> list[Prompt]:
        checks.positive("n", n)
        checks.positive("seed", seed, zero=True)
        return [self._prompt(rng, seed) for rng in self.generator(seed).spawn(n)]

    def _prompt(self, rng: np.random.Generator, seed: int) -> Prompt:
        form = self.form
        names = _names(rng, form.key)
        keys = list(itertools.islice(names, form.keys))
        facts = [(key, _value(rng, form.value)) for key in keys for _ in range(form.values)]
        facts = [facts[i] for i in rng.permutation(len(facts))]
        asked = [keys[i] for i in rng.choice(len(keys), form.queries, replace=False)]
        needles = [FACT.format(type=form.value, key=key, value=value) for key, value in facts]
        targets = tuple(value for key in asked for k, value in facts if k == key)
        noun = form.value.removesuffix("s")
        ask = (ONE if len(targets) == 1 else MANY).format(type=noun, keys=_listed(asked))
        intro = INTRO.format(type=form.value) if self.intro else ""
        background = self._background(rng, names, seed)
        first = next(i for i, (key, _) in enumerate(facts) if key == asked[0])
        where = int(rng.integers(2**63))

        def build(characters: int) -> str:
            pieces = background.take(characters)
            places = self._places(np.random.default_rng(where), len(needles), len(pieces))
            return intro + insert(pieces, needles, places, background.joiner) + ask

        text, tokens = fill(build, lambda t: len(self.tokens(t)), self.length - self.reserve)
        haystack = len(text) - len(intro) - len(ask) - len(needles[first])
        depth = (text.index(needles[first]) - len(intro)) / max(haystack, 1)
        return Prompt(text, targets, tokens, depth)

    def _background(self, rng: np.random.Generator, names: Iterator[str], seed: int) -> Background:
        form = self.form
        if form.haystack == "noise":
            return Background(itertools.repeat(NOISE))
        if form.haystack == "needle":
            return Background(
                FACT.format(type=form.value, key=key, value=_value(rng, form.value))
                for key in names
            )
        if self.path is None:
            return Background(essay(rng), " ")
        return Background(lines(self._parts[seed >= EVAL_SEEDS], rng))

    def _places(self, rng: np.random.Generator, needles: int, pieces: int) -> list[int]:
        """Before which piece each needle goes."""
        if self.depth is not None:
            return [round(self.depth * pieces)]
        if self.form.haystack == "essay" and needles <= len(DEPTHS):
            chosen = np.sort(rng.choice(DEPTHS, needles, replace=False))
            return (pieces * chosen / 100).astype(int).tolist()
        return rng.choice(max(pieces, 1), needles, replace=needles > max(pieces, 1)).tolist()

    def score_text(self, predictions: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, float]:
        """``accuracy``, the share of the targets found in each text regardless of case, and
        ``string_match_all``, the same in percent as RULER reports it."""
        shares = [
            sum(target.lower() in prediction.lower() for target in prompt.targets)
            / len(prompt.targets)
            for prediction, prompt in zip(predictions, prompts, strict=True)
        ]
        mean = sum(shares) / len(shares)
        return {"accuracy": mean, "string_match_all": 100 * mean}


def _names(rng: np.random.Generator, kind: str) -> Iterator[str]:
    """Different keys without end."""
    if kind == "uuids":
        while True:
            yield _value(rng, kind)
    if kind == "nouns":
        yield from (NEEDLE_NOUNS[i] for i in rng.permutation(len(NEEDLE_NOUNS)))
        raise ValueError(f"keys must be at most {len(NEEDLE_NOUNS)}, the single words there are")
    pairs = len(NEEDLE_ADJECTIVES) * len(NEEDLE_NOUNS)
    for i in rng.permutation(pairs):
        yield f"{NEEDLE_ADJECTIVES[i // len(NEEDLE_NOUNS)]}-{NEEDLE_NOUNS[i % len(NEEDLE_NOUNS)]}"
    raise ValueError(f"length must be less: the haystack needs more than {pairs} different keys")


def _value(rng: np.random.Generator, kind: str) -> str:
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _listed(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
