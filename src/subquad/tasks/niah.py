"""A needle in a haystack of tokens: the single, multi-key, multi-value and multi-query forms of
RULER (Hsieh et al., What's the Real Context Size of Your Long-Context Language Models?) for models
without a language. Valid from 128 tokens on. The forms in text are in ``ruler.py``.

n rows, R needles a row, w tokens a needle, k of them the key and m the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from subquad.ops import checks
from subquad.tasks.base import (
    IGNORED,
    Batch,
    Task,
    at_most,
    check_depth,
    depths,
    distinct,
    to_batch,
)

NEEDLE, IS, ASK = 0, 1, 2
KINDS = ("single", "multikey", "multivalue", "multiquery")


@dataclass(frozen=True, kw_only=True)
class NIAH(Task):
    """Needles ``[N] key [IS] value`` in noise, then ``[Q] key`` and the value.

    Under teacher forcing: the m labels of a question lie on the last token of its key and on the
    value's tokens but the last. ``single`` has one needle; ``multikey`` distractors with other
    keys; ``multivalue`` one key with four values, asked four times, where any value not yet given
    is right; ``multiquery`` four keys, all asked. Ids: the three marks, then as many keys as
    values as (at least) noise.

    Attributes:
        vocab_size: of which a third each are keys, values and noise.
        length: T.
        kind: "single", "multikey", "multivalue" or "multiquery".
        key_tokens: k, 1..3.
        value_tokens: m.
        distractors: needles that nobody asks for: None for 3 with multikey and 0 else; "full" for
            as many as fit.
        depth: place of the asked needle in 0..1 (single and multikey); None for everywhere.
    """

    name: ClassVar[str] = "niah"
    vocab_size: int = 128
    length: int = 256
    kind: str = "single"
    key_tokens: int = 1
    value_tokens: int = 1
    distractors: int | str | None = None
    depth: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("kind", self.kind, KINDS)
        at_most("key_tokens", self.key_tokens, 3, "a key has 1 to 3 tokens")
        checks.positive("value_tokens", self.value_tokens)
        checks.positive("length", self.length)
        if self.kind == "multivalue" and self.value_tokens > 1:
            raise ValueError(f"value_tokens must be 1 with multivalue, got {self.value_tokens}")
        if self.vocab_size < 18:
            raise ValueError(f"vocab_size must be at least 18, got {self.vocab_size}")
        check_depth(self.depth)
        if self.depth is not None and self.asked > 1:
            raise ValueError(f"depth must be None with kind={self.kind!r}, got {self.depth}")
        if isinstance(self.distractors, str):
            checks.one_of("distractors", self.distractors, ("full",))
        elif self.distractors is not None:
            checks.positive("distractors", self.distractors, zero=True)
        if self.needles * self.width > self.haystack:
            least = self.length - self.haystack + self.needles * self.width
            raise ValueError(f"length must be at least {least} for {self}, got {self.length}")
        for part, tokens in (("key", self.key_tokens), ("value", self.value_tokens)):
            if self.needles > self.ids**tokens:
                raise ValueError(
                    f"needles must be at most {self.ids**tokens}, the different {part}s of "
                    f"{tokens} tokens with vocab_size={self.vocab_size}, got {self.needles}"
                )

    @property
    def ids(self) -> int:
        """Ids in each of the ranges of keys, values and noise."""
        return (self.vocab_size - 3) // 3

    @property
    def asked(self) -> int:
        return 4 if self.kind in ("multivalue", "multiquery") else 1

    @property
    def width(self) -> int:
        """Tokens of a needle, w."""
        return 2 + self.key_tokens + self.value_tokens

    @property
    def haystack(self) -> int:
        """Tokens in front of the questions."""
        return self.length - self.asked * (self.key_tokens + self.value_tokens)

    @property
    def needles(self) -> int:
        """Needles of a row, R."""
        if self.distractors == "full":
            return max(self.haystack // self.width, self.asked)
        extra = self.distractors if self.distractors is not None else 3 * (self.kind == "multikey")
        return self.asked + int(extra)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        keys = self._words(rng, n, self.key_tokens, 3)
        values = self._words(rng, n, self.value_tokens, 3 + self.ids)
        if self.kind == "multivalue":
            keys[:, : self.asked] = keys[:, :1]
        starts, depth = self._places(rng, n)
        marks = np.zeros((n, self.needles, 1), dtype=np.int64)
        needles = np.concatenate([marks + NEEDLE, keys, marks + IS, values], 2)
        noise = 3 + 2 * self.ids
        inputs = rng.integers(noise, self.vocab_size, size=(n, self.length))
        cells = starts[:, :, None] + np.arange(self.width)
        np.put_along_axis(inputs, cells.reshape(n, -1), needles.reshape(n, -1), 1)

        asked = slice(0, self.asked)
        questions = np.concatenate([marks + ASK, keys, values], 2)[:, asked]
        inputs[:, self.haystack :] = questions[:, :, :-1].reshape(n, -1)
        answers = np.full((n, self.asked, questions.shape[2] - 1), IGNORED)
        answers[:, :, self.key_tokens :] = values[:, asked]
        labels = np.full_like(inputs, IGNORED)
        labels[:, self.haystack :] = answers.reshape(n, -1)
        return to_batch(inputs, labels, depth=depth)

    def _words(self, rng: np.random.Generator, n: int, tokens: int, first: int) -> np.ndarray:
        """``[n,R,tokens]``: different words of ids from ``first`` on."""
        codes = distinct(rng, n, self.needles, self.ids**tokens)
        return first + codes[:, :, None] // self.ids ** np.arange(tokens) % self.ids

    def _places(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the needles start ``[n,R]`` and the depth of the first ``[n]``."""
        R, w = self.needles, self.width
        room = self.haystack - w
        # The other needles first, in a haystack shorter by one: R-1 of the things that stand in
        # it, noise tokens and needles, are needles, and each of these is w tokens long.
        others = np.sort(distinct(rng, n, R - 1, room - (R - 1) * (w - 1)), 1)
        others += np.arange(R - 1) * (w - 1)
        first = np.rint(depths(rng, n, self.depth) * room).astype(np.int64)[:, None]
        split = (others < first) & (first < others + w)  # a needle there would be cut in two
        first -= ((first - others) * split).sum(1, keepdims=True)
        others += w * (others >= first)
        others = np.take_along_axis(others, distinct(rng, n, R - 1, R - 1), 1)
        starts = np.concatenate([first, others], 1)
        if self.kind == "multivalue":  # the answers in the order of the text
            starts[:, : self.asked] = np.sort(starts[:, : self.asked], 1)
        return starts, starts[:, 0] / max(room, 1)

    def right(self, guess: Tensor, labels: Tensor) -> Tensor:
        if self.kind != "multivalue":
            return super().right(guess, labels)
        given, wanted = guess.view(-1, self.asked), labels.view(-1, self.asked)
        among = (given[:, :, None] == wanted[:, None]).any(2)
        again = (given[:, :, None] == given[:, None]).tril(-1).any(2)
        return (among & ~again).flatten()
