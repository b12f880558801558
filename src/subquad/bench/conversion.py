"""A converted model beside its teacher: quality, bytes of the cache, tokens a second."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from subquad.bench import units
from subquad.bench.measure import over_lengths
from subquad.bench.policies import TASKS, Host, Progress, Study
from subquad.bench.results import machine, write_json
from subquad.ops import checks
from subquad.recipes.card import write_eval
from subquad.recipes.folder import RECORD

SPEED = (1024, 4096, 16384, 65536)


def evaluate(
    folder: Path,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (1024, 4096),
    speed: Sequence[int] = SPEED,
    samples: int = 10,
    text: str | None = None,
    teacher: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a converted model and its teacher; write ``eval.json`` and the table in the card.

    Args:
        folder: of the converted model.
        tasks: "niah" (needles) and "text" (perplexity), at ``lengths`` tokens.
        speed: tokens behind which the cache is weighed and decoding timed; none where empty.
        samples: prompts, and texts, at each length.
        text: file or folder of haystack and text; Python's standard library where None.
        teacher: the model before; as the folder's record says where None.
        progress: is told of each cell and each sample.

    Returns:
        ``{"rows", "made"}``; a row has ``what``, ``length``, ``before`` and ``after``.

    Raises:
        ValueError: where the folder holds no converted model or the teacher is not to be had.
    """
    record = folder / RECORD
    if not record.is_file():
        raise ValueError(f"DIR must be the folder of a conversion, {folder} has no {RECORD}")
    said = json.loads(record.read_text())
    if not said["done"]:
        raise ValueError(f"DIR must hold a finished conversion, go on with it first: {folder}")
    teacher = teacher or said["model"]
    if not (Path(teacher) / "config.json").is_file() and Path(teacher).name == teacher:
        raise ValueError(f"teacher must be the model's folder, got {teacher!r}")
    for name, values in (("lengths", lengths), ("speed", speed)):
        for value in values:
            checks.positive(name, value)
    tell = progress or (lambda event: None)
    sides = []
    for name, model in (("before", teacher), ("after", str(folder))):
        study = Study(
            model=model, policies=None, tasks=tuple(tasks), lengths=tuple(lengths),
            samples=samples, text=text, device=device, dtype=dtype,
        )  # fmt: skip
        sides.append(dict(_side(name, study, speed, tell)))
    rows = [
        {"what": what, "length": T, "before": sides[0].get((what, T)), "after": after}
        for (what, T), after in sides[1].items()
    ]
    found = {"rows": rows, "device": device, "dtype": dtype, "made": machine()}
    write_json(folder / "eval.json", found)
    write_eval(folder, table(rows))
    return found


def _side(
    name: str, study: Study, speed: Sequence[int], tell: Progress
) -> Iterator[tuple[tuple[str, int], float]]:
    """What one model measures, by (what, tokens)."""
    host = Host(study)
    cells = [(task, T) for task in study.tasks for T in study.lengths]
    for i, (task, T) in enumerate(cells):
        event = {"cells": len(cells) + 1, "cell": f"{name}, {task}, {T} tokens", "index": i}
        tell({**event, "total": study.samples, "done": False})
        if task == "niah":
            yield ("needles, accuracy", T), host.needles("full", T, tell)["score"]
        else:
            yield ("perplexity", T), host.perplexity("full", T, tell)["score"]
    if speed:
        event = {"cells": len(cells) + 1, "cell": f"{name}, speed", "index": len(cells)}
        tell({**event, "total": len(speed), "done": False})
        timed = over_lengths(_on_our_layers(host.model), speed, progress=tell)
        for T, held, seconds in zip(timed["lengths"], timed["state"], timed["decode"]):
            yield ("cache, bytes", T), held
            yield ("decode, tokens/s", T), 1 / seconds


def _on_our_layers(model: Any) -> Any:
    """The teacher on our layers, which keep the same cache; a converted model as it is."""
    from subquad.models import CausalLM
    from subquad.recipes.teacher import import_decoder

    return model if isinstance(model, CausalLM) else import_decoder(model).eval()


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| | tokens | before | after |", "| --- | ---: | ---: | ---: |"]
    before = ""
    for row in sorted(rows, key=lambda r: (r["what"], r["length"])):
        what = row["what"] if row["what"] != before else ""
        sides = " | ".join(shown(row["what"], row[side]) for side in ("before", "after"))
        lines.append(f"| {what} | {row['length']:,} | {sides} |")
        before = row["what"]
    return lines


def shown(what: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "bytes" in what:
        return units.bytes_(value)
    return f"{value:,.0f}" if "tokens/s" in what else f"{value:.3f}"
