"""Attention on images over the resolution: accuracy on real digits, and time, beside softmax.

``python benchmarks/vision.py --part accuracy`` trains one small model for every mixer and
resolution on scikit-learn's digits; ``--part transfer`` has some read larger images than they
learned from; ``--part time`` times models of four blocks; ``--part reading`` fits single heads to
softmax at every sharpness (one CPU thread, a minute each); ``--part page`` draws the figure and
writes the tables of docs/evidence.md. Every cell keeps a file of its own in ``--out``, and what is
there or in results/vision.json is not measured again; ``--cell NAME`` measures one alone
(``--list`` names those that are missing), so that cells can run apart. ``--part page`` takes the
new ones into results/vision.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.results import Cells, write_json, write_section
from subquad.models.vision import VisionModel, create_vision_model
from subquad.ops.attention import attention
from subquad.ops.kernel_attention import bidirectional
from subquad.tasks import create_task
from subquad.train import TrainConfig, evaluate, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vision.json"
EVIDENCE = ROOT / "docs" / "evidence.md"
FIGURE = ROOT / "docs" / "figures" / "vision.svg"

SIDES = (14, 28, 42, 64)  # tokens a side
TIMED = (14, 28, 42, 56, 64, 96, 128)
PATCH = 2
BATCH = 2**18  # tokens of a timed batch on a GPU
ENTRIES: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "softmax, gated": {"mixer": "mala", "attention": "softmax"},
    "neighborhood": {"mixer": "neighborhood", "window": [7, 7]},
    "linear_attention": {"mixer": "linear_attention", "feature_map": "elu"},
    "mala": {"mixer": "mala"},
    "rala": {"mixer": "rala"},
    "inline": {"mixer": "inline"},
    "soft++": {"mixer": "soft"},
}
BASELINE = "softmax"
Row = dict[str, Any]
Made = Iterator[tuple[str, Callable[[], Row]]]


def build(entry: str, side: int, device: str, **config: Any) -> VisionModel:
    """SOFT keeps 49 landmarks or a little more, whatever the resolution, as its authors do."""
    mixer = dict(ENTRIES[entry])
    if mixer["mixer"] == "soft":
        mixer["ratio"] = max(2, side // 7)
    torch.manual_seed(0)
    return create_vision_model("micro", mixer=mixer, patch=PATCH, **config).to(device)


def accuracies(device: str, path: str | None, steps: int) -> Made:
    for side in reversed(SIDES):  # the long ones first, should time run out
        for entry in ENTRIES:
            yield f"{entry} | {side}", partial(accuracy, entry, side, device, path, steps)


def accuracy(entry: str, side: int, device: str, path: str | None, steps: int) -> Row:
    task = create_task("images", size=PATCH * side, path=path)
    config = TrainConfig(steps=steps, batch=60, lr=2e-3, warmup=20, eval_batches=6)
    model = build(entry, side, device, dims=[64], heads=[4], depths=[3], init_std=0.08)
    start = time.perf_counter()
    found = train(model, task, config, progress=lambda _: None)
    return {
        "accuracy": found.evals[-1]["accuracy"],
        "loss": found.evals[-1]["loss"],
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


TRANSFERRED: dict[str, dict[str, Any]] = {
    "soft": {"mixer": "soft", "variant": "soft", "ratio": 4},
    "soft++": {"mixer": "soft", "ratio": 4},
    "softmax": {"mixer": "softmax"},
    "mala": {"mixer": "mala"},
}
LARGER = (28, 42, 56, 84)  # tokens a side; trained at the first


def transfers(device: str, path: str | None, steps: int) -> Made:
    for entry, mixer in TRANSFERRED.items():
        yield entry, partial(transfer, mixer, device, path, steps)


def transfer(mixer: dict[str, Any], device: str, path: str | None, steps: int) -> Row:
    """Accuracy at larger resolutions of a model trained at the first; SOFT's ratio stays, so its
    landmarks grow from 49 to 441."""
    config = TrainConfig(steps=steps, batch=60, lr=2e-3, warmup=20, eval_batches=6)
    sizes = {"patch": PATCH, "dims": [64], "heads": [4], "depths": [3], "init_std": 0.08}
    torch.manual_seed(0)
    model = create_vision_model("micro", mixer=mixer, **sizes).to(device)
    tasks = {s: create_task("images", size=PATCH * s, path=path) for s in LARGER}
    train(model, tasks[LARGER[0]], config, progress=lambda _: None)
    return {str(s): evaluate(model, task, config)["accuracy"] for s, task in tasks.items()}


def times(device: str) -> Made:
    for side in TIMED if device == "cuda" else TIMED[:5]:
        for entry in ENTRIES:
            yield f"{entry} | {side}", partial(timing, entry, side, device)


def timing(entry: str, side: int, device: str) -> Row:
    """Milliseconds an image of a forward pass, and of a training step: on a GPU in bfloat16, the
    median of seven batches after two that do not count, all of as many tokens, so that launching
    kernels is not what is timed; on a CPU the best of three images after one."""
    model = build(entry, side, device, dims=[192], heads=[6], depths=[4], mlp_ratio=4.0)
    batch = BATCH // side**2 if device == "cuda" else 1
    x = torch.randn(batch, 1, PATCH * side, PATCH * side, device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def forward() -> None:
        with half, torch.inference_mode():
            model(x)

    def step() -> None:
        with half:
            loss = model(x).logits.float().square().mean()
        loss.backward()
        model.zero_grad()

    runs = (("forward", forward), ("training", step))
    return {name: 1000 * seconds(run, device) / len(x) for name, run in runs}


class Reader(nn.Module):
    """One head with learned q, k, v and o maps; queries are given beside the keys and values."""

    def __init__(self, normalizer: str | None, phi: Callable[[Tensor], Tensor], K: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(K, K) for _ in range(4)])
        self.normalizer, self.phi = normalizer, phi

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (m(t)[:, :, None] for m, t in zip(self.maps, (q, k, v), strict=False))
        if self.normalizer is None:
            o = attention(q, k, v)
        else:
            o = bidirectional(self.phi(q), self.phi(k), v, self.normalizer)
        return self.maps[3](o[:, :, 0])


READERS: dict[str, tuple[str | None, Callable[[Tensor], Tensor]]] = {
    "softmax": (None, nn.Identity()),
    "inline, identity": ("subtract", nn.Identity()),
    "mala": ("magnitude", lambda t: F.elu(t) + 1),
    "inline, relu": ("subtract", F.relu),
    "linear attention, relu": ("divide", F.relu),
    "linear attention, elu + 1": ("divide", lambda t: F.elu(t) + 1),
}


def readings() -> Made:
    for entry, (normalizer, phi) in READERS.items():
        yield entry, partial(reading, normalizer, phi)


def reading(normalizer: str | None, phi: Callable[[Tensor], Tensor], K: int = 16) -> Row:
    """Relative squared error on softmax at every sharpness, after 1,500 steps of Adam."""
    torch.manual_seed(0)
    model = Reader(normalizer, phi, K)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    last = []
    for step in range(1500):
        q, k, v = (torch.randn(32, n, K) for n in (16, 48, 48))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q = q * torch.empty(32, 16, 1).uniform_(math.log(0.37), math.log(20)).exp()
        want = (q @ k.mT).softmax(-1) @ v
        error = (model(q, k, v) - want).square().mean() / want.square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.5 + 0.5 * math.cos(math.pi * step / 1500))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step >= 1400:
            last.append(error.item())
    return {"error": sum(last) / len(last)}


def seconds(run: Callable[[], None], device: str) -> float:
    cuda, found = device == "cuda", []
    unseen, seen = (2, 7) if cuda else (1, 3)
    for i in range(unseen + seen):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        if i >= unseen:
            found.append(time.perf_counter() - start)
    # Others share a CPU, and only ever add to a time.
    return median(found) if cuda else min(found)


def complete(rows: dict[str, Row], sides: tuple[int, ...]) -> tuple[int, ...]:
    """The sides that every entry was measured at."""
    return tuple(s for s in sides if all(f"{entry} | {s}" in rows for entry in ENTRIES))


def crossing(rows: dict[str, Row], entry: str, what: str) -> float | None:
    """Tokens from which ``entry`` stays faster than softmax, between two measured resolutions by a
    straight line in logarithms; None where it is not faster at the end, 0 where it always is."""
    sides = complete(rows, TIMED)
    gap = [math.log(rows[f"{entry} | {s}"][what] / rows[f"{BASELINE} | {s}"][what]) for s in sides]
    if gap[-1] >= 0:
        return None
    last = max((i for i, g in enumerate(gap) if g >= 0), default=-1)
    if last < 0:
        return 0.0
    part = gap[last] / (gap[last] - gap[last + 1])
    a, b = (math.log(sides[i] ** 2) for i in (last, last + 1))
    return math.exp(a + part * (b - a))


def table(rows: dict[str, Row], what: str, sides: tuple[int, ...], form: str) -> list[str]:
    head = " | ".join(f"{s}x{s}" for s in sides)
    lines = [f"| | {head} |", "| --- |" + " ---: |" * len(sides)]
    for entry in ENTRIES:
        cells = [rows[f"{entry} | {s}"][what] for s in sides if f"{entry} | {s}" in rows]
        lines.append(f"| {entry} | " + " | ".join(format(c, form) for c in cells) + " |")
    return [*lines, ""]


def page(found: dict[str, Any]) -> None:
    parts = (
        ("accuracy", accuracy_words),
        ("time", time_words),
        ("transfer", transfer_words),
        ("reading", reading_words),
    )
    lines: list[str] = []
    for part, words in parts:
        if found[part]:
            made = found["made"][part]
            lines += [
                f"`python benchmarks/vision.py --part {part}` on {made['device']}, "
                f"torch {made['torch']}, {made['date']}.",
                "",
                *words(found[part]),
            ]
    if found["accuracy"] and found["time"]:
        draw(found)
        words = "Time beside softmax with the crossings, and accuracy, over the tokens"
        lines += [f"![{words}](figures/vision.svg)", ""]
    write_section(EVIDENCE, "vision", "Vision mixers over the resolution", "\n".join(lines))


def accuracy_words(rows: dict[str, Row]) -> list[str]:
    return [
        f"Accuracy on 360 held-out handwritten digits after {next(iter(rows.values()))['steps']} "
        "steps of 60 images, three blocks of width 64, patch 2, equal steps and rates, one seed "
        "(a digit is 0.3%); columns are the tokens of an image. A digit has 8x8 pixels however "
        "large it is drawn: this is how well each learns in equal steps, not what detail brings.",
        "",
        *table(rows, "accuracy", complete(rows, SIDES), ".3f"),
    ]


def time_words(rows: dict[str, Row]) -> list[str]:
    lines = [
        "Milliseconds an image of a forward pass, four blocks of width 192, six heads (on a GPU in "
        f"bfloat16, batches of {BATCH:,} tokens; on a CPU in float32, the best of three single "
        "images, while others used the CPU too):",
        "",
        *table(rows, "forward", complete(rows, TIMED), ".3g"),
        "and of a training step:",
        "",
        *table(rows, "training", complete(rows, TIMED), ".3g"),
        "Tokens from which each is faster than softmax (PyTorch's fused kernel), by a line between "
        "two measured resolutions:",
        "",
        "| | forward | training |",
        "| --- | ---: | ---: |",
    ]
    for entry in ENTRIES:
        if entry != BASELINE:
            cells = [crossing(rows, entry, what) for what in ("forward", "training")]
            words = ["never here" if c is None else f"{c:,.0f}" if c else "always" for c in cells]
            lines.append(f"| {entry} | {words[0]} | {words[1]} |")
    return [*lines, ""]


def transfer_words(rows: dict[str, Row]) -> list[str]:
    head = " | ".join(f"{s}x{s}" for s in LARGER)
    lines = [
        "Accuracy at larger resolutions of models trained at the first, with nothing tuned; SOFT's "
        "landmarks grow with the image, from 49 to 441:",
        "",
        f"| | {head} |",
        "| --- |" + " ---: |" * len(LARGER),
    ]
    for entry in (entry for entry in TRANSFERRED if entry in rows):
        row = rows[entry]
        name = f"{entry} ({row['on']})" if "on" in row else entry
        lines.append(f"| {name} | " + " | ".join(f"{row[str(s)]:.3f}" for s in LARGER) + " |")
    missing = [entry for entry in TRANSFERRED if entry not in rows]
    return [*lines, "", *([f"Not measured: {', '.join(missing)}.", ""] if missing else [])]


def reading_words(rows: dict[str, Row]) -> list[str]:
    return [
        "One head with learned maps learns what softmax reads at every sharpness: 48 unit keys of "
        "16 features, queries of length 0.37 to 20. Relative squared error after 1,500 steps, one "
        "seed. Heads that hear the length of a query do better than those that divide; none of "
        "linear cost comes near softmax:",
        "",
        "| | error |",
        "| --- | ---: |",
        *(f"| {entry} | {row['error']:.3f} |" for entry, row in rows.items()),
        "",
    ]


def draw(found: dict[str, Any]) -> None:
    """Time over that of softmax, with the crossings marked, and accuracy, over the tokens."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "vision", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    for axis, what in zip(axes, ("forward", "training", "accuracy"), strict=False):
        rows = found["accuracy" if what == "accuracy" else "time"]
        sides = complete(rows, SIDES if what == "accuracy" else TIMED)
        for i, entry in enumerate(ENTRIES):
            tokens = [s * s for s in sides]
            values = [rows[f"{entry} | {s}"][what] for s in sides]
            if what != "accuracy":
                base = [rows[f"{BASELINE} | {s}"][what] for s in sides]
                values = [value / one for value, one in zip(values, base, strict=True)]
            style = {"color": f"C{i}", "marker": ".", "lw": 2.5 if entry == BASELINE else 1.2}
            axis.plot(tokens, values, label=entry, **style)
            at = None if what == "accuracy" else crossing(rows, entry, what)
            if at and entry != BASELINE:
                axis.plot([at], [1], color=f"C{i}", marker="o", ms=8, mfc="none")
        axis.set(xscale="log", xlabel="tokens", title=what)
        marked = [s for s in sides if s != 56]  # too near 64 for a label
        axis.set_xticks([s * s for s in marked], [f"{s}²" for s in marked], minor=False)
        axis.set_xticks([], minor=True)
        if what != "accuracy":
            axis.set(yscale="log", ylabel="time, softmax = 1")
            ticks = [0.5, 1, 2, 3]
            axis.set_yticks(ticks, [str(t) for t in ticks], minor=False)
            axis.set_yticks([], minor=True)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def gather(found: dict[str, Any], kept: Cells) -> None:
    """Take new cells into the results; a row of another machine than its table's says so."""
    for part, make in PARTS.items():
        for name, _ in make("cuda", None, 0):
            if name in found[part] or f"{part}-{name}" not in kept:
                continue
            row = kept[f"{part}-{name}"]
            made = row.pop("made")
            table = found["made"].setdefault(part, made)
            if made["device"] != table["device"]:
                row["on"] = f"{made['device']}, torch {made['torch']}"
            found[part][name] = row


