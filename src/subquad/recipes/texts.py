"""The texts of a conversion as a task of any length: windows drawn from a seed, some held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from subquad.ops import checks
from subquad.tasks import create_task
from subquad.tasks.base import EVAL_SEEDS, Batch, Task, to_batch
from subquad.tasks.text import HELD_OUT
from subquad.tasks.tokens import encode, vocabulary

STDLIB = "stdlib"


@dataclass(frozen=True, kw_only=True)
class Strings(Task):
    """Windows of given texts, joined by line ends; the last 5% of the tokens are held out."""

    name: ClassVar[str] = "strings"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    length: int = 256
    texts: tuple[str, ...]
    tokenizer: Any
    vocab_size: int = field(init=False)
    _ids: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", vocabulary(self.tokenizer))
        ids = np.array(encode(self.tokenizer, "\n".join(self.texts)))
        object.__setattr__(self, "_ids", ids)
        if int(HELD_OUT * len(ids)) <= self.length:
            raise ValueError(
                f"texts must have more than {int((self.length + 1) / HELD_OUT)} tokens for "
                f"length={self.length}, got {len(ids)}"
            )

    def options(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._ids.tobytes()).hexdigest()
        return {"length": self.length, "tokens": len(self._ids), "digest": digest}

    def batch(self, n: int, seed: int) -> Batch:
        checks.positive("n", n)
        cut = len(self._ids) - int(HELD_OUT * len(self._ids))
        part = self._ids[cut:] if seed >= EVAL_SEEDS else self._ids[:cut]
        starts = self.generator(seed).integers(len(part) - self.length, size=n)
        rows = np.stack([part[s : s + self.length + 1] for s in starts])
        return to_batch(rows[:, :-1], rows[:, 1:])


class Texts:
    """What ``texts`` of ``convert`` stands for, at any length.

    Args:
        texts: a file or folder, "stdlib" for the source of Python's standard library, strings, or
            a task whose inputs are the texts.
        tokenizer: of the model.

    Raises:
        ValueError: where there are none.
    """

    def __init__(self, texts: str | os.PathLike[str] | Sequence[str] | Task, tokenizer: Any):
        if texts is None or (not isinstance(texts, Task | os.PathLike) and not len(texts)):
            raise ValueError(
                "texts must be a file, a folder, strings, or 'stdlib' for the source of Python's "
                f"standard library, got {texts!r}"
            )
        path = isinstance(texts, str | os.PathLike)
        if path and texts != STDLIB and not Path(texts).expanduser().exists():  # type: ignore[arg-type]
            raise ValueError(f"texts must be a file or a folder that exists, got {str(texts)!r}")
        if tokenizer is None and not isinstance(texts, Task):
            raise ValueError("tokenizer must be given where the model's folder holds none")
        self.texts, self.tokenizer = texts, tokenizer
        self._tasks: dict[int, Task] = {}

    def task(self, length: int) -> Task:
        """Windows of ``length`` tokens."""
        if length not in self._tasks:
            self._tasks[length] = self._task(length)
        return self._tasks[length]

    def _task(self, length: int) -> Task:
        if isinstance(self.texts, Task):
            return replace(self.texts, length=length)
        if isinstance(self.texts, str | os.PathLike):
            path = None if self.texts == STDLIB else self.texts
            return create_task("text", length=length, path=path, tokenizer=self.tokenizer)
        return Strings(texts=tuple(self.texts), tokenizer=self.tokenizer, length=length)

    def tokens(self, batch: int, length: int, seed: int) -> torch.Tensor:
        """int64 ``[batch, length]``; seeds from 10**6 on are of held-out text."""
        return self.task(length).batch(batch, seed).inputs
