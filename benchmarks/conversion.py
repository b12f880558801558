"""What conversions of a small pretrained model lose, and what they save.

    python benchmarks/conversion.py MODEL              # all cells (a GPU; minutes)
    python benchmarks/conversion.py MODEL --cell teacher --cell "lolcats, 1k texts" --alone
    python benchmarks/conversion.py MODEL --cell "lolcats, 1k texts" --work runs/conversion
    CUDA_VISIBLE_DEVICES= python benchmarks/conversion.py MODEL --cell ... --threads 2
    python benchmarks/conversion.py MODEL --report --take runs/*/conversion*.json

Every cell converts MODEL on the source of Python's standard library with one recipe and one choice
of kept layers, then measures perplexity on held-out files at 1,024 tokens, needles in a haystack,
and the bytes of the cache. Each is written to --out as it ends, beside what other processes wrote
there meanwhile, and is not measured again unless its definition has changed. With ``--work`` a
conversion that was stopped goes on (its seconds are then not known). ``--alone`` says that nobody
else uses the device. ``--take`` adds the cells of other files, ``--report`` writes the section of
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad.bench import units
from subquad.bench.policies import Host, Study
from subquad.bench.results import machine, write_json, write_section
from subquad.recipes import create_recipe
from subquad.recipes.base import Recipe, Transfer, Tune
from subquad.recipes.conversion import Lines
from subquad.tasks import create_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion.json"
EVIDENCE = ROOT / "docs" / "evidence.md"
FIGURE = ROOT / "docs" / "figures" / "conversion.svg"
SAMPLES = 20

# A layer drawn from random.Random(0) beside the one chosen by score.
RANDOM = str(random.Random(0).randrange(8))
# Texts as long as those of the model's own training: what a map that sees the rotation learns holds
# for no place beyond.
LONG: dict[str, Any] = {"steps": 200, "length": 8192, "batch": 1}
SHORT: dict[str, Any] = {"steps": 200, "length": 1024, "batch": 8}
LORA = {"lr": 2e-3, "warmup": 20}  # the published rate, 1e-4, is one for 7 B parameters
PLAIN = {"map_rotary": False}
WIDE = {**PLAIN, "window": 128}
THRICE = {"lr": 3e-2}  # the maps of layer 0 are seven times nearer after as many tokens
FEW: dict[str, Any] = {  # what two cores do in minutes
    "set": {"steps": 40, "length": 4096, "batch": 1}, "transfer": THRICE,
    "tune": {"steps": 20, "lr": 2e-3, "warmup": 5},
}  # fmt: skip
BEST = "lolcats, maps without rotation"
# The recipe, its kept layers, the stages run where not all, options of the mixer, the dtype, what
# every stage has (set), the transfer and the tuning have instead of the recipe's own.
CELLS: dict[str, dict[str, Any]] = {
    f"{BEST}, best layer kept": {
        "recipe": "lolcats", "keep": 1, "options": PLAIN, "set": LONG, "tune": LORA,
    },
    f"{BEST}, best layer kept, 500 steps": {
        "recipe": "lolcats", "keep": 1, "options": PLAIN, "set": {**LONG, "steps": 500},
        "tune": LORA,
    },
    f"{BEST}, best layer kept, 500 steps, windows of 128, twice the tokens": {
        "recipe": "lolcats", "keep": 1, "options": WIDE,
        "set": {**LONG, "steps": 500, "batch": 2}, "tune": LORA, "dtype": "bfloat16",
    },
    f"{BEST}, best layer kept, 500 steps, thrice the rate": {
        "recipe": "lolcats", "keep": 1, "options": PLAIN, "set": {**LONG, "steps": 500},
        "transfer": THRICE, "tune": LORA,
    },
    f"{BEST}, best layer kept, windows of 128, thrice the rate": {
        "recipe": "lolcats", "keep": 1, "options": WIDE, "set": LONG, "transfer": THRICE,
        "tune": LORA,
    },
    f"{BEST}, best layer kept, windows of 128, thrice the rate, 60 texts of 4,096": {
        "recipe": "lolcats", "keep": 1, "options": WIDE, **FEW,
    },
    f"{BEST}, random layer kept, windows of 128, thrice the rate, 60 texts of 4,096": {
        "recipe": "lolcats", "keep": RANDOM, "options": WIDE, **FEW,
    },
    f"{BEST}, random layer kept, windows of 128, thrice the rate": {
        "recipe": "lolcats", "keep": RANDOM, "options": WIDE, "set": LONG, "transfer": THRICE,
        "tune": LORA,
    },
    f"{BEST}, random layer kept": {
        "recipe": "lolcats", "keep": RANDOM, "options": PLAIN, "set": LONG, "tune": LORA,
    },
    BEST: {"recipe": "lolcats", "options": PLAIN, "set": LONG, "tune": LORA},
    f"{BEST}, windows of 128, thrice the rate, 100 texts of 4,096": {
        "recipe": "lolcats", "options": WIDE, **FEW, "tune": {**FEW["tune"], "steps": 60},
    },
    f"{BEST}, windows of 128, thrice the rate, 40 texts of 4,096, transfer alone": {
        "recipe": "lolcats", "options": WIDE, "only": Transfer, **FEW,
    },
    f"{BEST}, 1k texts, windows of 128, thrice the rate": {
        "recipe": "lolcats", "options": WIDE, "set": SHORT, "transfer": THRICE, "tune": LORA,
    },
    f"{BEST}, 1k texts, windows of 128, thrice the rate, transfer alone": {
        "recipe": "lolcats", "options": WIDE, "only": Transfer, "set": SHORT, "transfer": THRICE,
    },
    "lolcats, best layer kept": {"recipe": "lolcats", "keep": 1, "set": LONG, "tune": LORA},
    "lolcats, best layer kept, 1k texts": {
        "recipe": "lolcats", "keep": 1, "set": SHORT, "tune": LORA,
    },
    "lolcats, 1k texts": {"recipe": "lolcats", "set": SHORT, "tune": LORA},
    "lolcats, 1k texts, transfer alone": {"recipe": "lolcats", "only": Transfer, "set": SHORT},
    "lolcats, 1k texts, no transfer": {
        "recipe": "lolcats", "only": Tune, "set": SHORT, "tune": LORA,
    },
    "hedgehog": {"recipe": "hedgehog", "set": {"steps": 200}},
    "hedgehog, elu + 1": {
        "recipe": "hedgehog", "options": {"feature_map": "elu"}, "set": {"steps": 200},
    },
    "hedgehog, relu": {
        "recipe": "hedgehog", "options": {"feature_map": "relu"}, "set": {"steps": 200},
    },
    "gated_deltanet, best layer kept": {"recipe": "gated_deltanet", "keep": 1, "set": LONG},
    "gated_deltanet, random layer kept": {"recipe": "gated_deltanet", "keep": RANDOM, "set": LONG},
    "gated_deltanet, 1k texts": {"recipe": "gated_deltanet", "set": SHORT},
    "kimi_linear, best layer kept": {"recipe": "kimi_linear", "keep": 1, "set": LONG},
    "lawcat, best layer kept": {"recipe": "lawcat", "keep": 1, "set": LONG, "tune": LORA},
    "still, best layer kept": {"recipe": "still", "keep": 1, "set": LONG, "tune": LORA},
    "sala, two layers kept": {"recipe": "sala", "keep": 2, "set": {"steps": 150}},
}  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("model", help="the folder of the pretrained model")
    asked.add_argument("--cell", action="append", choices=["teacher", *CELLS], help="only these")
    asked.add_argument("--steps", type=int, help="of every stage")
    asked.add_argument("--batch", type=int, help="of every stage")
    asked.add_argument("--length", type=int, help="of every stage")
    asked.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    asked.add_argument("--samples", type=int, default=SAMPLES, help="prompts of a length")
    asked.add_argument("--threads", type=int, help="of the CPU; as PyTorch chooses if not given")
    asked.add_argument("--alone", action="store_true", help="nobody else uses the device")
    asked.add_argument("--work", type=Path, help="where conversions are kept; nowhere if not given")
    asked.add_argument("--out", type=Path, default=RESULTS)
    asked.add_argument("--take", type=Path, nargs="+", default=[], help="add these files' cells")
    asked.add_argument("--report", action="store_true", help="write the evidence from --out, stop")
    options = asked.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of the tokenizer
    for path in options.take:
        for name, cell in read(path)["cells"].items():
            keep(options, name, cell)
    if options.report:
        report(read(options.out))
        return
    for name in options.cell or ([] if options.take else ["teacher", *CELLS]):
        spec = specification(name, options)
        done = read(options.out)["cells"].get(name)
        if done and done.get("spec", spec) == spec:
            continue
        cell = {"spec": spec, "device": machine()["device"], **measure(name, options)}
        keep(options, name, cell)
        shown = {k: v for k, v in cell.items() if k not in ("spec", "stages", "scores")}
        print(name, json.dumps(shown), flush=True)


def read(path: Path) -> dict[str, Any]:
    """Results; each cell says on which device it was measured."""
    if not path.is_file():
        return {"cells": {}}
    results = json.loads(path.read_text())
    for cell in results["cells"].values():
        if "device" not in cell:
            cell["device"] = results["made"]["device"]
    return results


def keep(options: argparse.Namespace, name: str, cell: dict[str, Any]) -> None:
    """Put a cell among those of --out, where other processes may write theirs."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out.with_name(f".{options.out.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(options.out)
        results["cells"][name] = cell
        write_json(options.out, {**results, "made": machine(), "model": Path(options.model).name})


def specification(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that a cell's figures depend on but the machine, as plain data."""
    asked = {k: getattr(options, k) for k in ("lengths", "samples")}
    if name != "teacher":
        cell = CELLS[name]
        asked["recipe"] = made(cell, options).identity()
        asked |= {k: cell.get(k, d) for k, d in (("keep", ""), ("dtype", "float32"))}
    found: dict[str, Any] = json.loads(json.dumps(asked))
    return found


def made(cell: dict[str, Any], options: argparse.Namespace) -> Recipe:
    """The recipe of a cell."""
    asked = {k: getattr(options, k) for k in ("steps", "batch", "length") if getattr(options, k)}
    own = {k: {**cell[k], **asked} for k in ("transfer", "tune") if k in cell}
    recipe = create_recipe(
        cell["recipe"], options=cell.get("options", {}), **own, **{**cell.get("set", {}), **asked}
    )
    stages = [s for s in recipe.stages if isinstance(s, cell.get("only", object))]
    if cell.get("only") is Tune:  # without a transfer, maps and factors learn beside the adapters
        stages = [replace(s, train=("feature_map", "window_factors")) for s in stages]
    return replace(recipe, stages=tuple(stages))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "teacher":
        return quality(options.model, options)
    if options.work is not None:
        return converted(CELLS[name], options, options.work / re.sub(r"\W+", "-", name))
    with tempfile.TemporaryDirectory() as folder:
        return converted(CELLS[name], options, Path(folder) / "model")


def converted(cell: dict[str, Any], options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One conversion, begun or gone on with in ``out``, and what came of it."""
    times = out.with_name(f"{out.name}.json")
    begun, clock, start = out.exists(), Clock(), time.perf_counter()
    given = {"keep": cell.get("keep", ""), "dtype": cell.get("dtype", "float32")}
    subquad.convert(
        options.model, made(cell, options), "stdlib", out=out, resume=True, progress=clock, **given
    )
    took = {"seconds": time.perf_counter() - start, "parts": clock.parts, "alone": options.alone}
    if not begun:
        write_json(times, took)
    elif times.is_file():
        took = json.loads(times.read_text())
    else:
        took = {"seconds": None}
    record = json.loads((out / "conversion.json").read_text())
    stages = {
        stage: {"tokens": s["tokens"], "first": s["history"][0]["losses"],
                "last": s["history"][-1]["losses"]}
        for stage, s in record["stages"].items()
    }  # fmt: skip
    kept = record.get("kept", record["identity"]["keep"])
    tokens = sum(s["tokens"] for s in stages.values())
    # Other machines have other versions of the texts, so the teacher reads them here too.
    return {"recipe": cell["recipe"], "kept": kept, "tokens": tokens, **took, "stages": stages,
            "scores": record.get("scores"), "teacher": perplexity(host(options.model, options)),
            **quality(str(out), options)}  # fmt: skip


class Clock(Lines):
    """Lines of progress, and the seconds of each stage from its announcement to its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        super().__call__(event)
        if "cell" in event:
            self._stage, self._since = event["cell"], time.perf_counter()
        self.parts[self._stage] = time.perf_counter() - self._since


def quality(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity at 1,024 tokens, needles and bytes of the cache at each length."""
    model = host(folder, options)
    out: dict[str, Any] = {"perplexity": perplexity(model), "needles": {}, "cache": {}}
    for T in options.lengths:
        found = model.needles("full", T, lambda event: None)
        out["needles"][str(T)], out["cache"][str(T)] = found["score"], found["cache"]
    return out


def host(folder: str, options: argparse.Namespace) -> Host:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Host(Study(model=folder, policies=None, samples=options.samples, device=device))


def perplexity(host: Host) -> float:
    task = create_task("text", tokenizer=host.tokenizer, length=1024)
    losses = []
    for i in range(8):
        batch = task.batch(4, 1_000_000 + i)
        with torch.inference_mode():
            logits = host.model(batch.inputs.to(host.model.device), use_cache=False).logits
        losses.append(F.cross_entropy(logits.float().cpu().flatten(0, 1), batch.labels.flatten()))
    return torch.stack(losses).mean().exp().item()


def report(results: dict[str, Any]) -> None:
    """The table and the figure of docs/evidence.md."""
    found = results["cells"]
    cells = {name: found[name] for name in ["teacher", *CELLS] if name in found}
    teacher = cells["teacher"]["perplexity"]
    for cell in cells.values():
        cell["above"] = cell["perplexity"] / cell.get("teacher", teacher) - 1
    ((device, _),) = Counter(cell["device"] for cell in cells.values()).most_common(1)
    lengths = list(cells["teacher"]["needles"])
    whole = cells["teacher"]["cache"]["8192"]
    head = [f"needles {int(T):,}" for T in lengths]
    lines = [
        f"`python benchmarks/conversion.py MODEL`, `{results['model']}` (8 layers) on {device}. "
        "Perplexity at 1,024 tokens of held-out files, and how far it is above the teacher's on "
        f"the same; needles of {SAMPLES} prompts a length, one of 4 facts asked; the cache behind "
        "8,192 tokens. Texts of 8,192 tokens and 200 steps a stage where the name does not say "
        "otherwise (Hedgehog: of 256, then 1,024). Layers kept are chosen by the recipe's score, "
        "but in the rows with a random one. Seconds are those of the whole conversion, loading and "
        "scoring too, with other processes on the same device; "
        "those with a star are of one that no other process used.",
        "",
        f"| recipe | layers kept | tokens | perplexity | above | {' | '.join(head)} | cache | "
        "of it | s |",
        "| --- | --- |" + " ---: |" * (len(lengths) + 6),
    ]
    for name, cell in cells.items():
        kept = "all" if name == "teacher" else ", ".join(map(str, cell["kept"])) or "none"
        needles = " | ".join(f"{cell['needles'][T]:.2f}" for T in lengths)
        tokens = f"{cell['tokens'] / 1e6:.1f} M" if "tokens" in cell else ""
        held = cell["cache"]["8192"]
        seconds = f"{cell['seconds']:.0f}{'*' * cell['alone']}" if cell.get("seconds") else ""
        where = "" if cell["device"] == device else f" ({cell['device']})"
        lines.append(
            f"| {name}{where} | {kept} | {tokens} | {cell['perplexity']:.3f} | "
            f"{cell['above']:.1%} | {needles} | "
            f"{units.bytes_(held)} | {held / whole:.1%} | {seconds} |"
        )
    figure(cells, FIGURE)
    lines += ["", f"![Perplexity and needles against the cache](figures/{FIGURE.name})"]
    scores = next((c["scores"] for c in cells.values() if c.get("scores")), None)
    if scores:
        values = ", ".join(f"{l}: {found['recall']:.3g}" for l, found in scores.items())
        lines += ["", f"Scores of the layers for `lolcats` (KL on repeated text): {values}."]
    write_section(EVIDENCE, "conversion", "Conversion of a pretrained model", "\n".join(lines))
    print("\n".join(lines))


def figure(cells: dict[str, Any], path: Path) -> None:
    """Perplexity, and needles at 4,096 tokens, against the bytes of the cache at 8,192."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same figure is the same file
    from matplotlib import pyplot as plt

    shown, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True)
    recipes = list(dict.fromkeys(cell.get("recipe", "teacher") for cell in cells.values()))
    titles = ("perplexity over the teacher's, 1,024 tokens", "needles, 4,096 tokens")
    for axis, title in zip(axes, titles):
        for i, recipe in enumerate(recipes):
            own = [c for c in cells.values() if c.get("recipe", "teacher") == recipe]
            y = [1 + c["above"] if axis is axes[0] else c["needles"]["4096"] for c in own]
            x = [c["cache"]["8192"] / 2**20 for c in own]
            axis.scatter(
                x, y, label=recipe, color=f"C{i}", marker="osD^vP*X"[i % 8], s=50, alpha=0.8
            )
        axis.set(xscale="log", xlabel="cache behind 8,192 tokens, MiB", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    shown.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    plt.close(shown)


if __name__ == "__main__":
    main()
