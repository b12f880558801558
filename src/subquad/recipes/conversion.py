"""A conversion under way: transfer, the choice of layers, tuning; each step found done is kept."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from subquad import checkpoint
from subquad.mixers.base import Mixer
from subquad.models import CausalLM
from subquad.ops import checks
from subquad.recipes import choose, student, transfer, tune
from subquad.recipes.base import Recipe, Transfer, Tune
from subquad.recipes.fit import Tell, fit
from subquad.recipes.folder import Folder
from subquad.recipes.texts import Texts

LINE_EVERY = 10.0


class Conversion:
    """The stages of one conversion over a teacher, in its folder."""

    def __init__(
        self,
        teacher: CausalLM,
        recipe: Recipe,
        texts: Texts,
        folder: Folder,
        keep: list[int] | int,
        dtype: str,
        save_every: int | None,
        progress: Tell | None,
    ) -> None:
        self.teacher, self.recipe, self.texts, self.folder = teacher, recipe, texts, folder
        self.keep, self.dtype, self.save_every = keep, dtype, save_every
        self.tell = progress or Lines()

    @property
    def replaced(self) -> list[int]:
        """The layers that are transferred: all where those to keep are still to be chosen."""
        depth = self.teacher.config.depth
        return [l for l in range(depth) if isinstance(self.keep, int) or l not in self.keep]

    def identity(self) -> dict[str, Any]:
        """What must be the same where a conversion is gone on with."""
        config = self.teacher.config.to_diff_dict()
        config.pop("transformers_version", None)
        lengths = sorted({stage.length for stage in self.recipe.stages})
        return {
            **self.recipe.identity(),
            "keep": self.keep,
            "dtype": self.dtype,
            "teacher": config,
            "texts": [self.texts.task(length).options() for length in lengths],
        }

    def checked(self, layers: Iterable[int] | None) -> list[int] | None:
        """The layers to transfer alone, after the checks that need no training.

        Raises:
            ValueError: for layers that are not replaced, and a stage that does not fit the mixer.
        """
        stages = self.recipe.stages
        if not self.replaced:
            raise ValueError(f"keep must leave a layer to replace, got {self.keep}")
        first = self._mixers([self.replaced[0]])[self.replaced[0]]
        for i, stage in enumerate(stages):
            if isinstance(stage, Transfer):
                transfer.check(first, stage)
                transfer.trained({0: first}, stage)
                if any(isinstance(earlier, Tune) for earlier in stages[:i]):
                    raise ValueError("stages must transfer before they tune")
            vocab = self.texts.task(stage.length).vocab_size
            if vocab > self.teacher.config.vocab_size:
                raise ValueError(
                    f"tokenizer must fit the model's {self.teacher.config.vocab_size} tokens, "
                    f"it has {vocab}"
                )
        if layers is None:
            return None
        asked = sorted(set(layers))
        for l in asked:
            checks.one_of("layers", l, self.replaced)
        if not any(isinstance(stage, Transfer) for stage in stages):
            raise ValueError(f"layers need a recipe with a transfer, {self.recipe.key!r} has none")
        return asked

    def go(self, alone: list[int] | None, at_once: int | None) -> CausalLM | None:
        stages = list(enumerate(self.recipe.stages))
        mixers = self._mixers(self.replaced)
        for i, stage in stages:
            if isinstance(stage, Transfer):
                self._transfer(i, stage, mixers, alone or self.replaced, at_once)
        if alone is not None:
            return None
        keep = self._kept(mixers)
        chosen = {l: mixer for l, mixer in mixers.items() if l not in keep}
        config = student.plan(self.teacher, self.recipe, keep)
        model = student.assemble(self.teacher, config, chosen)
        for i, stage in stages:
            if isinstance(stage, Tune):
                model = self._tune(i, stage, model, list(chosen))
        return model

    def _mixers(self, layers: list[int]) -> dict[int, Mixer]:
        config = student.plan(
            self.teacher, self.recipe, set(range(self.teacher.config.depth)) - set(layers)
        )
        return {l: student.twin(self.teacher, config, l) for l in layers}

    def _transfer(
        self,
        index: int,
        stage: Transfer,
        mixers: dict[int, Mixer],
        layers: list[int],
        at_once: int | None,
    ) -> None:
        """Train the layers that are not done yet; each one's weights go to a file of its own."""
        root = self.folder.stage(index)
        files = {l: root / f"layer-{l:03d}.safetensors" for l in layers}
        pending = [l for l in layers if not files[l].exists()]
        size = at_once or max(len(pending), 1)
        for some in (pending[i : i + size] for i in range(0, len(pending), size)):
            group = {l: mixers[l] for l in some}
            name = f"layers-{some[0]}-{some[-1]}-{len(some)}"
            self._announce(index, f"transfer, layers {', '.join(map(str, some))}", stage.steps)
            history = self._fit(
                stage,
                transfer.trained(group, stage),
                transfer.stepper(self.teacher, group, stage, self._autocast),
                root / name,
            )
            for l in some:
                _save(mixers[l], files[l])
            self._record(f"{index} transfer {name}", stage, history)
        for l in layers:
            found = load_file(files[l])
            with torch.no_grad():
                for name, t in checkpoint.weights(mixers[l]).items():
                    t.copy_(found[name])
            mixers[l].requires_grad_(False)

    def _kept(self, mixers: dict[int, Mixer]) -> list[int]:
        if not isinstance(self.keep, int):
            return self.keep
        record = self.folder.record
        if "scores" not in record:
            found = choose.scores(self.teacher, mixers, self.recipe, self.texts)
            record["scores"] = {str(l): found[l] for l in found}
            record["kept"] = choose.best(found, self.keep)
            self.folder.save()
        return record["kept"]

    def _tune(self, index: int, stage: Tune, model: CausalLM, new: list[int]) -> CausalLM:
        teaches = stage.loss == "logits"
        if stage.how == "full":
            model = student.own(model)
        else:  # adapters must not come upon the teacher's own layers
            for block in model.blocks:
                block.mixer = deepcopy(block.mixer)
        tuned, groups = tune.prepared(model, stage, new)
        name = "distillation" if teaches else "next token"
        self._announce(index, f"{name}, {stage.how}", stage.steps)
        step = tune.stepper(tuned, self.teacher, stage, self._autocast)
        history = self._fit(stage, groups, step, self.folder.stage(index))
        self._record(f"{index} {name}, {stage.how}", stage, history)
        return tune.merged(tuned)

    def _fit(self, stage: Any, groups: Any, step: Any, folder: Path) -> list[dict[str, Any]]:
        return fit(
            stage,
            groups,
            step,
            self.texts,
            folder=folder,
            identity=self.folder.record["identity"],
            tell=self.tell,
            device=self.teacher.device,
            save_every=self.save_every,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.teacher.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def _announce(self, index: int, name: str, total: int) -> None:
        count = len(self.recipe.stages)
        self.tell({"cells": count, "cell": name, "index": index, "total": total, "done": False})

    def _record(self, name: str, stage: Any, history: list[dict[str, Any]]) -> None:
        tokens = stage.steps * stage.batch * stage.length
        self.folder.record["stages"][name] = {"tokens": tokens, "history": history}
        self.folder.save()


class Lines:
    """Progress where nobody asked to be told: a line on stderr every ten seconds."""

    def __init__(self) -> None:
        self._said, self._total = 0.0, 0

    def __call__(self, event: dict[str, Any]) -> None:
        if "cell" in event:
            self._total = event["total"]
            print(event["cell"], file=sys.stderr)
            return
        now = time.perf_counter()
        if now - self._said < LINE_EVERY and event["step"] < self._total:
            return
        self._said = now
        layers = ", ".join(f"{name} {loss:.3g}" for name, loss in event["losses"].items())
        print(
            f"step {event['step']}/{self._total}: {layers}, "
            f"{event['tokens_per_second']:,.0f} tokens/s, {event['left']:.0f} s left",
            file=sys.stderr,
        )


def _save(mixer: Mixer, path: Path) -> None:
    aside = path.with_name(f".{path.name}")
    weights = checkpoint.weights(mixer)
    save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, aside)
    os.replace(aside, path)