PARTS: dict[str, Callable[[str, str | None, int], Made]] = {
    "accuracy": accuracies,
    "transfer": transfers,
    "time": lambda device, path, steps: times(device),
    "reading": lambda device, path, steps: readings(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=(*PARTS, "page"), default="page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--path", help="of the images; scikit-learn's digits where left out")
    parser.add_argument("--cell", help="the only one to measure")
    parser.add_argument("--list", action="store_true", help="print the missing cells' names")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "vision")
    asked = parser.parse_args()
    found: dict[str, Any] = {"made": {}, **{part: {} for part in PARTS}}
    if RESULTS.exists():
        found |= json.loads(RESULTS.read_text())
    kept = Cells(asked.out)
    if asked.part == "page":
        gather(found, kept)
        write_json(RESULTS, found)
        return page(found)
    cells = dict(PARTS[asked.part](asked.device, asked.path, asked.steps))
    if asked.cell is not None and asked.cell not in cells:
        parser.error(f"--cell must be one of {', '.join(cells)}, got {asked.cell}")
    for name in [asked.cell] if asked.cell else cells:
        if name not in found[asked.part] and f"{asked.part}-{name}" not in kept:
            if asked.list:
                print(name)
            else:
                kept.keep(f"{asked.part}-{name}", cells[name]())
    return None


if __name__ == "__main__":
    main()
