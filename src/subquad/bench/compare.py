"""The comparison: mixers and hybrids under equal parameters and steps, on tasks and on the clock.

A comparison is a list of cells: every entry trained on every task, then every entry timed over the
length. Each finished cell goes to results.json; a cell that was cut short goes on from its
training checkpoint, a finished one is kept as long as nothing that it depends on has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.bench import spec
from subquad.bench.match import build, matched, parameters
from subquad.bench.results import Results, machine
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.models.config import CausalLMConfig
    from subquad.models.vision import VisionConfig
    from subquad.tasks.base import Task
    from subquad.train import TrainConfig

Progress = Callable[[dict[str, Any]], None]
# label=model: an equals sign outside the brackets of options.
_LABELLED = re.compile(r"((?:[^\[\]=]|\[[^\]]*\])+)=(.+)")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and how.

    Attributes:
        mixers: models as :mod:`subquad.bench.spec` names them; ``label=model`` sets the label.
        tasks: tasks as :mod:`subquad.bench.spec` names them. Their options may hold those of
            training (``mqar[pairs=8,steps=400]``), which go before the ones below. On "images" the
            mixers are those of vision models, of ``patch`` pixels a token
            (``images[size=28,patch=2]``), and nothing is timed over the length for them.
        dim: C, the width of every model; depth: its layers.
        heads: of every mixer that has heads and is not given another number; None leaves each its
            default.
        mlp_dim: inner width of the MLP of the largest entry; the others get wider ones, so that
            all have equally many parameters (within 2%).
        init_std: deviation of the initial weights.
        steps, batch, lr, warmup, weight_decay: of training.
        eval_every, eval_batches: how often, and on how many held-out batches, to evaluate.
        seed: of weights and batches.
        lengths: at which to time; none leaves the timing out.
        text: file or folder that the task "text" reads; None for its default.
        budget: seconds that a single timed prompt may take; longer lengths are left out.
        device: "cpu" or "cuda".
    """

    mixers: tuple[str, ...]
    tasks: tuple[str, ...] = ("mqar", "text")
    dim: int = 64
    depth: int = 4
    heads: int | None = None
    mlp_dim: int = 128
    init_std: float = 0.02
    steps: int = 500
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    eval_every: int = 100
    eval_batches: int = 4
    seed: int = 0
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    budget: float = 20.0
    device: str = "cpu"
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "mlp_dim", "steps", "batch", "eval_every", "eval_batches"):
            checks.positive(name, getattr(self, name))
        if not self.mixers:
            raise ValueError("mixers must name at least one model, got none")
        for T in self.lengths:
            checks.positive("lengths", T)
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must be rising, got {list(self.lengths)}")
        labels = [label for label, _ in self.entries()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"mixers must have different labels, got {labels}")

    def entries(self) -> list[tuple[str, str]]:
        """(label, model) of every entry."""
        matches = [_LABELLED.fullmatch(text) for text in self.mixers]
        return [
            (m[1].strip(), m[2].strip()) if m else (text, text)
            for m, text in zip(matches, self.mixers, strict=True)
        ]


# Every entry has a short convolution somewhere: without one, a transformer of this size needs ten
# times the steps before it recalls anything.
DEMO = Comparison(
    mixers=(
        "softmax=base_conv softmax",
        "based=based[feature_dim=8,window=8]",
        "gated_deltanet=gated_deltanet[head_dim=24]",
        "hybrid:3=gated_deltanet[head_dim=24]*3 softmax",
    ),
    tasks=(
        "mqar[vocab_size=64,length=32,pairs=8]",
        "text[length=128,batch=8,steps=200]",
    ),
    heads=1,
    init_std=0.045,
    steps=400,
    lr=3e-3,
    lengths=(256, 1024, 4096, 8192),
)
PRESETS = {
    "default": Comparison(mixers=("softmax", "based", "gated_deltanet", "hybrid:3")),
    "demo": DEMO,
}


def compare(
    comparison: Comparison,
    out: Path,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> Results:
    """Run what is missing of a comparison and return all of it.

    Args:
        comparison: what to run.
        out: the folder of results.json and of the training checkpoints.
        progress: is told ``{"cells", "cell", "index", "total", "done"}`` before each cell and,
            within it, what training and timing report.
        share: ``(i, n)`` runs every n-th cell from the i-th on, so that n processes do the work
            together; each writes its own results-i.json, which a later call for all gathers.

    Raises:
        ValueError: for names, options and sizes that do not fit, before any training.
    """
    checks.device(comparison.device)
    tell = progress or (lambda event: None)
    first, processes = share
    cells = list(_cells(comparison))[first::processes]
    if processes == 1:
        results = Results.load(out / "results.json")
        for part in sorted(out.glob("results-*.json")):
            results.cells |= Results.load(part).cells
    else:
        results = Results.load(out / f"results-{first}.json")
    results.order = [label for label, _ in comparison.entries()]
    names = {cell.name for cell in cells}
    results.cells = {name: cell for name, cell in results.cells.items() if name in names}
    results.made = machine()
    for i, cell in enumerate(cells):
        done = results.done(cell.name, cell.spec)
        tell(
            {
                "cells": len(cells),
                "cell": cell.name,
                "index": i,
                "total": cell.total,
                "done": done,
            }
        )
        if not done:
            results.cells[cell.name] = {"spec": cell.spec, **cell.run(out / "cells", tell)}
            results.save()
    results.save()
    return results


@dataclass(frozen=True)
class _Cell:
    """One measurement of ``total`` steps: ``spec`` is all that it depends on."""

    name: str
    total: int
    spec: dict[str, Any]
    measure: Callable[[Path, Progress], dict[str, Any]]

    def run(self, folder: Path, tell: Progress) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:16]
        return self.measure(folder / digest, tell)


