"""Background text that needs no download: sentences of a small grammar, without digits and
without the words that needles are named by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from subquad.tasks.words import ADJECTIVES, ADVERBS, NOUNS, VERBS

# The line that RULER and the passkey task repeat as noise.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_VOWELS = "aeiou"
_PLACES = "in near behind beside above below beyond past around across from toward"
_LINKS = "and but so while because before after until although when"
# A noun phrase is one of n, m and p; the rest are words of their class.
_SHAPES = (
    "n d p n",
    "n d m",
    "r , n d m p n",
    "n r d m p n",
    "n was g m p n",
    "there were m p n",
    "n d n l n d m",
    "r , n was g n l m d p n",
    "l n d n , m were g p n",
    "m who d n p m were a and a",
)
_PHRASES = {
    "n": ("the a s", "the s", "every s", "one a s", "the s of the s"),
    "m": ("the t", "a t"),
}


def essay(rng: np.random.Generator) -> Iterator[str]:
    """Sentences without end. Every essay has its own favourite words."""
    classes = {
        "s": NOUNS,
        "t": [_plural(n) for n in NOUNS],
        "d": [_past(v) for v in VERBS],
        "g": [_stem(v) + "ing" for v in VERBS],
        "a": ADJECTIVES,
        "r": ADVERBS,
        "p": _PLACES.split(),
        "l": _LINKS.split(),
    }
    # Word frequencies fall with the rank, as they do in texts that people write.
    ranked = {c: _by_rank(rng, words) for c, words in classes.items()}
    words = {c: _draws(rng, *ranked[c]) for c in classes}
    while True:
        said: list[str] = []
        for item in _SHAPES[rng.integers(len(_SHAPES))].split():
            phrases = _PHRASES.get(item, (item,))
            for token in phrases[rng.integers(len(phrases))].split():
                said.append(next(words[token]) if token in words else token)
        text = " ".join(said).replace(" ,", ",")
        yield text[0].upper() + text[1:] + "."


def _by_rank(rng: np.random.Generator, words: list[str]) -> tuple[list[str], np.ndarray]:
    weights = 1 / (np.arange(len(words)) + 5.0)
    return [words[i] for i in rng.permutation(len(words))], weights / weights.sum()


def _draws(rng: np.random.Generator, words: list[str], weights: np.ndarray) -> Iterator[str]:
    while True:  # some hundred at once: one at a time is slow
        yield from [words[i] for i in rng.choice(len(words), 256, p=weights)]


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in _VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def _stem(verb: str) -> str:
    return verb[:-1] if verb.endswith("e") else verb


def _past(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    return _stem(verb) + "ed"
