"""What the neural memory of Titans is good for, beside models of equal size.

``python benchmarks/claims_memory.py --data ETTh1.csv`` runs two claims:

- ``needle``: models trained on needles in 128 tokens read up to 2,048;
- ``forecast``: the next 96 hours of the seven series of ETTh1 (the file is the user's; without
  ``--data`` this claim is left out), beside a linear map.

Every cell (a model and a seed) is kept in ``--out`` when it is done; ``--claim``, ``--entry`` and
``--seed`` choose some of them, so that several processes can share the work. ``--table`` takes what
is there into results/claims_memory.json, an entry at a time, and writes the tables in
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.match import build, matched, parameters
from subquad.bench.results import Cells, table, write_json, write_section
from subquad.mixers.base import create_mixer
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.tasks import create_task
from subquad.train import TrainConfig, evaluate, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_memory.json"
EVIDENCE = ROOT / "docs" / "evidence.md"

Row = dict[str, Any]

SEEDS = (0, 1)
TRAINED, READ = 128, (128, 256, 512, 1024, 2048)
STEPS = 800
# One short convolution, then one layer of each kind.
TITANS = {
    "titans, LMM": "",
    "titans, LMM, steps of 0.003": ",lr_max=0.003",
    "titans, LMM, no forgetting": ",forget=false",
    "titans, MAG (window 32)": ",variant=mag,window=32",
    "titans, MAC (segments of 32)": ",variant=mac,segment=32",
    "titans, MAL (window 32)": ",variant=mal,window=32",
}
SLOW = "gain_lr 0.031"  # 1/d: steadier
NEEDLE = {
    "softmax": "base_conv softmax[heads=2]",
    "gated_deltanet": "base_conv gated_deltanet[heads=2,head_dim=32]",
    "titans, LMM, one matrix": "base_conv titans[heads=2,chunk=16,depth=1]",
    **{n: f"base_conv titans[heads=2,chunk=16{more}]" for n, more in TITANS.items()},
    **{
        f"{n}, {SLOW}": f"base_conv titans[heads=2,chunk=16{TITANS[n]},gain_lr=0.03125]"
        for n in ("titans, LMM", "titans, LMM, no forgetting", "titans, MAL (window 32)")
    },
}


def needle(entry: str, seed: int, device: str) -> Row:
    """Accuracy at lengths beyond the training's: one needle."""
    task = create_task("niah", kind="single", vocab_size=66, length=TRAINED)
    sizes = {"dim": 64, "depth": 2, "init_std": 0.045, "vocab_size": task.vocab_size}
    config = matched(NEEDLE.items(), mlp_dim=64, tie_embeddings=True, **sizes)[entry]
    lm = build(config, seed, device)
    how = TrainConfig(
        steps=STEPS, batch=64, lr=2e-3, warmup=100, seed=seed, eval_batches=8, dtype="float32"
    )
    train(lm, task, how, progress=lambda _: None)
    found: Row = {"parameters": parameters(config), "state (bytes)": lm.state_bytes(READ[-1])}
    for T in READ:
        found[f"{T:,}"] = evaluate(lm, replace(task, length=T), how)[task.metric]
    return found


CONTEXT, HORIZON, PATCH = 336, 96, 8
MEMORY: dict[str, Any] = {"mixer": "titans", "heads": 2, "chunk": 8}
MAG: dict[str, Any] = {**MEMORY, "variant": "mag", "window": 16}
FORECAST: dict[str, dict[str, Any] | None] = {
    "linear": None,
    "softmax": {"mixer": "softmax", "heads": 2},
    "gated_deltanet": {"mixer": "gated_deltanet", "heads": 2, "head_dim": 32},
    "titans, LMM": MEMORY,
    "titans, MAG": MAG,
}


