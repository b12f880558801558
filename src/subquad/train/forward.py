"""Through the model: the loss of a batch, and the scores of an evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from subquad import parallel
from subquad.tasks.base import EVAL_SEEDS, IGNORED, Batch, Task
from subquad.train.config import TrainConfig
from subquad.train.ranks import Ranks


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, config: TrainConfig, ranks: Ranks | None = None
) -> dict[str, float]:
    """The task's scores on ``eval_batches`` batches of the evaluation seeds."""
    ranks = Ranks.join(model) if ranks is None else ranks
    was_training = model.training
    model.eval()
    scores = []
    for i in range(config.eval_batches):
        batch = ranks.rows(task.batch(config.batch, EVAL_SEEDS + i))
        for part in parts(batch, config.micro_batch):
            with ranks.sequence(config):
                logits = whole_logits(model, part, ranks.device, config, task)
            scores.append(task.score(logits, part))
    model.train(was_training)
    mean = task.combine(scores)
    if ranks.size > 1:
        names = sorted(mean)
        values = torch.tensor([mean[n] for n in names], device=ranks.device)
        mean = task.combine([dict(zip(names, (ranks.sum(values) / ranks.size).tolist()))])
    return mean


def summed_loss(
    model: nn.Module, batch: Batch, device: torch.device, config: TrainConfig, task: Task
) -> Tensor:
    """The task's loss, summed over the labels."""
    labels = batch.labels
    if parallel.current() is not None:
        if labels.shape != batch.inputs.shape or task.conditions:
            raise ValueError(f"labels must be one a token to split them, got {list(labels.shape)}")
        labels = parallel.split(labels, fill=IGNORED)
        batch = Batch(parallel.split(batch.inputs, fill=0), labels)
    return task.summed_loss(logits_of(model, batch, device, config, task), labels)


def whole_logits(
    model: nn.Module, batch: Batch, device: torch.device, config: TrainConfig, task: Task
) -> Tensor:
    """The logits of the whole sequences, also where they are split: on every process."""
    if parallel.current() is None:
        return logits_of(model, batch, device, config, task)
    own = Batch(parallel.split(batch.inputs, fill=0), batch.labels)
    logits = logits_of(model, own, device, config, task)
    return parallel.join(logits)[:, : batch.inputs.shape[1]]


def logits_of(
    model: nn.Module, batch: Batch, device: torch.device, config: TrainConfig, task: Task
) -> Tensor:
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # A model that can keep a cache would build one for nothing.
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    options |= {name: batch.meta[name].to(device, non_blocking=True) for name in task.conditions}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        found = model(batch.inputs.to(device, non_blocking=True), **options)
    return found if isinstance(found, Tensor) else found.logits


def parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    n = len(batch.inputs)
    for start in range(0, n, size or n):
        yield batch.rows(start, start + (size or n))
