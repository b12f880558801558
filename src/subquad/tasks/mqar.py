"""Multi-query associative recall: key-value pairs first, then the keys again, each asking for
its value (Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models).

V ids: 0 is blank, keys 1..V/2-1, values V/2..V-1.  T positions, D pairs, U of them forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import IGNORED, Batch, Task, at_most, distinct, to_batch


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """``k1 v1 ... kD vD``, then every key once more among blanks; the label of a key asked there
    is its value. The answer is not among the inputs behind the question.

    Attributes:
        vocab_size: V, even, > T; half of it keys, half values.
        length: T, even.
        pairs: D; the pairs and the questions must fit: 2(D * num_passes + U) + 2D <= T.
        power: questions come at slot i with a weight of i**(power-1): a small power asks early.
        fill: "zero" or "random": what stands at the positions that hold no key.
        num_passes: how often the list of pairs is read out before the questions.
        forgets: U, pairs whose key is listed once more with a new value, which then is the answer.
    """

    name: ClassVar[str] = "mqar"
    vocab_size: int = 128
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    fill: str = "zero"
    num_passes: int = 1
    forgets: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length"):
            value = getattr(self, name)
            checks.positive(name, value)
            if value % 2:
                raise ValueError(f"{name} must be even, got {value}")
        if self.vocab_size <= self.length:
            raise ValueError(
                f"vocab_size must be larger than length={self.length}, got {self.vocab_size}"
            )
        checks.one_of("fill", self.fill, ("zero", "random"))
        checks.positive("num_passes", self.num_passes)
        checks.positive("forgets", self.forgets, zero=True)
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")
        at_most("forgets", self.forgets, self.pairs, f"forgets <= pairs={self.pairs}", least=0)
        most = (self.length - 2 * self.forgets) // (2 * self.num_passes + 2)
        why = f"2(pairs * num_passes + forgets) + 2 pairs <= length={self.length}"
        at_most("pairs", self.pairs, most, why)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        half, D = self.vocab_size // 2, self.pairs
        keys = 1 + distinct(rng, n, D, half - 1)
        values = half + distinct(rng, n, D + self.forgets, half)
        stale = distinct(rng, n, self.forgets, D)
        weights = np.log(slot_weights(self.space, self.power))
        # Gumbel noise on the logarithms: the D largest, in order, are drawn one after the other
        # without replacement, the weights renormalised each time.
        slots = np.argsort(-(weights + rng.gumbel(size=(n, self.space))), axis=1)[:, :D]
        inputs, labels = self.arrange(keys, values, slots, stale)
        if self.fill == "random":
            blanks = inputs == 0
            inputs[blanks] = rng.integers(self.vocab_size, size=int(blanks.sum()))
        return to_batch(inputs, labels)

    @property
    def space(self) -> int:
        """Slots (of two positions) behind the pairs, where a question may stand."""
        return self.length // 2 - self.pairs * self.num_passes - self.forgets

    def arrange(
        self, keys: np.ndarray, values: np.ndarray, slots: np.ndarray, stale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels ``[n,T]``.

        Args:
            keys: ``[n,D]``.
            values: ``[n,D+U]``, one for each key, then the newer ones.
            slots: ``[n,D]``, where each key is asked.
            stale: ``[n,U]``, indices of the keys that get the newer values.
        """
        n, D = keys.shape
        newer = np.stack([np.take_along_axis(keys, stale, 1), values[:, D:]], -1).reshape(n, -1)
        pairs = np.stack([keys, values[:, :D]], -1).reshape(n, -1)
        answers = values[:, :D].copy()
        np.put_along_axis(answers, stale, values[:, D:], 1)
        inputs = np.zeros((n, self.length), dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        start = self.length - 2 * self.space
        inputs[:, :start] = np.concatenate([np.tile(pairs, (1, self.num_passes)), newer], 1)
        np.put_along_axis(inputs, start + 2 * slots, keys, 1)
        np.put_along_axis(labels, start + 2 * slots, answers, 1)
        return inputs, labels


def slot_weights(space: int, power: float) -> np.ndarray:
    """The weight of each of ``space`` slots, proportional to i**(power-1) for i from 1."""
    weights = np.arange(1, space + 1) ** (power - 1.0)
    return weights / weights.sum()
