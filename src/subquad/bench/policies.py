"""Policies side by side on a pretrained model: what each costs in quality, and what it saves.

A study is a list of cells: every policy, and the model without one, on every task at every length.
Each finished cell goes to results.json; the same study goes on from there.
"""

from __future__ import annotations

import json
import math
import operator
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench import spec
from subquad.bench.measure import peak_memory, timed
from subquad.bench.results import Results, machine
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.policies.base import Policy, Tally
    from subquad.policies.hook import Applied

Progress = Callable[[dict[str, Any]], None]
FULL = "full"
TASKS = ("niah", "text")
COUNTED = 2  # samples whose pairs are counted; the times of the others are taken
WRITTEN = 64  # tokens of a text that are fed one by one, and scored


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to measure.

    Attributes:
        model: a folder or name for AutoModelForCausalLM.
        policies: as :func:`policy` reads them; the model without any is always measured too, with
            None alone.
        tasks: "niah" (one fact of ``keys`` hidden in a text, asked at its end; accuracy) and "text"
            (perplexity of the last tokens, fed one by one).
        lengths: tokens of a prompt.
        samples: prompts, and texts, at each length.
        text: file or folder of the haystack and the text; None for the standard library of Python.
        keys: facts in a haystack.
        pieces: tokens of the prompt fed at once; None for all.
        seed: of the prompts, from 10**6 on for held-out text.
        device, dtype: of the model.
    """

    model: str
    policies: tuple[str, ...] | None
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (1024, 4096)
    samples: int = 10
    text: str | None = None
    keys: int = 4
    pieces: int | None = None
    seed: int = 1_000_000
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("samples", "keys", *(["pieces"] if self.pieces is not None else [])):
            checks.positive(name, getattr(self, name))
        for task in self.tasks:
            checks.one_of("task", task, TASKS)
        checks.one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        checks.device(self.device)
        for T in self.lengths:
            checks.positive("lengths", T)
        if self.policies is not None and not self.policies:
            raise ValueError("policies must name at least one, got none")
        for text in self.policies or ():
            policy(text)


def policy(text: str) -> Policy:
    """The policy that ``text`` names: ``quest``, ``quest:budget=512,page=16``, and joined by ``+``,
    ``vertical_slash:vertical=300,slash=300+quest``.

    Raises:
        ValueError: for an unknown name or option, and for policies that cannot be joined.
    """
    from subquad.policies.base import create_policy

    parts = []
    for part in text.split("+"):
        name, _, options = part.strip().partition(":")
        parts.append(create_policy(name, **spec.options(options)))
    return reduce(operator.add, parts)


def study(chosen: Study, out: Path, progress: Progress | None = None) -> Results:
    """Measure what is missing and return everything.

    Args:
        out: the folder of results.json.
        progress: is told ``{"cells", "cell", "index", "total", "done"}`` before each cell, then
            ``{"step"}`` and the score so far after each sample.

    Raises:
        ValueError: for what does not fit, before any measurement.
    """
    tell = progress or (lambda event: None)
    results = Results.load(out / "results.json")
    results.order = [FULL, *(chosen.policies or ())]
    cells = [
        (entry, task, T) for T in chosen.lengths for task in chosen.tasks for entry in results.order
    ]
    names = [f"policy/{entry}/{task}/{T}" for entry, task, T in cells]
    results.cells = {name: cell for name, cell in results.cells.items() if name in names}
    results.made = machine()
    host: Host | None = None
    for i, ((entry, task, T), name) in enumerate(zip(cells, names)):
        made = {**asdict(chosen), "policies": entry, "tasks": task, "lengths": T}
        done = results.done(name, made)
        total = chosen.samples
        tell({"cells": len(cells), "cell": name, "index": i, "total": total, "done": done})
        if not done:
            host = host or Host(chosen)
            measure = host.needles if task == "niah" else host.perplexity
            found = measure(entry, T, tell)
            head = {"kind": "policy", "entry": entry, "task": task, "length": T}
            results.cells[name] = {"spec": json.loads(json.dumps(made)), **head, **found}
            results.save()
    results.save()
    return results


class Host:
    """A pretrained model with its tokenizer, and what a study asks of it."""

    def __init__(self, chosen: Study) -> None:
        from transformers import AutoModelForCausalLM

        from subquad.models.checkpoint import tokenizer_of

        self.study = chosen
        self.tokenizer = tokenizer_of(chosen.model)
        dtype = getattr(torch, chosen.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=dtype).eval()
        self.model.to(chosen.device)
        self._made: dict[Any, tuple[Any, list[Any]]] = {}
        for entry in chosen.policies or ():
            with self.applied(entry):  # what does not fit is refused before any measurement
                pass

    def applied(self, entry: str) -> AbstractContextManager[Applied | None]:
        """The model with the policy of an entry on it."""
        import subquad

        if entry == FULL:
            return nullcontext(None)
        return subquad.apply(self.model, policy(entry))

    def needles(self, entry: str, T: int, tell: Progress) -> dict[str, Any]:
        """Accuracy on needles, and what the prompts cost."""
        task, prompts = self._prompts(T)
        costs, right = Costs(), 0.0
        with self.applied(entry) as on:
            for i, prompt in enumerate(prompts):
                ids = torch.tensor([task.tokens(prompt.text)])
                new = 1 + max(len(self._ids(" " + target)) for target in prompt.targets)
                wrote = self._run(ids, Greedy(new), on, costs, i, len(prompts))
                text = self.tokenizer.decode(wrote)
                right += task.score_text([text], [prompt])["accuracy"]
                tell({"step": i + 1, "accuracy": right / (i + 1)})
        score = {"metric": "accuracy", "higher_is_better": True, "score": right / len(prompts)}
        return {**score, "samples": len(prompts), **costs.summary()}

    def _prompts(self, T: int) -> tuple[Any, list[Any]]:
        """The task and its prompts; the last ones are kept, as every entry is asked the same."""
        from subquad.tasks import create_task

        key = (T, self.study.samples, self.study.seed, self.study.keys, self.study.text)
        if key not in self._made:
            task: Any = create_task(
                "niah_text",
                task="single_word",
                tokenizer=self.tokenizer,
                length=T,
                keys=self.study.keys,
                intro=False,
                reserve=16,
                path=self.study.text or sysconfig.get_paths()["stdlib"],
            )
            self._made = {key: (task, task.prompts(self.study.samples, self.study.seed))}
        return self._made[key]

    def perplexity(self, entry: str, T: int, tell: Progress) -> dict[str, Any]:
        """Perplexity of the last tokens of texts, each fed by itself behind the rest."""
        from subquad.tasks import create_task

        written = min(WRITTEN, T // 2)
        task = create_task(
            "text", tokenizer=self.tokenizer, length=T + written, path=self.study.text
        )
        batch = task.batch(self.study.samples, self.study.seed)
        costs, losses = Costs(), []
        with self.applied(entry) as on:
            for i, row in enumerate(batch.inputs):
                forced = Forced(row[T:].tolist())
                losses.append(self._run(row[None, :T], forced, on, costs, i, len(batch.inputs)))
                tell({"step": i + 1, "loss": sum(losses) / len(losses)})
        loss = sum(losses) / len(losses)
        score = {"metric": "perplexity", "higher_is_better": False, "score": math.exp(loss)}
        return {**score, "samples": len(losses), "scored": written, **costs.summary()}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _run(
        self, ids: Tensor, writer: Greedy | Forced, on: Applied | None, costs: Costs, i: int, n: int
    ) -> Any:
        """One prompt and its continuation. The first samples are counted, the others timed; the
        first is run again where there are no others."""
        from subquad.policies.base import Tally

        if i < COUNTED:
            tally = Tally()
            if on is not None:
                on.tally = tally
            made = self._read_and_write(ids, writer, on, costs, counted=True)
            if on is not None:
                on.tally = None
                costs.tallies.append(tally)
            if n > COUNTED or i + 1 < n:
                return made
        return self._read_and_write(ids, writer, on, costs, counted=False)

    def _read_and_write(
        self, ids: Tensor, writer: Greedy | Forced, on: Applied | None, costs: Costs, counted: bool
    ) -> Any:
        device = self.model.device
        cache = new_cache(self.model) if on is None else on.new_cache()
        logits: list[Tensor] = []

        def read() -> None:
            for part in ids.to(device).split(self.study.pieces or ids.shape[1], 1):
                logits[:] = [self._step(part, cache)]

        writer.start()
        if counted:
            costs.peak.append(peak_memory(read, device))
        else:
            costs.prefill.append(timed(read, device)[0])
        while (token := writer(logits[0])) is not None:
            more = torch.tensor([[token]], device=device)
            took, logits[0] = timed(partial(self._step, more, cache), device)
            if not counted:
                costs.decode.append(took)
        costs.cache.append(cache_bytes(cache))
        return writer.result

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()


class Greedy:
    """Writes the likeliest tokens; the result is these."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def start(self) -> None:
        self.result: list[int] = []

    def __call__(self, logits: Tensor) -> int | None:
        self.result.append(int(logits.argmax()))
        return self.result[-1] if len(self.result) < self.tokens else None


