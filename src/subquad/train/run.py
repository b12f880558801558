"""A run under way: the model, its optimizer, and what a checkpoint holds of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad import checkpoint
from subquad.tasks.base import IGNORED, Batch, Task
from subquad.train.config import TrainConfig
from subquad.train.forward import parts, summed_loss
from subquad.train.ranks import Ranks

# A history keeps about so many steps, evenly spaced, and the last.
HISTORY = 2000


class NonFiniteLoss(RuntimeError):
    """The loss or the norm of its gradient became NaN or infinite."""


class Run:
    """``step`` updates of the model, going on from the last checkpoint in ``out``."""

    def __init__(
        self, model: nn.Module, task: Task, config: TrainConfig, ranks: Ranks, out: Path | None
    ) -> None:
        self.model, self.task, self.config = model, task, config
        self.ranks, self.out = ranks, out
        # Sharding makes new parameters, which have lost the attribute.
        decays = {
            name
            for name, p in model.named_parameters()
            if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)
        }
        ranks.shard(model)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for n, p in self.parameters.items() if (n in decays) is decayed],
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        fused = ranks.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, config.lr, config.betas, fused=fused)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self._unread: list[tuple[int, Tensor, Tensor]] = []
        self._unread_tokens = 0
        self._resume()
        self.start_clock()

    def start_clock(self) -> None:
        """From now on, time counts as training."""
        self._since = time.perf_counter()

    def update(self, batch: Batch) -> None:
        """One step. The loss is the mean over the labels of the whole batch, whoever has them."""
        config, ranks = self.config, self.ranks
        labels = int((batch.labels != IGNORED).sum())
        if not labels:
            raise ValueError(f"task {self.task.name!r} must give labels, got a batch without any")
        # Dropout depends on (seed, step, rank) alone: there is no random state to keep.
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 4099 + ranks.rank)
        self.model.train()
        total = torch.zeros((), device=ranks.device)
        for part in parts(ranks.rows(batch), config.micro_batch):
            with ranks.sequence(config):
                loss = summed_loss(self.model, part, ranks.device, config, self.task) / labels
                # FSDP takes the mean of the ranks' gradients; the loss is a sum over the ranks.
                (loss * ranks.size).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._unread.append((self.step, ranks.sum(total), checkpoint.whole(norm).float()))
        self._unread_tokens += batch.labels.numel()  # an image is one

    def read(self) -> dict[str, Any]:
        """Take the losses of the steps since the last reading from the device; the last of them.

        Raises:
            NonFiniteLoss: naming the first step where the loss or its gradient went wrong.
        """
        values = torch.stack([torch.stack(pair) for _, *pair in self._unread]).tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self.start_clock()
        self.seconds += seconds
        self.tokens += self._unread_tokens
        spacing = max(1, self.config.steps // HISTORY)
        entry: dict[str, Any] = {}
        for (step, *_), (loss, norm) in zip(self._unread, values, strict=True):
            entry = {"step": step, "loss": loss, "lr": self.config.lr_at(step - 1)}
            entry |= {"grad_norm": norm, "tokens_per_second": self._unread_tokens / seconds}
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLoss(self._diagnosis(entry))
            if step % spacing == 0 or step == self.config.steps:
                self.history.append(entry)
        self._unread, self._unread_tokens = [], 0
        return entry

    def _diagnosis(self, entry: dict[str, Any]) -> str:
        last = None if self.out is None else checkpoint.latest(self.out)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
        return (
            f"loss {entry['loss']} and gradient norm {entry['grad_norm']} at step "
            f"{entry['step']} with lr {entry['lr']:.3g}; {kept}. "
            "A lower lr, a longer warmup or a smaller clip may help"
        )

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder: every rank must call.

        Raises:
            OSError: if it cannot be written; older ones stay.
        """
        if self.out is None:
            return
        weights = checkpoint.weights(self.model)
        model = {name: checkpoint.whole(t).cpu() for name, t in weights.items()}
        optimizer = checkpoint.moments(self.optimizer, self.parameters)
        data = {name: getattr(self, name) for name in ("history", "evals", "tokens", "seconds")}
        data["identity"] = self._identity()
        error = None
        if self.ranks.rank == 0:
            try:
                tensors = {"model": model, "optimizer": optimizer}
                checkpoint.save(self.out, self.step, tensors, data)
            except OSError as caught:
                error = caught
        if self.ranks.agree(error is not None):
            raise error or OSError(f"rank 0 could not save a checkpoint in {self.out}")

    def _resume(self) -> None:
        found = None if self.out is None else checkpoint.load(self.out)
        if found is None:
            return
        differ = list(_differences(found.data.get("identity"), self._identity()))
        if differ:
            raise ValueError(
                f"out must be empty or hold this run's own checkpoints, but {found.path} is of "
                f"another run: {'; '.join(differ[:4])}"
            )
        with torch.no_grad():
            for name, t in checkpoint.weights(self.model).items():
                t.copy_(checkpoint.shard(found.tensors["model"][name], t))
        checkpoint.load_moments(self.optimizer, self.parameters, found.tensors["optimizer"])
        self.step = found.step
        for name in ("history", "evals", "tokens", "seconds"):
            setattr(self, name, found.data[name])

    def _identity(self) -> Any:
        """What must be the same when a run is gone on with, as JSON gives it back."""
        weights = checkpoint.weights(self.model)
        config: Any = getattr(self.model, "config", None)
        options = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
        options.pop("transformers_version", None)
        identity = {
            "train": self.config.identity(),
            "task": {"name": self.task.name, **self.task.options()},
            "model": options,
            "weights": {name: [str(t.dtype), *t.shape] for name, t in weights.items()},
        }
        return json.loads(json.dumps(identity, default=str))


def _differences(saved: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where two trees of plain data differ, in words."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in {**wanted, **saved}:
            inner = f"{name}.{key}" if name else key
            yield from _differences(saved.get(key), wanted.get(key), inner)
    elif saved != wanted:
        yield f"{name} was {saved!r}, is {wanted!r}"
