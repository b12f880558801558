"""How to train."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from subquad.ops import checks
from subquad.parallel.mesh import ATTENTION, RECURRENCE

DTYPES = ("auto", "float32", "bfloat16")
# What may differ when a run is gone on with: it changes no weight.
_CADENCE = (
    "eval_every",
    "eval_batches",
    "save_every",
    "micro_batch",
    "sequence",
    "sequence_attention",
    "sequence_recurrence",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with warm-up, cosine decay and clipping.

    Attributes:
        steps: updates of the weights.
        batch: sequences a step, over all devices.
        micro_batch: sequences that a device takes through the model at a time; None for all.
        lr: peak learning rate.
        min_lr_ratio: the last learning rate, as a part of ``lr``.
        warmup: steps of linear growth up to ``lr``.
        weight_decay: of matrices; vectors, scalars and parameters that carry the attribute
            ``_no_weight_decay`` have none.
        betas: of AdamW.
        clip: largest norm of the gradient; 0 for no limit.
        eval_every: steps between evaluations; 0 for one at the end only.
        eval_batches: batches of an evaluation.
        save_every: steps between checkpoints; 0 for one at the end only.
        seed: of the batches and of dropout, not of the initial weights.
        dtype: what the model computes in, "float32" or "bfloat16" (autocast; weights and
            optimizer stay float32); "auto" is bfloat16 on GPUs.
        sequence: processes that share a sequence, each with a run of its tokens (see
            :mod:`subquad.parallel`); the number of all processes is a multiple of it.
        sequence_attention: how they do in softmax layers, "ring", "ulysses" or "gather".
        sequence_recurrence: how they do in linear ones, "lasp2" or "ulysses".
    """

    steps: int = 1000
    batch: int = 32
    micro_batch: int | None = None
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_every: int = 0
    eval_batches: int = 4
    save_every: int = 200
    seed: int = 0
    dtype: str = "auto"
    sequence: int = 1
    sequence_attention: str = "ring"
    sequence_recurrence: str = "lasp2"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_batches", "sequence"):
            checks.positive(name, getattr(self, name))
        for name in ("warmup", "eval_every", "save_every", "seed"):
            checks.positive(name, getattr(self, name), zero=True)
        if self.micro_batch is not None:
            checks.positive("micro_batch", self.micro_batch)
        checks.one_of("dtype", self.dtype, DTYPES)
        checks.one_of("sequence_attention", self.sequence_attention, ATTENTION)
        checks.one_of("sequence_recurrence", self.sequence_recurrence, RECURRENCE)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in 0..1, got {self.min_lr_ratio!r}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in 0..1, 1 excluded, got {self.betas!r}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of the update number ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)

    def identity(self) -> dict[str, Any]:
        """The options that determine the weights, as plain data."""
        plain = {name: v for name, v in asdict(self).items() if name not in _CADENCE}
        return {**plain, "betas": list(self.betas)}
