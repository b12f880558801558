"""ListOps of the Long Range Arena (Nangia and Bowman; Tay et al.): the value of a nested list of
MIN, MAX, MED and SM (sum modulo 10), ten classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import IGNORED, Batch, Task, to_batch

# Ids: the digits, the four operators with their opening bracket, the closing bracket, padding.
MIN, MAX, MED, SM, CLOSE, PAD = 10, 11, 12, 13, 14, 15
VALUE = 0.75  # probability of a digit rather than an operator, above the greatest depth
PATIENCE = 10_000


@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """An expression, padded on the left; the label at its last token is its value.

    Attributes:
        depth: greatest depth of the tree.
        arguments: greatest number of arguments of an operator, from 2.
        shortest: expressions have more tokens than this (parentheses are dropped).
        length: T; expressions have fewer tokens than this. The Long Range Arena's own setting is
            depth=10, arguments=10, shortest=500, length=2000.
    """

    name: ClassVar[str] = "listops"
    length: int = 120
    depth: int = 6
    arguments: int = 5
    shortest: int = 20
    vocab_size: int = field(default=16, init=False)

    def __post_init__(self) -> None:
        for name in ("length", "depth", "arguments"):
            checks.positive(name, getattr(self, name))
        checks.positive("shortest", self.shortest, zero=True)
        if self.arguments < 2:
            raise ValueError(f"arguments must be at least 2, got {self.arguments}")
        if self.length < self.shortest + 3:
            raise ValueError(
                f"length must be at least shortest + 3 = {self.shortest + 3}, got {self.length}"
            )

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        inputs = np.full((n, self.length), PAD)
        labels = np.full_like(inputs, IGNORED)
        for row in range(n):
            tokens = self._expression(rng)
            inputs[row, -len(tokens) :] = tokens
            labels[row, -1] = evaluate(tokens)
        return to_batch(inputs, labels)

    def _expression(self, rng: np.random.Generator) -> list[int]:
        for _ in range(PATIENCE):
            tokens: list[int] = []
            self._grow(rng, 1, tokens)
            if self.shortest < len(tokens) < self.length:
                return tokens
        raise ValueError(
            f"depth={self.depth} and arguments={self.arguments} must allow expressions of "
            f"{self.shortest}..{self.length} tokens, found none among {PATIENCE}"
        )

    def _grow(self, rng: np.random.Generator, depth: int, tokens: list[int]) -> None:
        """Append a random tree; one that has grown too long already is given up."""
        if len(tokens) >= self.length:
            return
        if depth > 1 and (depth >= self.depth or rng.random() < VALUE):
            tokens.append(int(rng.integers(10)))
            return
        tokens.append(int(rng.integers(MIN, SM + 1)))
        for _ in range(rng.integers(2, self.arguments + 1)):
            self._grow(rng, depth + 1, tokens)
        tokens.append(CLOSE)


def evaluate(tokens: Sequence[int]) -> int:
    """The value of an expression in prefix form; the median of an even number of arguments is
    the mean of the middle two, truncated.

    Raises:
        ValueError: if the tokens are not one whole expression.
    """
    open_lists: list[list[int]] = [[]]
    operators: list[int] = []
    for token in tokens:
        if token < MIN:
            open_lists[-1].append(token)
        elif token < CLOSE:
            operators.append(token)
            open_lists.append([])
        elif token == CLOSE and operators and open_lists[-1]:
            value = _apply(operators.pop(), open_lists.pop())
            open_lists[-1].append(value)
        else:
            raise ValueError(f"tokens must form a whole expression, got {list(tokens)}")
    if operators or len(open_lists[0]) != 1:
        raise ValueError(f"tokens must form a whole expression, got {list(tokens)}")
    return open_lists[0][0]


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    return int(np.median(values)) if operator == MED else sum(values) % 10
