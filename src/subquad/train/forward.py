"""Through the model: the loss of a batch, and the scores of an evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
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
                logits = whole_logits(model, part.inputs, ranks.device, config)
            scores.append(task.score(logits, part))
    model.train(was_training)
    mean = task.combine(scores)
    if ranks.size > 1:
        names = sorted(mean)
        values = torch.tensor([mean[n] for n in names], device=ranks.device)
        mean = task.combine([dict(zip(names, (ranks.sum(values) / ranks.size).tolist()))])
    return mean


def summed_loss(
    model: nn.Module, batch: Batch, device: torch.device, config: TrainConfig
) -> Tensor:
    """Cross entropy in float32, summed over the labels."""
    inputs, labels = batch.inputs, batch.labels
    if parallel.current() is not None:
        if labels.shape != inputs.shape:
            raise ValueError(f"labels must be one a token to split them, got {list(labels.shape)}")
        inputs, labels = parallel.split(inputs, fill=0), parallel.split(labels, fill=IGNORED)
    logits = logits_of(model, inputs, device, config)
    logits = logits.flatten(0, -2)
    labels = labels.flatten()
    # Found on the CPU, where the labels are: the GPU need not wait to count them.
    scored = (labels != IGNORED).nonzero()[:, 0]
    if len(scored) < len(labels):
        logits, labels = logits.index_select(0, scored.to(device)), labels[scored]
    return F.cross_entropy(logits.float(), labels.to(device), reduction="sum")


def whole_logits(
    model: nn.Module, inputs: Tensor, device: torch.device, config: TrainConfig
) -> Tensor:
    """The logits of the whole sequences, also where they are split: on every process."""
    if parallel.current() is None:
        return logits_of(model, inputs, device, config)
    logits = logits_of(model, parallel.split(inputs, fill=0), device, config)
    return parallel.join(logits)[:, : inputs.shape[1]]


def logits_of(
    model: nn.Module, inputs: Tensor, device: torch.device, config: TrainConfig
) -> Tensor:
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # A model that can keep a cache would build one for nothing.
    takes = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        found = model(inputs.to(device, non_blocking=True), **options)
    return found if isinstance(found, Tensor) else found.logits


def parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    n = len(batch.inputs)
    for start in range(0, n, size or n):
        yield batch.rows(start, start + (size or n))
