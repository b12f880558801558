"""What a conversion is made of, as data: a mixer in place of softmax attention, and stages.

The harness (``run.py`` and what it calls) reads these and knows no single system.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from subquad.ops import checks

TARGETS = ("heads", "output", "weights")
EVERY = ("steps", "batch", "length", "seed")  # what all stages can be given at once


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training: AdamW, warm-up, cosine decay, a limit on each layer's gradient.

    Attributes:
        steps, batch, length: updates, texts in each, tokens of a text.
        lr: the highest; min_lr_ratio: the last one as a part of it; warmup: steps up to it.
        clip: the largest norm of the gradient, of each layer by itself in a transfer.
        seed: of the texts.
    """

    kind: ClassVar[str] = ""
    steps: int = 500
    batch: int = 8
    length: int = 1024
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            checks.positive(name, getattr(self, name))
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        for name in ("warmup", "seed"):
            checks.positive(name, getattr(self, name), zero=True)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in 0..1, got {self.min_lr_ratio!r}")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive and finite, got {self.clip!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of update number ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)

    def identity(self) -> dict[str, Any]:
        """All that determines the result, as plain data."""
        return {"kind": self.kind, **asdict(self), "betas": list(self.betas)}


@dataclass(frozen=True, kw_only=True)
class Transfer(Stage):
    """Attention transfer: every new mixer learns to do what the attention it replaces does.

    Each is fed the teacher's true input; the layers do not see each other.

    Attributes:
        target: "heads" (mean squared error of the heads' outputs before ``o_proj``), "output"
            (of the mixer's output) or "weights" (cross-entropy of the attention weights, which is
            their KL divergence and a constant; quadratic in ``length``).
        train: parts of the names of the parameters that learn; all of the mixer where empty.
        scale: multiplies the loss.
    """

    kind: ClassVar[str] = "transfer"
    lr: float = 1e-2
    target: str = "heads"
    train: tuple[str, ...] = ()
    scale: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("target", self.target, TARGETS)


@dataclass(frozen=True, kw_only=True)
class Tune(Stage):
    """The whole model learns from its text or from the teacher's logits.

    Attributes:
        loss: "next" (cross-entropy of the next token) or "logits" (KL of the teacher's).
        how: "lora" (adapters on ``targets`` in the new mixers, merged at the end) or "full".
        rank, alpha, targets: of the adapters.
        train: with "lora", parts of the names of parameters that learn beside the adapters.
    """

    kind: ClassVar[str] = "tune"
    lr: float = 1e-4
    loss: str = "next"
    how: str = "lora"
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("loss", self.loss, ("next", "logits"))
        checks.one_of("how", self.how, ("lora", "full"))
        checks.positive("rank", self.rank)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A conversion. A subclass gives the defaults of a published one.

    Attributes:
        mixer: the catalogue's key of what replaces softmax attention.
        options: of the mixer, over those of the layer that it replaces.
        stages: in order.
        kept: the mixer of the layers that are kept, and kept_options over the layer's own.
        scored: how a layer to keep is chosen: "recall" (by the loss that its replacement costs on
            repeated text) or "ratio" (that loss over the one on plain text, as HALO does).
    """

    key: ClassVar[str] = ""
    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    kept: str = "softmax"
    kept_options: Mapping[str, Any] = field(default_factory=dict)
    scored: str = "recall"

    def __post_init__(self) -> None:
        checks.one_of("scored", self.scored, ("recall", "ratio"))

    def identity(self) -> dict[str, Any]:
        """All that determines the result, as plain data."""
        return {
            "recipe": self.key,
            "mixer": self.mixer,
            "options": dict(self.options),
            "kept": self.kept,
            "kept_options": dict(self.kept_options),
            "scored": self.scored,
            "stages": [stage.identity() for stage in self.stages],
        }

    def with_stages(self, kind: str = "", /, **changes: Any) -> Recipe:
        """A copy in which every stage has other ``steps``, ``batch``, ``length`` or ``seed``; with
        a ``kind``, "transfer" or "tune", the stages of that kind other values of any field.

        Raises:
            ValueError: for an unknown field, and where there is no stage of that kind.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        own = [stage for stage in self.stages if kind in ("", stage.kind)]
        if given and kind and not own:
            raise ValueError(f"recipe {self.key!r} has no stage of kind {kind!r}")
        known = [f.name for f in fields(own[0])] if kind and own else EVERY
        for name in given:
            checks.one_of("a stage's option", name, known)
        stages = (replace(s, **given) if kind in ("", s.kind) else s for s in self.stages)
        return replace(self, stages=tuple(stages))