def _cells(comparison: Comparison) -> Iterator[_Cell]:
    """All the cells, checked: nothing that a user can get wrong is left for later."""
    from subquad.tasks import create_task

    for text in comparison.tasks:
        name, options = spec.named(text)
        config, options = _training(comparison, options)
        if name == "text" and comparison.text is not None:
            options.setdefault("path", comparison.text)
        patch = options.pop("patch", 2) if name == "images" else None
        task = create_task(name, **options)
        models = _models(comparison, task.vocab_size) if patch is None else (
            _vision_models(comparison, task, patch)
        )  # fmt: skip
        for label, model in models.items():
            yield _train_cell(label, name, task, model, config, comparison)
    reads = any(spec.named(text)[0] != "images" for text in comparison.tasks)
    if comparison.lengths and (reads or not comparison.tasks):
        for label, model in _models(comparison, 256).items():
            yield _speed_cell(label, model, comparison)


def _models(comparison: Comparison, vocab_size: int) -> dict[str, CausalLMConfig]:
    """Each entry's model for a vocabulary, all of one size."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": comparison.dim,
        "depth": comparison.depth,
        "mlp_dim": comparison.mlp_dim,
        "init_std": comparison.init_std,
        "tie_embeddings": True,
    }
    return matched(comparison.entries(), heads=comparison.heads, **sizes)


def _vision_models(comparison: Comparison, task: Any, patch: int) -> dict[str, VisionConfig]:
    """Each entry's model of images, all of one size."""
    if task.size % patch:
        raise ValueError(f"patch must divide the images' size={task.size}, got {patch}")
    return matched(
        comparison.entries(),
        make=partial(spec.vision, heads=comparison.heads or 4),
        mlp_dim=comparison.mlp_dim,
        dim=comparison.dim,
        depth=comparison.depth,
        init_std=comparison.init_std,
        channels=task.channels,
        classes=task.vocab_size,
        patch=patch,
    )


def _training(
    comparison: Comparison, options: Mapping[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The training configuration of a task, and the options that are the task's own."""
    from subquad.train import TrainConfig

    names = {f.name for f in fields(TrainConfig)}
    shared = {name: value for name, value in asdict(comparison).items() if name in names}
    own = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return TrainConfig(**{**shared, **own}), rest


def _train_cell(
    label: str,
    name: str,
    task: Task,
    model: CausalLMConfig | VisionConfig,
    config: TrainConfig,
    comparison: Comparison,
) -> _Cell:
    def measure(folder: Path, tell: Progress) -> dict[str, Any]:
        from subquad.train import train

        lm = build(model, comparison.seed, comparison.device)
        found = train(lm, task, config, out=folder, progress=tell)
        size = getattr(task, "size", None)
        return {
            "kind": "train",
            "entry": label,
            "task": name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "tokens": task.length if size is None else (size // model.patch) ** 2,
            "steps": found.steps,
            "parameters": parameters(model),
            "mlp_dim": model.mlp_dim,
            "score": found.evals[-1][task.metric],
            "state_bytes": lm.state_bytes(task.length),
            "flops": lm.flops(task.length if size is None else size),
            "history": found.history,
            "evals": found.evals,
            "tokens_per_second": found.tokens_per_second,
        }

    depends = {
        "model": _plain(model),
        "task": {"name": name, **task.options()},
        "train": asdict(config),
        "seed": comparison.seed,
        "device": comparison.device,
    }
    return _Cell(f"train/{label}/{name}", config.steps, json.loads(json.dumps(depends)), measure)


def _speed_cell(label: str, model: CausalLMConfig, comparison: Comparison) -> _Cell:
    def measure(folder: Path, tell: Progress) -> dict[str, Any]:
        from subquad.bench.measure import over_lengths

        lm = build(model, comparison.seed, comparison.device).eval()
        if comparison.device == "cuda":
            lm.bfloat16()
        found = over_lengths(lm, lengths, budget=comparison.budget, progress=tell)
        return {"kind": "speed", "entry": label, "parameters": parameters(model), **found}

    lengths = comparison.lengths
    depends = {
        "model": _plain(model),
        "lengths": lengths,
        "budget": comparison.budget,
        "device": comparison.device,
    }
    return _Cell(f"speed/{label}", len(lengths), json.loads(json.dumps(depends)), measure)


def _plain(config: CausalLMConfig | VisionConfig) -> dict[str, Any]:
    """What a model's configuration adds to the defaults, without versions."""
    return {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