class Forced:
    """Writes given tokens; the result is their mean loss."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def start(self) -> None:
        self._losses: list[float] = []

    def __call__(self, logits: Tensor) -> int | None:
        token = self.tokens[len(self._losses)]
        self._losses.append(
            float(F.cross_entropy(logits[None], torch.tensor([token]).to(logits.device)))
        )
        return token if len(self._losses) < len(self.tokens) else None

    @property
    def result(self) -> float:
        return sum(self._losses) / len(self._losses)


class Costs:
    """What the samples of a cell took."""

    def __init__(self) -> None:
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.peak: list[int] = []
        self.cache: list[int] = []
        self.tallies: list[Tally] = []

    def summary(self) -> dict[str, Any]:
        """Medians: seconds of a prompt and of a token, bytes; and the shares of pairs."""
        phases = ("prefill", "decode")
        attended = {
            phase: sum(getattr(t, phase).attended for t in self.tallies)
            / max(sum(getattr(t, phase).visible for t in self.tallies), 1)
            if self.tallies
            else 1.0
            for phase in phases
        }
        return {
            "prefill": median(self.prefill),
            "decode": median(self.decode),
            "peak": max(self.peak),
            "cache": max(self.cache),
            "attended": attended,
        }


def new_cache(model: Any) -> Any:
    """An empty cache of a model's own kind."""
    from transformers import DynamicCache

    from subquad.caches.states import StateCache
    from subquad.models import CausalLM

    return StateCache() if isinstance(model, CausalLM) else DynamicCache(config=model.config)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache keeps allocated."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in held)


def rows(results: Results) -> Iterator[dict[str, Any]]:
    """The cells in order: by length, task, and entry."""
    cells = [c for c in results.cells.values() if c["kind"] == "policy"]
    place = {entry: i for i, entry in enumerate(results.order)}
    yield from sorted(cells, key=lambda c: (c["length"], c["task"], place[c["entry"]]))
