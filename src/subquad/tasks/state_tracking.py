"""State tracking: parity and the word problems of finite groups (Merrill et al., The Illusion of
State in State-Space Models)."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np

from subquad.ops import checks
from subquad.tasks.base import IGNORED, Batch, Task, to_batch

# A table of products has the square of the order; S6 (720) is the largest symmetric group below.
LARGEST = 1024


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Bits; the label at t is the XOR of the bits up to t.

    With ``last_only``, T-1 bits and an end token (id 2), where alone the label stands.
    """

    name: ClassVar[str] = "parity"
    length: int = 32
    last_only: bool = False
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        checks.positive("length", self.length)
        if self.last_only and self.length < 2:
            raise ValueError(f"length must be at least 2 with last_only, got {self.length}")
        object.__setattr__(self, "vocab_size", 3 if self.last_only else 2)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        inputs = rng.integers(2, size=(n, self.length))
        if not self.last_only:
            return to_batch(inputs, inputs.cumsum(1) % 2)
        labels = np.full_like(inputs, IGNORED)
        labels[:, -1] = inputs[:, :-1].sum(1) % 2
        inputs[:, -1] = 2
        return to_batch(inputs, labels)


@dataclass(frozen=True, kw_only=True)
class Group(Task):
    """Random elements of a finite group; the label at t is the product of the first t, in order.

    A token is the lexicographic index of the element's permutation; (p*q)(i) = p[q[i]] and the
    prefix is multiplied by the new element on its right.

    Attributes:
        group: "S5", "A5", "Z60", "A4xZ5", or any S, A (permutations of n points, all or even), Z
            (cyclic) and products of them up to order 1024.
        swaps: draw transpositions only (of S groups); the labels stay elements of the group.
    """

    name: ClassVar[str] = "group"
    group: str = "S5"
    length: int = 32
    swaps: bool = False
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        checks.positive("length", self.length)
        if self.swaps and not re.fullmatch(r"S([2-9]\d*)", self.group):
            raise ValueError(f"swaps must go with a group S2, S3, ..., got group={self.group!r}")
        object.__setattr__(self, "vocab_size", len(permutations(self.group)))

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        elements = permutations(self.group)
        if self.swaps:
            moved = (elements != np.arange(elements.shape[1])).sum(1)
            inputs = rng.choice(np.flatnonzero(moved == 2), size=(n, self.length))
        else:
            inputs = rng.integers(len(elements), size=(n, self.length))
        table = products(self.group)
        labels = inputs.copy()
        for t in range(1, self.length):
            labels[:, t] = table[labels[:, t - 1], inputs[:, t]]
        return to_batch(inputs, labels)


@lru_cache
def permutations(group: str) -> np.ndarray:
    """``[order, points]``: the group's elements as permutations, in lexicographic order.

    Raises:
        ValueError: if the name is no group or the group is too large.
    """
    factors = group.split("x")
    if not all(re.fullmatch(r"[SAZ][1-9]\d{0,3}", f) for f in factors):
        raise ValueError(
            f"group must be S<n>, A<n>, Z<n> or a product such as A4xZ5, got {group!r}"
        )
    order, points = 1, 0
    for factor in factors:
        order *= _order(factor)
        if order > LARGEST:
            raise ValueError(f"group must have at most {LARGEST} elements, got {group!r}")
    parts = []
    for factor in factors:
        part = _elements(factor)
        parts.append(part + points)
        points += part.shape[1]
    rows = [np.concatenate(rows) for rows in itertools.product(*parts)]
    return np.array(rows)


@lru_cache
def products(group: str) -> np.ndarray:
    """``[order, order]``: the index of p*q, where (p*q)(i) = p[q[i]]."""
    elements = permutations(group)
    index = {row.tobytes(): i for i, row in enumerate(elements)}
    return np.array([[index[row.tobytes()] for row in p[elements]] for p in elements])


def _order(factor: str) -> int:
    kind, points = factor[0], int(factor[1:])
    if kind == "Z":
        return points
    order = 1
    for i in range(2 if kind == "S" else 3, points + 1):
        order *= i
        if order > LARGEST:
            break
    return order


def _elements(factor: str) -> np.ndarray:
    kind, points = factor[0], int(factor[1:])
    if kind == "Z":
        return (np.arange(points)[:, None] + np.arange(points)) % points
    every = list(itertools.permutations(range(points)))
    return np.array([p for p in every if kind == "S" or _even(p)])


def _even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