class Linear(nn.Module):
    """One map of the window to the horizon, for every series, from the last value on."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(CONTEXT, HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x - x[:, -1:]) + x[:, -1:]


class Patches(nn.Module):
    """Patches of the window, normed by its mean and deviation, through a mixer and an MLP."""

    def __init__(self, mixer: str, **options: Any) -> None:
        super().__init__()
        C = 64
        self.embed, self.norm = nn.Linear(PATCH, C), GatedRMSNorm(C)
        self.mixer = create_mixer(mixer, dim=C, **options)
        self.mlp = nn.Sequential(GatedRMSNorm(C), nn.Linear(C, 128), nn.GELU(), nn.Linear(128, C))
        self.out = nn.Sequential(GatedRMSNorm(C), nn.Dropout(0.2), nn.Linear(C, HORIZON))

    def forward(self, x: Tensor) -> Tensor:
        middle, width = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        h = self.embed(((x - middle) / width).unflatten(1, (-1, PATCH)))
        h = h + self.mixer(self.norm(h))[0]
        h = h + self.mlp(h)
        return self.out(h[:, -1]) * width + middle


def series(path: Path, device: str) -> dict[str, Tensor]:
    """The months of training (12), validation (4) and test (4), ``[hours,7]``, standardised by the
    first; validation and test start a window early."""
    table = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8))
    month = 30 * 24
    first = table[: 12 * month]
    scaled = torch.from_numpy((table - first.mean(0)) / first.std(0)).float().to(device)
    ends = {"train": (0, 12), "valid": (12, 16), "test": (16, 20)}
    return {name: scaled[max(a * month - CONTEXT, 0) : b * month] for name, (a, b) in ends.items()}


def windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """``[n,context]`` and ``[n,horizon]``, every series for itself."""
    steps = torch.arange(CONTEXT + HORIZON, device=data.device)
    found = data[starts[:, None] + steps].transpose(1, 2).flatten(0, 1)
    return found[:, :CONTEXT], found[:, CONTEXT:]


@torch.no_grad()
def errors(model: nn.Module, data: Tensor, every: int = 1) -> tuple[float, float]:
    """Mean squared and absolute error over all windows, or every so many."""
    model.eval()
    starts = torch.arange(0, len(data) - CONTEXT - HORIZON + 1, every, device=data.device)
    squares, sizes, n = 0.0, 0.0, 0
    for part in starts.split(256):
        x, y = windows(data, part)
        off = model(x) - y
        squares, sizes = squares + float(off.square().sum()), sizes + float(off.abs().sum())
        n += off.numel()
    model.train()
    return squares / n, sizes / n


def forecast(entry: str, seed: int, device: str, path: Path) -> Row:
    """Test errors of the weights that are best on the validation months."""
    data, options = series(path, device), FORECAST[entry]
    torch.manual_seed(seed)
    model = (Linear() if options is None else Patches(**options)).to(device)
    steps = 1500
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    last = len(data["train"]) - CONTEXT - HORIZON + 1
    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        x, y = windows(data["train"], torch.randint(last, (32,), device=device))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            found = errors(model, data["valid"], every=8)[0]
            if found < best:
                best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    square, size = errors(model, data["test"])
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "valid MSE": best, "test MSE": square, "test MAE": size}


MEASURED: dict[str, Callable[..., Row]] = {"needle": needle, "forecast": forecast}
ENTRIES = {"needle": NEEDLE, "forecast": FORECAST}
TITLES = {
    "needle": "**Needles beyond the training length.** A key and its value in noise; trained on "
    f"{TRAINED} tokens ({STEPS:,} steps), accuracy at other lengths. A short convolution, then one "
    "layer:",
    "forecast": f"**ETTh1.** {CONTEXT} hours in, the next {HORIZON} out; errors of the "
    "standardised series:",
}


def write_evidence(claims: dict[str, dict[str, Row]], made: Row) -> None:
    lines = [
        f"`python benchmarks/claims_memory.py --data ETTh1.csv` on {made['device']}, torch "
        f"{made['torch']}; means over the seeds.",
        "",
    ]
    for claim, title in TITLES.items():
        rows = claims.get(claim, {})
        lines += [
            title,
            "",
            *table({entry: rows[entry] for entry in ENTRIES[claim] if entry in rows}),
        ]
        missing = [entry for entry in ENTRIES[claim] if entry not in rows]
        lines += [f"Not measured: {'; '.join(missing)}.", ""] if missing else []
    write_section(EVIDENCE, "claims_memory", "Claims of the neural memory", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="ETTh1.csv")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims_memory")
    parser.add_argument("--claim", choices=list(ENTRIES), nargs="*", default=list(ENTRIES))
    parser.add_argument("--entry", help="the only one to measure")
    parser.add_argument("--seed", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only of the cells that are there")
    asked = parser.parse_args()
    kept = Cells(asked.out)
    if asked.table:
        return tables(kept)
    if asked.data is None and "forecast" in asked.claim:
        asked.claim.remove("forecast")
    chosen = [(c, e) for c in asked.claim for e in ENTRIES[c] if asked.entry in (None, e)]
    if not chosen:
        parser.error(f"--entry must be one of {', '.join(NEEDLE | FORECAST)}, got {asked.entry}")
    for (claim, entry), seed in product(chosen, asked.seed):
        name = f"{claim}-{entry}-{seed}"
        if name not in kept:
            more = (asked.data,) if claim == "forecast" else ()
            kept.keep(name, MEASURED[claim](entry, seed, asked.device, *more))
    return None


def tables(kept: Cells) -> None:
    """Means over the seeds; an entry takes the place of an older one of as few seeds or fewer."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "claims": {}}
    for claim, entries in ENTRIES.items():
        for entry in entries:
            rows = [kept[n] for s in SEEDS if (n := f"{claim}-{entry}-{s}") in kept]
            before = found["claims"].setdefault(claim, {}).get(entry, {"seeds": 0})
            if not rows or len(rows) < before["seeds"]:
                continue
            made = [row.pop("made") for row in rows][-1]
            row = {"seeds": len(rows), **{c: mean(row[c] for row in rows) for c in rows[0]}}
            found["made"] = found["made"] or made
            if made["device"] != found["made"]["device"]:
                row["on"] = f"{made['device']}, torch {made['torch']}"
            found["claims"][claim][entry] = row
    write_json(RESULTS, found)
    write_evidence(found["claims"], found["made"])


if __name__ == "__main__":
    main()
