"""Flow matching on real images: which way from noise to the image.

Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; straight paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.tasks.base import EVAL_SEEDS, Batch
from subquad.tasks.images import Images


@dataclass(frozen=True, kw_only=True)
class Flow(Images):
    """The images of :class:`~subquad.tasks.images.Images` on their way from noise.

    ``batch`` has ``inputs``, ``(1 - t) noise + t image``, and ``labels``, ``image - noise``, both
    float32 ``[n,channels,size,size]``; in ``meta`` the ``time`` t ``[n]`` and the ``classes``
    ``[n]``, some of them ``len(self.classes)``, which stands for none. Evaluation seeds give
    held-out images with noise and times that depend on the seed alone, and every class.

    Attributes:
        drop: part of the training images whose class the model is not told, so that it can be
            guided to it.
    """

    name: ClassVar[str] = "flow"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ("time", "classes")
    drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must lie in 0..1, got {self.drop!r}")

    def batch(self, n: int, seed: int) -> Batch:
        found = super().batch(n, seed)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(found.inputs.shape, generator=generator)
        # One time in each n-th of the way, in random order: the loss differs with the time.
        time = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        classes = found.labels
        if seed < EVAL_SEEDS:
            untold = torch.rand(n, generator=generator) < self.drop
            classes = classes.masked_fill(untold, self.vocab_size)
        t = time[:, None, None, None]
        x = (1 - t) * noise + t * found.inputs
        return Batch(x, found.inputs - noise, {"time": time, "classes": classes})

    def summed_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The squared error, summed over the pixels, in float32."""
        return F.mse_loss(logits.float(), labels.to(logits.device), reduction="sum")

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """The mean squared error of velocities ``[n,channels,size,size]``: ``loss``."""
        checks.shape("logits", logits, tuple(batch.labels.shape))
        return {"loss": F.mse_loss(logits.float().cpu(), batch.labels).item()}
