"""The contract of a task: batches drawn from a seed, and a score."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.tasks.tokens import decode, encode, vocabulary

IGNORED = -100
# Seeds below it are for training, seeds from it on for evaluation.
EVAL_SEEDS = 1_000_000


@dataclass(frozen=True)
class Batch:
    """Token sequences and what to predict at each position; or images and their classes.

    Attributes:
        inputs: int64 ``[n,T]``; images are float32 ``[n,C,H,W]`` with labels ``[n]``.
        labels: int64 ``[n,T]``, the token to predict AT each position (already aligned with the
            inputs); -100 where nothing is scored.
        meta: what else is known, e.g. ``depth [n]``, the needle's place in 0..1.
    """

    inputs: Tensor
    labels: Tensor
    meta: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Batch:
        """The rows ``start..stop``, tensors in ``meta`` included."""
        meta = {k: v[start:stop] if torch.is_tensor(v) else v for k, v in self.meta.items()}
        return Batch(self.inputs[start:stop], self.labels[start:stop], meta)


@dataclass(frozen=True)
class Prompt:
    """A question in text.

    Attributes:
        text: the whole prompt; the answer follows it.
        targets: the strings that a right answer holds.
        length: tokens of ``text`` under the task's tokenizer.
        depth: place of the (first asked) needle in the haystack, 0 at its start, 1 at its end.
    """

    text: str
    targets: tuple[str, ...]
    length: int
    depth: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation task. A subclass is a frozen dataclass of options and writes ``draw(n, rng)``.

    The same (options, seed) give the same data. By convention training uses seeds below 10**6 and
    evaluation seeds from 10**6 on.

    Attributes:
        vocab_size: ids lie in 0..vocab_size-1, those of labels included.
        length: T, tokens of a sequence.
        metric: the name, among the scores, by which models are compared.
        higher_is_better: the sense of ``metric``.
        conditions: what of a batch's ``meta`` the model is called with beside the inputs.
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ()
    vocab_size: int
    length: int

    def options(self) -> dict[str, Any]:
        """The options as plain data: what, with the seed, determines the data."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.init}

    def stream(self) -> dict[str, Any]:
        """The options that the random streams depend on: those, where nothing else is said."""
        return self.options()

    def generator(self, seed: int) -> np.random.Generator:
        """A random stream of its own for every (task, options, seed)."""
        text = json.dumps([self.name, self.stream()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).digest()
        return np.random.default_rng([seed, int.from_bytes(digest[:16], "big")])

    def batch(self, n: int, seed: int) -> Batch:
        """``n`` sequences drawn from ``seed``.

        Raises:
            ValueError: unless n is positive and seed is not negative.
        """
        checks.positive("n", n)
        checks.positive("seed", seed, zero=True)
        return self.draw(n, self.generator(seed))

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        raise NotImplementedError

    def summed_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What training minimises, summed over the labels: the cross entropy, in float32."""
        logits, labels = logits.flatten(0, -2), labels.flatten()
        # Found on the CPU, where the labels are: the GPU need not wait to count them.
        scored = (labels != IGNORED).nonzero()[:, 0]
        if len(scored) < len(labels):
            logits, labels = logits.index_select(0, scored.to(logits.device)), labels[scored]
        return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Compare ``logits [n,T,vocab]`` with the labels.

        Returns:
            ``accuracy`` over the scored positions, ``exact_match`` (rows where all of them are
            right) and ``loss`` (mean cross entropy in nats).
        """
        rows, columns, labels = _scored(logits, batch)
        picked = logits[rows.to(logits.device), columns.to(logits.device)].float().cpu()
        right = self.right(picked.argmax(-1), labels)
        wrong_rows = rows[~right].unique().numel()
        return {
            "accuracy": right.double().mean().item(),
            "exact_match": 1 - wrong_rows / rows.unique().numel(),
            "loss": F.cross_entropy(picked, labels).item(),
        }

    def right(self, guess: Tensor, labels: Tensor) -> Tensor:
        """Which guesses at the scored positions (row by row, flat) are right."""
        return guess == labels

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The scores of several batches of one size as one."""
        return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task whose questions are text. A subclass writes ``prompts(n, seed)``.

    ``batch`` gives the same questions as tokens, the answer behind them and scored under teacher
    forcing, padded with id 0 on the right to a common length.
    """

    vocab_size: int = field(init=False)
    length: int = 4096
    tokenizer: Any = None

    def __post_init__(self) -> None:
        checks.positive("length", self.length)
        object.__setattr__(self, "vocab_size", vocabulary(self.tokenizer))

    def prompts(self, n: int, seed: int) -> list[Prompt]:
        """``n`` prompts of at most ``length`` tokens, the room for the answer included."""
        raise NotImplementedError

    def score_text(self, predictions: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, float]:
        """The scores of the texts that a model wrote behind the prompts."""
        raise NotImplementedError

    def tokens(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def text(self, tokens: Sequence[int]) -> str:
        return decode(self.tokenizer, tokens)

    def batch(self, n: int, seed: int) -> Batch:
        prompts = self.prompts(n, seed)
        pairs = [(self.tokens(p.text), self.tokens(" " + ", ".join(p.targets))) for p in prompts]
        width = max(len(ask) + len(answer) for ask, answer in pairs) - 1
        inputs = torch.zeros(n, width, dtype=torch.int64)
        labels = torch.full((n, width), IGNORED)
        for row, (ask, answer) in enumerate(pairs):
            stop = len(ask) + len(answer) - 1
            inputs[row, :stop] = torch.tensor((ask + answer)[:-1])
            labels[row, len(ask) - 1 : stop] = torch.tensor(answer)
        return Batch(inputs, labels, {"depth": torch.tensor([p.depth for p in prompts])})


def distinct(rng: np.random.Generator, n: int, count: int, size: int) -> np.ndarray:
    """``[n,count]``: in each row ``count`` different integers of 0..size-1, in random order."""
    return np.stack([rng.choice(size, count, replace=False) for _ in range(n)])


def to_batch(inputs: np.ndarray, labels: np.ndarray, **meta: Any) -> Batch:
    """A batch of arrays; arrays in ``meta`` become tensors."""
    tensors = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in meta.items()}
    return Batch(
        torch.as_tensor(inputs.astype(np.int64)), torch.as_tensor(labels.astype(np.int64)), tensors
    )


def at_most(name: str, value: int, most: int, why: str, *, least: int = 1) -> None:
    """``value`` must be an int in ``least..most``, for the reason ``why``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an int in {least}..{most} ({why}), got {value!r}")


def depths(rng: np.random.Generator, n: int, depth: float | None) -> np.ndarray:
    """``[n]`` places in 0..1: all at ``depth``, or one in each n-th of the range, shuffled."""
    if depth is None:
        return (rng.permutation(n) + rng.random(n)) / n
    return np.full(n, float(depth))


def check_depth(depth: float | None) -> None:
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0..1 or be None (everywhere), got {depth!r}")


def _scored(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    expected = tuple(batch.labels.shape)
    if logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
        raise ValueError(
            f"logits must be [n,T,vocab] with [n,T]={list(expected)}, got {list(logits.shape)}"
        )
    labels = batch.labels.cpu()
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return rows, columns, labels[rows, columns]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return f"{type(value).__name__} of {vocabulary(value)}"
