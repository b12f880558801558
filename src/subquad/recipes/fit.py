"""Training named parameters in groups, so that a kill at any point changes nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad import checkpoint
from subquad.recipes.base import Stage
from subquad.recipes.texts import Texts
from subquad.tasks.ahead import Ahead

Tell = Callable[[dict[str, Any]], None]
Groups = Mapping[str, Mapping[str, nn.Parameter]]
SAVE_SECONDS = 60.0
READ_EVERY = 10


class Diverged(RuntimeError):
    """A loss became NaN or infinite."""


def fit(
    stage: Stage,
    groups: Groups,
    step: Callable[[Tensor], Mapping[str, Tensor]],
    texts: Texts,
    *,
    folder: Path,
    identity: Any,
    tell: Tell,
    device: torch.device,
    save_every: int | None = None,
) -> list[dict[str, Any]]:
    """Train the groups, each with a loss and a limit on the gradient of its own.

    Batches depend on (seed, step) alone, so a run that goes on from its last checkpoint ends with
    the same weights, and a group ends with the same weights whichever groups are beside it.

    Args:
        groups: named parameters by the group's name.
        step: takes tokens ``[n,T]``, does the backward pass and returns each group's loss.
        folder: of the checkpoints; identity: what must be the same to go on from one.
        tell: is told ``{"step", "loss", "losses", "tokens_per_second", "left"}``, left in seconds.
        save_every: steps between checkpoints; about a minute's where None.

    Returns:
        The history: ``{"step", "loss", "losses"}``.

    Raises:
        ValueError: where the folder holds the checkpoint of something else.
        Diverged: where a loss is not finite; the last checkpoint stays.
    """
    run = _Fit(stage, groups, folder, identity)
    unread: list[Mapping[str, Tensor]] = []
    saved = since = time.perf_counter()
    begun = run.step

    def draw(seed: int) -> Tensor:
        tokens = texts.tokens(stage.batch, stage.length, seed)
        return tokens.pin_memory() if device.type == "cuda" else tokens

    with Ahead(draw, stage.seed, run.step) as batches:
        while run.step < stage.steps:
            # From pinned memory nothing waits for the step before.
            unread.append(run.update(next(batches).to(device, non_blocking=True), step))
            now = time.perf_counter()
            last = run.step == stage.steps
            due = (
                run.step % save_every == 0 if save_every is not None else now - saved > SAVE_SECONDS
            )
            if last or due or len(unread) >= READ_EVERY or device.type == "cpu":
                event = run.read(unread)
                unread = []
                speed = (run.step - begun) / max(time.perf_counter() - since, 1e-9)
                rate = speed * stage.batch * stage.length
                left = (stage.steps - run.step) / speed
                tell({**event, "tokens_per_second": rate, "left": left})
            if last or due:
                run.save()
                saved = time.perf_counter()
    return run.history


class _Fit:
    def __init__(self, stage: Stage, groups: Groups, folder: Path, identity: Any) -> None:
        self.stage, self.groups, self.folder = stage, groups, folder
        self.identity = json.loads(json.dumps(identity))
        self.parameters = {n: p for group in groups.values() for n, p in group.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), stage.lr, stage.betas, weight_decay=stage.weight_decay
        )
        self.step, self.history = 0, []  # type: ignore[var-annotated]
        self._resume()

    def update(
        self, tokens: Tensor, step: Callable[[Tensor], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        losses = step(tokens)
        for group in self.groups.values():
            nn.utils.clip_grad_norm_(group.values(), self.stage.clip)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.stage.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def read(self, unread: list[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Take the losses from the device; the last of them goes into the history."""
        names = list(self.groups)
        rows = torch.stack([torch.stack([each[n] for n in names]) for each in unread]).tolist()
        for i, row in enumerate(rows):
            if not all(map(math.isfinite, row)):
                at = self.step - len(rows) + 1 + i
                kept = checkpoint.latest(self.folder)
                raise Diverged(f"loss {row} at step {at}; a lower lr may help; kept: {kept}")
        losses = dict(zip(names, rows[-1], strict=True))
        event = {"step": self.step, "loss": sum(rows[-1]) / len(names), "losses": losses}
        spacing = max(1, self.stage.steps // 200)
        if self.step % spacing < len(rows) or self.step == self.stage.steps:
            self.history.append(event)
        return event

    def save(self) -> None:
        model = {name: p.detach().cpu() for name, p in self.parameters.items()}
        optimizer = checkpoint.moments(self.optimizer, self.parameters)
        data = {"identity": self.identity, "history": self.history}
        checkpoint.save(self.folder, self.step, {"model": model, "optimizer": optimizer}, data)

    def _resume(self) -> None:
        found = checkpoint.load(self.folder)
        if found is None:
            return
        if found.data.get("identity") != self.identity:
            raise ValueError(
                f"out must hold this conversion's checkpoints, {found.path} is another"
            )
        with torch.no_grad():
            for name, t in found.tensors["model"].items():
                self.parameters[name].copy_(t)
        checkpoint.load_moments(self.optimizer, self.parameters, found.tensors["optimizer"])
        self.step, self.history = found.step, list(found.data["history"])
