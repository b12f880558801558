"""Recall against state size, and against the share of full attention.

``python benchmarks/recall.py`` measures what the BASED and hybrid-analysis papers
predict, on multi-query associative recall, with models small enough for a CPU:

- ``state``: two layers, over mixers and the sizes of their states;
- ``hybrid``: linear mixers with a growing share of softmax layers, on recall and on text.

A mixer with short convolutions of its own makes up all layers; the others come behind one layer of
convolution, without which they cannot look one token back.

Every model is trained with each learning rate and seed; a row is the best learning rate, the mean
over the seeds. Deterministic; stopped at any time, the same command goes on. ``--group``, ``--lr``,
``--seed`` and ``--share I/N`` run a part, so that several processes can share the work; the plain
command then finds all parts done and writes results/recall.json and the table in docs/evidence.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from subquad.bench import units
from subquad.bench.compare import Comparison, compare
from subquad.bench.progress import Display
from subquad.bench.results import Results, machine, write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recall.json"
EVIDENCE = ROOT / "docs" / "evidence.md"

LRS = (5e-3,)
SEEDS = (0,)
BASE = Comparison(
    mixers=("softmax",),
    dim=64,
    depth=2,
    heads=1,
    mlp_dim=64,
    init_std=0.045,
    steps=1200,
    batch=64,
    eval_every=400,
    eval_batches=8,
    lengths=(),
)
RECALL = "mqar[vocab_size=128,length=64,pairs=16]"
# Mixers, each with its state at several sizes.
SIZES = (
    *(f"based[feature_dim={d}]" for d in (4, 8, 16)),
    *(f"softmax[window={w}]" for w in (8, 32)),
    *(f"linear_attention[head_dim={d}]" for d in (8, 32)),
    *(f"retnet[head_dim={d}]" for d in (8, 32)),
    *(f"gla[expand_k={k}]" for k in (0.125, 0.5)),
    *(f"mamba2[state_dim={d}]" for d in (8, 32)),
    *(f"gated_deltanet[head_dim={d}]" for d in (8, 16, 32)),
    "softmax",
)
LINEAR = ("retnet[head_dim=16]", "gated_deltanet[head_dim=16]")
RATIOS = {"none": "{0}*4", "3:1": "{0}*3 softmax", "1:1": "{0} softmax {0} softmax"}


def before(mixer: str) -> str:
    """The first layer: a convolution, or the mixer itself where it has one."""
    return mixer if mixer.startswith(("gated_deltanet", "mamba2")) else "base_conv"


GROUPS = {
    "state": replace(
        BASE,
        mixers=(
            "base_conv alone=base_conv",
            "based[feature_dim=16] alone=based[feature_dim=16]*2",
            *(f"{mixer}={before(mixer)} {mixer}" for mixer in SIZES),
        ),
        tasks=(RECALL,),
    ),
    "hybrid": replace(
        BASE,
        mixers=(
            *(
                f"{linear} {ratio}={before(linear)} {pattern.format(linear)}"
                for linear in LINEAR
                for ratio, pattern in RATIOS.items()
            ),
            "softmax=base_conv softmax*4",
        ),
        tasks=(RECALL, "text[length=128,batch=16,steps=500]"),
        depth=5,
    ),
}


def run(group: str, lr: float, seed: int, asked: argparse.Namespace, console: Console) -> Results:
    """One pass over a group, or a share of it; what is done already is kept."""
    comparison = replace(GROUPS[group], lr=lr, seed=seed, device=asked.device)
    console.print(f"[bold]{group}[/bold], lr {lr:g}, seed {seed}")
    with Display(console) as display:
        out = asked.out / f"{group}-lr{lr:g}-seed{seed}"
        return compare(comparison, out, display, asked.share)


def share(text: str) -> tuple[int, int]:
    """``"2/8"``: the third of eight."""
    first, _, processes = text.partition("/")
    if not 0 <= int(first) < int(processes):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text}")
    return int(first), int(processes)


def best(passes: dict[tuple[float, int], Results], task: str) -> list[dict[str, Any]]:
    """A row an entry: the best learning rate by the mean over the seeds."""
    rows = []
    lrs, seeds = sorted({lr for lr, _ in passes}), sorted({seed for _, seed in passes})
    cells = {key: {c["entry"]: c for c in r.trained(task)} for key, r in passes.items()}
    for entry, cell in cells[lrs[0], seeds[0]].items():
        scores = {lr: mean(cells[lr, seed][entry]["score"] for seed in seeds) for lr in lrs}
        lr = (max if cell["higher_is_better"] else min)(scores, key=lambda lr: scores[lr])
        row = {"entry": entry, "task": task, cell["metric"]: scores[lr], "lr": lr}
        row |= {"scores": scores, "seeds": len(seeds)}
        rows.append(row | {name: cell[name] for name in ("state_bytes", "parameters", "steps")})
    return rows


def tables(found: dict[str, list[dict[str, Any]]], made: dict[str, Any]) -> str:
    """The measured tables as Markdown."""
    recall = [row for row in found["state"] if row["task"] == "mqar"]
    lines = [
        f"`python benchmarks/recall.py` on {made['device']}, torch {made['torch']}: {RECALL}, "
        f"{recall[0]['steps']:,} steps, {units.count(recall[0]['parameters'])} parameters, "
        f"the best of the learning rates {', '.join(f'{lr:g}' for lr in LRS)}, "
        f"{recall[0]['seeds']} seed(s).",
        "",
        "**Recall against state.** Two layers: the mixer behind a convolution, or twice where it "
        "has one:",
        "",
        "| mixer | state | accuracy |",
        "| --- | ---: | ---: |",
    ]
    for row in sorted(recall, key=lambda row: row["state_bytes"]):
        held = units.bytes_(row["state_bytes"])
        lines.append(f"| `{row['entry']}` | {held} | {row['accuracy']:.2f} |")
    by = {(row["entry"], row["task"]): row for row in found["hybrid"]}
    lines += [
        "",
        "**Recall against the share of full attention.** Four layers behind such a first one:",
        "",
        "| linear mixer | linear : softmax | state | recall | text loss |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for entry in dict.fromkeys(row["entry"] for row in found["hybrid"]):
        linear, _, ratio = entry.partition(" ")
        recall_row, text_row = by[entry, "mqar"], by[entry, "text"]
        lines.append(
            f"| {linear} | {ratio or 'all softmax'} | {units.bytes_(recall_row['state_bytes'])} "
            f"| {recall_row['accuracy']:.2f} | {text_row['loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", choices=list(GROUPS))
    parser.add_argument("--lr", type=float, choices=LRS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "recall")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N")
    asked = parser.parse_args()
    console, found = Console(), {}
    for group in GROUPS if asked.group is None else (asked.group,):
        passes = {
            (lr, seed): run(group, lr, seed, asked, console)
            for lr in (LRS if asked.lr is None else (asked.lr,))
            for seed in (SEEDS if asked.seed is None else (asked.seed,))
        }
        if asked.share != (0, 1):
            continue
        tasks = next(iter(passes.values())).tasks
        found[group] = [row for task in tasks for row in best(passes, task)]
    if asked.group is asked.lr is asked.seed is None and asked.share == (0, 1):
        write_json(RESULTS, {"made": machine(), "groups": found})
        text = tables(found, machine())
        write_section(EVIDENCE, "recall", "Recall and state size", text)
        console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
