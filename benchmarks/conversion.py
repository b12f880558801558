"""What conversions of a small pretrained model lose, and what they save.

    python benchmarks/conversion.py MODEL              # all cells (a GPU; minutes)
    python benchmarks/conversion.py MODEL --cell lolcats/both --cell teacher

Every cell converts MODEL on the source of Python's standard library with one recipe and one choice
of kept layers, then measures perplexity on held-out files at 1,024 tokens, needles in a haystack,
and the bytes of the cache. Cells are written to results/conversion.json one by one and are not
measured again; ``--report`` writes the section of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad.bench.policies import Host, Study
from subquad.bench.results import machine, write_json
from subquad.recipes import create_recipe
from subquad.recipes.base import Transfer, Tune
from subquad.tasks import create_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion.json"
SAMPLES = 20

# recipe, kept layers, stages run, options of the mixer, further changes of its stages
CELLS: dict[str, dict[str, Any]] = {
    "lolcats/both": {"recipe": "lolcats"},
    "lolcats/transfer alone": {"recipe": "lolcats", "only": "transfer"},
    "lolcats/keep 1": {"recipe": "lolcats", "keep": 1},
    "lolcats/keep 2": {"recipe": "lolcats", "keep": 2},
    "gated_deltanet/keep 0": {"recipe": "gated_deltanet"},
    "gated_deltanet/keep 1": {"recipe": "gated_deltanet", "keep": 1},
    "gated_deltanet/keep 3:1": {"recipe": "gated_deltanet", "keep": "3:1"},
    "kimi_linear/keep 1": {"recipe": "kimi_linear", "keep": 1},
    **{
        f"gated_deltanet/keep layer {l}": {"recipe": "gated_deltanet", "keep": str(l)}
        for l in range(8)
    },
    **{f"lolcats/keep layer {l}": {"recipe": "lolcats", "keep": str(l)} for l in range(8)},
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("model", help="the folder of the pretrained model")
    asked.add_argument("--cell", action="append", help="only these")
    asked.add_argument("--steps", type=int, help="of every stage")
    asked.add_argument("--batch", type=int, help="of every stage")
    asked.add_argument("--length", type=int, help="of every stage")
    asked.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    asked.add_argument("--out", type=Path, default=RESULTS)
    options = asked.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"cells": {}}
    for name in options.cell or ["teacher", *CELLS]:
        if name in results["cells"]:
            continue
        cell = measure(name, options)
        results["cells"][name] = cell
        write_json(options.out, {**results, "made": machine(), "model": Path(options.model).name})
        print(name, json.dumps({k: v for k, v in cell.items() if k not in ("stages", "scores")}),
              flush=True)  # fmt: skip


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "teacher":
        return quality(options.model, options.lengths)
    cell = CELLS[name]
    changes = {k: getattr(options, k) for k in ("steps", "batch", "length") if getattr(options, k)}
    recipe = create_recipe(cell["recipe"], options=cell.get("options", {}), **changes)
    if "only" in cell:
        kind = {"transfer": Transfer, "tune": Tune}[cell["only"]]
        recipe = replace(recipe, stages=tuple(s for s in recipe.stages if isinstance(s, kind)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        start = time.perf_counter()
        subquad.convert(options.model, recipe, "stdlib", out=out, keep=cell.get("keep", ""))
        took = time.perf_counter() - start
        record = json.loads((out / "conversion.json").read_text())
        found = quality(str(out), options.lengths)
    stages = {
        stage: {"tokens": s["tokens"], "first": s["history"][0]["losses"],
                "last": s["history"][-1]["losses"]}
        for stage, s in record["stages"].items()
    }  # fmt: skip
    kept = record.get("kept", record["identity"]["keep"])
    tokens = sum(s["tokens"] for s in stages.values())
    return {"recipe": cell["recipe"], "kept": kept, "tokens": tokens, "seconds": took, **found,
            "scores": record.get("scores"), "stages": stages}  # fmt: skip


def quality(folder: str, lengths: list[int]) -> dict[str, Any]:
    """Perplexity at 1,024 tokens, needles and bytes of the cache at each length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = Host(Study(model=folder, policies=None, samples=SAMPLES, device=device))
    task = create_task("text", tokenizer=host.tokenizer, length=1024)
    losses = []
    for i in range(8):
        batch = task.batch(4, 1_000_000 + i)
        with torch.inference_mode():
            logits = host.model(batch.inputs.to(device), use_cache=False).logits.float().cpu()
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))
    out: dict[str, Any] = {"perplexity": torch.stack(losses).mean().exp().item()}
    out["needles"], out["cache"] = {}, {}
    for T in lengths:
        found = host.needles("full", T, lambda event: None)
        out["needles"][str(T)], out["cache"][str(T)] = found["score"], found["cache"]
    return out


if __name__ == "__main__":
    main()
