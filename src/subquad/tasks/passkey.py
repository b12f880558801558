"""Passkey retrieval: a number hidden in noise, asked at the end (Mohtashami and Jaggi, Landmark
Attention), as tokens for small models and as text for pretrained ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import (
    IGNORED,
    Batch,
    Prompt,
    Task,
    TextTask,
    check_depth,
    depths,
    to_batch,
)
from subquad.tasks.haystack import Background, fill, insert
from subquad.tasks.prose import NOISE

DIGITS = 5
FACT = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """``[KEY] d1..d5`` somewhere in noise, ``[ASK]`` at the end; the labels are the five digits,
    on ``[ASK]`` and the first four of them (teacher forcing).

    Ids: digits 0..9, noise 10..V-3, KEY = V-2, ASK = V-1.

    Attributes:
        depth: place of the needle in 0..1; None for everywhere, evenly.
    """

    name: ClassVar[str] = "passkey"
    vocab_size: int = 64
    length: int = 256
    depth: float | None = None

    def __post_init__(self) -> None:
        checks.positive("vocab_size", self.vocab_size)
        checks.positive("length", self.length)
        check_depth(self.depth)
        if self.vocab_size < 13:
            raise ValueError(f"vocab_size must be at least 13, got {self.vocab_size}")
        if self.length < 2 * DIGITS + 1:
            raise ValueError(f"length must be at least {2 * DIGITS + 1}, got {self.length}")

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        T, key, ask = self.length, self.vocab_size - 2, self.vocab_size - 1
        digits = rng.integers(10, size=(n, DIGITS))
        inputs = rng.integers(10, key, size=(n, T))
        last = T - DIGITS - (DIGITS + 1)  # the last place where a needle may start
        starts = np.rint(depths(rng, n, self.depth) * last).astype(np.int64)
        needles = np.concatenate([np.full((n, 1), key), digits], 1)
        np.put_along_axis(inputs, starts[:, None] + np.arange(DIGITS + 1), needles, 1)
        inputs[:, -DIGITS] = ask
        inputs[:, T - DIGITS + 1 :] = digits[:, :-1]
        labels = np.full_like(inputs, IGNORED)
        labels[:, -DIGITS:] = digits
        return to_batch(inputs, labels, depth=starts / max(last, 1))


@dataclass(frozen=True, kw_only=True)
class PasskeyText(TextTask):
    """The same in words: five short sentences repeated up to the length, the key stated twice.

    Attributes:
        length: most tokens of a prompt and its answer.
        depth: place of the needle in 0..1; None for everywhere, evenly.
        digits: of the key, its first digit not 0; None draws it from 1..50000.
        reserve: tokens kept free for the answer.
    """

    name: ClassVar[str] = "passkey_text"
    depth: float | None = None
    digits: int | None = None
    reserve: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.depth)
        checks.positive("reserve", self.reserve, zero=True)
        if self.digits is not None:
            checks.positive("digits", self.digits)

    def prompts(self, n: int, seed: int) -> list[Prompt]:
        checks.positive("n", n)
        checks.positive("seed", seed, zero=True)
        rng = self.generator(seed)
        noise = Background(itertools.cycle(re.findall(r"[^.]+\.", NOISE)), "")
        found = []
        for depth in depths(rng, n, self.depth).tolist():
            low, high = (1, 50_001) if self.digits is None else (10 ** (self.digits - 1), None)
            key = str(rng.integers(low, high or 10**self.digits))  # type: ignore[operator]

            def build(characters: int, depth: float = depth, key: str = key) -> str:
                pieces = noise.take(characters)
                place = round(depth * len(pieces))
                return insert(pieces, [FACT.format(key=key)], [place], "") + QUESTION

            text, tokens = fill(build, lambda t: len(self.tokens(t)), self.length - self.reserve)
            found.append(Prompt(text, (key,), tokens, depth))
        return found

    def score_text(self, predictions: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, float]:
        """``accuracy``: how often the first integer written is the key."""
        right = 0
        for prediction, prompt in zip(predictions, prompts, strict=True):
            number = re.search(r"\d+", prediction)
            right += number is not None and int(number.group()) == int(prompt.targets[0])
        return {"accuracy": right / len(prompts)}
