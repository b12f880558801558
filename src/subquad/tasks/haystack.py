"""Prompts filled to a length: background text, with needles in it, under any tokenizer."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from subquad.tasks.text import Corpus

_READ = 1 << 16


class Background:
    """An endless sequence of pieces (lines, sentences), made as far as they are needed.

    Attributes:
        joiner: what stands between two pieces.
    """

    def __init__(self, pieces: Iterator[str], joiner: str = "\n") -> None:
        self._source = pieces
        self._pieces: list[str] = []
        self._ends: list[int] = []
        self.joiner = joiner

    def take(self, characters: int) -> list[str]:
        """The first pieces, of so many characters together; the last is cut at a space."""
        while not self._ends or self._ends[-1] <= characters:
            piece = next(self._source)
            self._pieces.append(piece)
            past = self._ends[-1] if self._ends else 0
            self._ends.append(past + len(piece) + len(self.joiner))
        whole = bisect.bisect_right(self._ends, characters)
        room = characters - (self._ends[whole - 1] if whole else 0)
        cut = self._pieces[whole][:room].rpartition(" ")[0].rstrip()
        return self._pieces[:whole] + [cut] * bool(cut)


def lines(corpus: Corpus, rng: np.random.Generator) -> Iterator[str]:
    """The lines of a corpus from a random place on."""
    start = int(rng.integers(corpus.size))
    for at in itertools.count(start, _READ):
        yield from corpus.text(at, _READ).splitlines()


def insert(
    pieces: Sequence[str], needles: Sequence[str], places: Sequence[int], joiner: str
) -> str:
    """The text of the pieces with each needle before the piece at its place."""
    order = sorted(range(len(needles)), key=lambda i: places[i])
    out: list[str] = []
    done = 0
    for i in order:
        out += [*pieces[done : places[i]], needles[i]]
        done = places[i]
    return joiner.join([*out, *pieces[done:]])


def fill(build: Callable[[int], str], count: Callable[[str], int], limit: int) -> tuple[str, int]:
    """The longest text ``build(characters)`` of at most ``limit`` tokens, or nearly.

    Counting tokens is the costly part: the search steps ahead by the tokens per character seen so
    far, and bisects once it has overshot.

    Returns:
        The text and its tokens, which are more than 99% of the limit unless the text's own grain
        is coarser.

    Raises:
        ValueError: if not even ``build(0)`` fits.
    """
    text = build(0)
    least = tokens = count(text)
    if tokens > limit:
        raise ValueError(
            f"length must leave room for {tokens} tokens of question and needles, got room for "
            f"{limit}"
        )
    low, high, density = 0, None, 1.0
    while tokens <= 0.99 * limit and (high is None or high - low > 1):
        guess = low + max(1, int((0.997 * limit - tokens) / density))
        if high is not None and guess >= high:
            guess = (low + high) // 2
        candidate = build(guess)
        found = count(candidate)
        if found <= limit:
            low, text, tokens = guess, candidate, found
            density = max(tokens - least, 1) / low
        else:
            high = guess
    return text, tokens
