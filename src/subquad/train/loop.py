"""The training loop: one device, or any number under ``torchrun``, where FSDP2 shards the weights
and each rank takes its rows of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad import checkpoint
from subquad.tasks.ahead import Ahead
from subquad.tasks.base import Batch, Task
from subquad.train.config import TrainConfig
from subquad.train.forward import evaluate
from subquad.train.progress import Progress, display
from subquad.train.ranks import Ranks
from subquad.train.run import Run

# Steps between two readings of the loss on a GPU, which otherwise would wait at every step.
READ_EVERY = 10


@dataclass(frozen=True)
class TrainResult:
    """What a run has seen, the parts before a restart included.

    Attributes:
        history: of up to some thousand steps, ``{"step", "loss", "lr", "grad_norm",
            "tokens_per_second"}``.
        evals: of each evaluation, ``step`` and the task's scores.
        steps: updates made.
        tokens_per_second: mean speed of training, evaluation and saving not counted.
    """

    history: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    steps: int
    tokens_per_second: float


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    out: Path | str | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train ``model`` in place; go on from the last checkpoint in ``out`` where there is one.

    The model maps tokens ``[n,T]`` to logits ``[n,T,vocab]``, or images ``[n,C,H,W]`` to logits
    ``[n,classes]`` (an image then counts as one token), or to an object that has them as
    ``logits``; or, with the task's ``conditions`` beside the inputs, to what its loss takes. Killed
    and started again, it ends with the same weights, on CPU to the bit: batches and dropout depend
    on (seed, step) alone. It is left in ``eval`` mode.

    Args:
        model: on the device to train on; under ``torchrun`` it is moved and sharded here.
        task: draws the batches, with seeds below ``EVAL_SEEDS``, and scores the evaluations.
        config: how.
        out: folder of the checkpoints; None keeps none.
        progress: is told ``{"step", "loss", "lr", "grad_norm", "tokens_per_second"}`` and, at an
            evaluation, the same with the scores, whose ``loss`` goes before. None draws a bar on
            a terminal, else prints lines.
        stop: asked after every step; True saves a checkpoint and returns.

    Raises:
        ValueError: if ``out`` holds the checkpoint of another run.
        NonFiniteLoss: as soon as it is seen; the last good checkpoint stays.
        OSError: if a checkpoint cannot be written; the older ones stay.
    """
    ranks = Ranks.join(model, config.sequence)
    ranks.share(config.batch)
    run = Run(model, task, config, ranks, None if out is None else Path(out))
    with ExitStack() as stack:
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        if ranks.rank:
            progress = _silent
        elif progress is None:
            progress = stack.enter_context(display(config.steps))
        batches = stack.enter_context(
            Ahead(partial(task.batch, config.batch), config.seed, run.step)
        )
        stack.callback(model.eval)
        _loop(run, batches, progress, stop)
    speed = run.tokens / run.seconds if run.seconds else 0.0
    return TrainResult(run.history, run.evals, run.step, speed)


def export(model: Any, folder: Path | str) -> None:
    """``model.save_pretrained(folder)``, also where the model was sharded: every rank must call.

    Args:
        model: a transformers model, as :class:`subquad.models.causal_lm.CausalLM`.
        folder: written by rank 0.
    """
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    kept, put_together = model.state_dict().keys(), {}
    for _, t in tensors:
        if id(t) not in put_together:  # tied weights stay one tensor
            put_together[id(t)] = checkpoint.whole(t)
    if Ranks.join(model).rank == 0:
        state = {name: put_together[id(t)] for name, t in tensors if name in kept}
        model.save_pretrained(folder, state_dict=state)


def _loop(
    run: Run, batches: Iterator[Batch], tell: Progress, stop: Callable[[], bool] | None
) -> None:
    config, ranks = run.config, run.ranks
    read_every = READ_EVERY if ranks.device.type == "cuda" else 1
    stopped = False
    run.start_clock()
    while run.step < config.steps and not stopped:
        run.update(next(batches))
        stopped = stop is not None and ranks.agree(stop())
        last = run.step == config.steps
        evaluates = last or _due(run.step, config.eval_every)
        saves = last or stopped or _due(run.step, config.save_every)
        if evaluates or saves or run.step % read_every == 0:
            event = run.read()
            tell(event)
        if evaluates:
            run.evals.append({"step": run.step, **evaluate(run.model, run.task, config, ranks)})
            tell({**event, **run.evals[-1]})
        if saves:
            run.save()
        if evaluates or saves:
            run.start_clock()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _silent(event: dict[str, Any]) -> None:
    pass
