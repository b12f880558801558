"""Classification of real images: scikit-learn's handwritten digits, or images of your own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.tasks.base import EVAL_SEEDS, Batch, Task
from subquad.tasks.pictures import Pictures, open_pictures


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """Square images and their classes.

    A part of the images is held out: training never sees them, and seeds from 10**6 on give
    nothing else, consecutive seeds one shuffled pass over them after the other. The split depends
    on ``split_seed`` alone.

    ``batch`` has ``inputs`` float32 ``[n,channels,size,size]`` in -1..1 and ``labels`` int64
    ``[n]``.

    Attributes:
        size: height and width that images are scaled to (digits: up from 8x8).
        channels: 1 (grey) or 3.
        path: a folder of images, one folder a class (needs Pillow); a ``.safetensors`` file of
            ``images`` (``[count,1 or 3,H,W]``, uint8 or floats in 0..1) and ``labels``; None for
            the digits (needs scikit-learn).
        held_out: part of the images that is kept for evaluation.
        split_seed: of the choice of those.
        shift: training images are moved by up to so many pixels on each axis.
        vocab_size: the classes; length: the pixels of an image.
    """

    name: ClassVar[str] = "images"
    size: int = 32
    channels: int = 1
    path: str | os.PathLike[str] | None = None
    held_out: float = 0.2
    split_seed: int = 0
    shift: int = 0
    vocab_size: int = field(init=False)
    length: int = field(init=False)
    classes: tuple[str, ...] = field(init=False, repr=False)
    _pictures: Pictures = field(init=False, repr=False, compare=False)
    _parts: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.positive("size", self.size)
        checks.one_of("channels", self.channels, (1, 3))
        checks.positive("split_seed", self.split_seed, zero=True)
        checks.positive("shift", self.shift, zero=True)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in 0..1, both excluded, got {self.held_out!r}")
        pictures = open_pictures(self.path)
        count = len(pictures.labels)
        kept = count - math.ceil(self.held_out * count)
        if not 0 < kept < count:
            raise ValueError(
                f"held_out must leave images to train on and to evaluate on, got "
                f"{self.held_out!r} of {count}"
            )
        order = np.random.default_rng(self.split_seed).permutation(count)
        object.__setattr__(self, "_pictures", pictures)
        object.__setattr__(self, "_parts", (order[:kept], order[kept:]))
        object.__setattr__(self, "classes", pictures.classes)
        object.__setattr__(self, "vocab_size", len(pictures.classes))
        object.__setattr__(self, "length", self.size**2)

    @property
    def counts(self) -> tuple[int, int]:
        """Images to train on, and held out."""
        return len(self._parts[0]), len(self._parts[1])

    def options(self) -> dict[str, Any]:
        """With what the pictures are in place of where they lie."""
        return {**super().options(), "path": self._pictures.digest(), "images": list(self.counts)}

    def stream(self) -> dict[str, Any]:
        """Streams choose places in the set, whatever pictures stand there."""
        return {**super().options(), "path": None, "images": list(self.counts)}

    def batch(self, n: int, seed: int) -> Batch:
        checks.positive("n", n)
        checks.positive("seed", seed, zero=True)
        if seed >= EVAL_SEEDS:
            held = self._parts[1]
            places = ((seed - EVAL_SEEDS) * n + np.arange(n)) % len(held)
            return self._batch(held[places])
        rng = self.generator(seed)
        train = self._parts[0]
        chosen = self._batch(rng.choice(train, n, replace=n > len(train)))
        if not self.shift:
            return chosen
        moves = rng.integers(-self.shift, self.shift + 1, (n, 2)).tolist()
        return Batch(_shifted(chosen.inputs, moves, self.shift), chosen.labels)

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Compare ``logits [n,classes]`` with the labels: ``accuracy`` and ``loss`` (nats)."""
        expected = (len(batch.labels), self.vocab_size)
        if tuple(logits.shape) != expected:
            raise ValueError(
                f"logits must be [n,classes]={list(expected)}, got {list(logits.shape)}"
            )
        logits = logits.float().cpu()
        return {
            "accuracy": (logits.argmax(-1) == batch.labels).double().mean().item(),
            "loss": F.cross_entropy(logits, batch.labels).item(),
        }

    def _batch(self, which: np.ndarray) -> Batch:
        images = self._pictures.take(which.tolist(), self.size, self.channels)
        return Batch(images * 2 - 1, self._pictures.labels[torch.from_numpy(which)])


def _shifted(x: Tensor, moves: list[list[int]], most: int) -> Tensor:
    """Each image moved by its own (rows, columns), black moving in."""
    H, W = x.shape[-2:]
    wide = F.pad(x, (most, most, most, most), value=-1.0)
    parts = [
        image[:, most - i : most - i + H, most - j : most - j + W]
        for image, (i, j) in zip(wide, moves, strict=True)
    ]
    return torch.stack(parts)
