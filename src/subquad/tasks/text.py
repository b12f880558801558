"""Language modelling on real text: by default the source of the Python standard library, which
every machine with Python has."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from subquad.ops import checks
from subquad.tasks.base import EVAL_SEEDS, Batch, Task, to_batch
from subquad.tasks.tokens import encode_all, vocabulary

HELD_OUT = 0.05
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Windows of text at random places; the label is the next token.

    Nothing is kept in memory but the files' names and sizes: a window is read, and tokenized, when
    it is asked for. Some 5% of the files (of a single file, its last 5%) are held out: training
    never reads them, and seeds from 10**6 on read nothing else.

    Attributes:
        length: T.
        path: a file, or a folder (of which the ``*.py`` of the standard library, or all text
            files that are not hidden); None for the standard library of this interpreter.
        tokenizer: any object with encode and decode; None for bytes.
        vocab_size: of the tokenizer.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    length: int = 256
    path: str | os.PathLike[str] | None = None
    tokenizer: Any = None
    vocab_size: int = field(init=False)
    _parts: tuple[Corpus, Corpus] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.positive("length", self.length)
        object.__setattr__(self, "vocab_size", vocabulary(self.tokenizer))
        object.__setattr__(self, "_parts", split(self.path))
        for part in self._parts:
            if part.size <= self.length:
                raise ValueError(
                    f"length must be less than the {part.size} bytes of "
                    f"{'held-out ' * (part is self._parts[1])}text, got {self.length}"
                )

    def options(self) -> dict[str, Any]:
        return {**super().options(), "bytes": [part.size for part in self._parts]}

    def batch(self, n: int, seed: int) -> Batch:
        checks.positive("n", n)
        checks.positive("seed", seed, zero=True)
        corpus = self._parts[seed >= EVAL_SEEDS]
        rng = self.generator(seed)
        rows = np.array(self._windows(corpus, rng, n))
        return to_batch(rows[:, :-1], rows[:, 1:])

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        scores = super().score(logits, batch)
        return self.combine([{"loss": scores["loss"], "accuracy": scores["accuracy"]}])

    def combine(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        means = super().combine(scores)
        return {**means, "perplexity": math.exp(min(means["loss"], 700))}

    def _windows(self, corpus: Corpus, rng: np.random.Generator, n: int) -> list[list[int]]:
        """``n`` rows of ``length + 1`` tokens."""
        wanted = self.length + 1
        if self.tokenizer is None:
            starts = [int(rng.integers(corpus.size - self.length)) for _ in range(n)]
            return [list(corpus.read(start, wanted)) for start in starts]
        starts = [int(rng.integers(corpus.size)) for _ in range(n)]
        rows: list[list[int]] = [[] for _ in starts]
        size = 6 * wanted
        while short := [i for i, row in enumerate(rows) if len(row) < wanted]:
            # Text that reaches the end goes on at the start.
            found = encode_all(self.tokenizer, [corpus.text(starts[i], size) for i in short])
            for i, ids in zip(short, found, strict=True):
                rows[i] = ids[:wanted]
            size *= 2
        return rows


@dataclass(frozen=True)
class Corpus:
    """Stretches of files as one long text: (file, first byte, bytes)."""

    spans: tuple[tuple[Path, int, int], ...]

    def __post_init__(self) -> None:
        ends = np.cumsum([length for *_, length in self.spans]).tolist()
        object.__setattr__(self, "_ends", ends)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._ends[-1] if self._ends else 0  # type: ignore[attr-defined]

    def read(self, start: int, count: int) -> bytes:
        """``count`` bytes from byte ``start`` on, around the end where they reach it."""
        out = bytearray()
        ends: list[int] = self._ends  # type: ignore[attr-defined]
        while len(out) < count:
            start %= self.size
            at = bisect.bisect_right(ends, start)
            path, first, length = self.spans[at]
            inside = start - (ends[at] - length)
            with open(path, "rb") as file:
                file.seek(first + inside)
                part = file.read(min(count - len(out), length - inside))
            if not part:
                raise OSError(f"{path} has become shorter while it was being read")
            out += part
            start += len(part)
        return bytes(out)

    def text(self, start: int, count: int) -> str:
        """The text of some ``count`` bytes from the first whole line at ``start`` on."""
        raw = self.read(start, count)
        head, newline, tail = raw.partition(b"\n")
        return (tail if newline and tail else head).decode(errors="ignore")


def split(path: str | os.PathLike[str] | None = None) -> tuple[Corpus, Corpus]:
    """The text to train on, and the text held out.

    Raises:
        ValueError: if there is no such path or no text in it.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path).expanduser()
    if not root.exists():
        raise ValueError(f"path must be a file or a folder, got {str(root)!r}")
    if root.is_file():
        size = root.stat().st_size
        kept = size - math.ceil(HELD_OUT * size)
        return Corpus(((root, 0, kept),)), Corpus(((root, kept, size - kept),))
    files = _files(root, ".py" if path is None else "")
    if len(files) < 2:
        raise ValueError(f"path must hold at least two text files, {str(root)!r} has {len(files)}")
    # A file's place in the order of hashes does not depend on the machine or on the other files.
    hashed = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(hashed[: math.ceil(HELD_OUT * len(files))])
    spans = [(name, (root / name, 0, size)) for name, size in files.items()]
    return (
        Corpus(tuple(span for name, span in spans if name not in held)),
        Corpus(tuple(span for name, span in spans if name in held)),
    )


def _files(root: Path, suffix: str) -> dict[str, int]:
    """The text files under ``root`` and their sizes, in the order of their names."""
    found = {}
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED and name[0] != "."]
        for name in names:
            file = Path(folder, name)
            if name[0] == "." or not name.endswith(suffix) or not file.is_file():
                continue
            if (size := file.stat().st_size) and not _binary(file):
                found[file.relative_to(root).as_posix()] = size
    return dict(sorted(found.items()))


def _binary(file: Path) -> bool:
    with open(file, "rb") as opened:
        return b"\0" in opened.read(1024)
