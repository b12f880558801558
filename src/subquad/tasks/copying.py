"""Recall of what stood before: induction, copying and selective copying."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import IGNORED, Batch, Task, at_most, distinct, to_batch


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """What followed the trigger the last time? (Olsson et al., In-context Learning and Induction
    Heads.) Random tokens of 0..V-2, the trigger V-1 once at i < T-2 followed by x, and again at
    the end, where x is the label.
    """

    name: ClassVar[str] = "induction"
    vocab_size: int = 64
    length: int = 64

    def __post_init__(self) -> None:
        checks.positive("vocab_size", self.vocab_size)
        checks.positive("length", self.length)
        if self.vocab_size < 3 or self.length < 3:
            raise ValueError(
                f"vocab_size and length must be at least 3, got {self.vocab_size} and {self.length}"
            )

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        trigger, T = self.vocab_size - 1, self.length
        inputs = rng.integers(trigger, size=(n, T))
        at = rng.integers(T - 2, size=n)
        inputs[np.arange(n), at] = trigger
        inputs[:, -1] = trigger
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = inputs[np.arange(n), at + 1]
        return to_batch(inputs, labels, depth=at / T)


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """A random segment of n tokens, a separator, then the segment once more.

    Ids: 0 blank, 1 separator, data 2..V-1. With ``blanks`` the n labels lie on n blanks behind
    the separator (T = 2n+1); without, on the separator and the copy itself, which is shown as the
    inputs go on (teacher forcing, T = 2n).
    """

    name: ClassVar[str] = "copy"
    vocab_size: int = 32
    segment: int = 16
    blanks: bool = True
    length: int = field(init=False)

    def __post_init__(self) -> None:
        checks.positive("vocab_size", self.vocab_size)
        checks.positive("segment", self.segment)
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size must be at least 4, got {self.vocab_size}")
        object.__setattr__(self, "length", 2 * self.segment + int(self.blanks))

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        data = rng.integers(2, self.vocab_size, size=(n, self.segment))
        ones = np.ones((n, 1), dtype=np.int64)
        tail = np.zeros_like(data) if self.blanks else data[:, :-1]
        inputs = np.concatenate([data, ones, tail], 1)
        labels = np.full_like(inputs, IGNORED)
        labels[:, -self.segment :] = data
        return to_batch(inputs, labels)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Data tokens scattered in noise, then as many blanks that ask for them in order (Gu and Dao,
    Mamba). Ids: 0 noise, 1 blank, data 2..V-1; T = context + items.
    """

    name: ClassVar[str] = "selective_copy"
    vocab_size: int = 16
    context: int = 256
    items: int = 16
    length: int = field(init=False)

    def __post_init__(self) -> None:
        checks.positive("vocab_size", self.vocab_size)
        checks.positive("context", self.context)
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size must be at least 4, got {self.vocab_size}")
        at_most("items", self.items, self.context, f"items <= context={self.context}")
        object.__setattr__(self, "length", self.context + self.items)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        data = rng.integers(2, self.vocab_size, size=(n, self.items))
        places = np.sort(distinct(rng, n, self.items, self.context), 1)
        inputs = np.zeros((n, self.length), dtype=np.int64)
        np.put_along_axis(inputs, places, data, 1)
        inputs[:, self.context :] = 1
        labels = np.full_like(inputs, IGNORED)
        labels[:, self.context :] = data
        return to_batch(inputs, labels)
