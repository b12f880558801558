"""What the neural memory of Titans is good for, beside models of equal size.

``python benchmarks/claims_memory.py --data ETTh1.csv`` runs two claims:

- ``needle``: models trained on needles in 128 tokens read up to 2,048;
- ``forecast``: the next 96 hours of the seven series of ETTh1 (the file is the user's; without
  ``--data`` this claim is left out), beside a linear map.

Every cell (a model and a seed) is kept in ``--out`` when it is done; ``--share I/N`` runs a part of
them, so that several processes can share the work. The plain command then finds all done and writes
results/claims_memory.json and the tables in docs/evidence.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.match import build, matched, parameters
from subquad.bench.results import machine, table, write_json, write_section
from subquad.mixers.base import create_mixer
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.tasks import create_task
from subquad.train import TrainConfig, evaluate, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_memory.json"
EVIDENCE = ROOT / "docs" / "evidence.md"

Row = dict[str, Any]
Cell = Callable[[], Row]

SEEDS = (0, 1)
TRAINED, READ = 128, (128, 256, 512, 1024, 2048)
STEPS = 800
# One short convolution, then one layer of each kind.
NEEDLE = {
    "softmax": "base_conv softmax[heads=2]",
    "gated_deltanet": "base_conv gated_deltanet[heads=2,head_dim=32]",
    "titans, LMM": "base_conv titans[heads=2,chunk=16]",
    "titans, LMM, steps of 0.003": "base_conv titans[heads=2,chunk=16,lr_max=0.003]",
    "titans, LMM, one matrix": "base_conv titans[heads=2,chunk=16,depth=1]",
    "titans, LMM, no forgetting": "base_conv titans[heads=2,chunk=16,forget=false]",
    "titans, MAG (window 32)": "base_conv titans[heads=2,chunk=16,variant=mag,window=32]",
    "titans, MAC (segments of 32)": "base_conv titans[heads=2,chunk=16,variant=mac,segment=32]",
    "titans, MAL (window 32)": "base_conv titans[heads=2,chunk=16,variant=mal,window=32]",
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
FORECAST = {
    "linear": None,
    "softmax": {"mixer": "softmax", "heads": 2},
    "gated_deltanet": {"mixer": "gated_deltanet", "heads": 2, "head_dim": 32},
    "titans, LMM": {"mixer": "titans", "heads": 2, "chunk": 8},
    "titans, MAG": {"mixer": "titans", "heads": 2, "chunk": 8, "variant": "mag", "window": 16},
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


def cells(asked: argparse.Namespace) -> dict[tuple[str, str, int], Cell]:
    found: dict[tuple[str, str, int], Cell] = {}
    for seed in SEEDS:
        for entry in NEEDLE:
            found["needle", entry, seed] = partial(needle, entry, seed, asked.device)
        for entry in FORECAST if asked.data else ():
            cell = partial(forecast, entry, seed, asked.device, asked.data)
            found["forecast", entry, seed] = cell
    return found


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
    for claim, rows in claims.items():
        lines += [TITLES[claim], "", *table(rows)]
    write_section(EVIDENCE, "claims_memory", "Claims of the neural memory", "\n".join(lines))


def share(text: str) -> tuple[int, int]:
    first, _, processes = text.partition("/")
    if not 0 <= int(first) < int(processes):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text}")
    return int(first), int(processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="ETTh1.csv")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims_memory")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N")
    parser.add_argument("--table", action="store_true", help="only of the cells that are there")
    asked = parser.parse_args()
    first, processes = asked.share
    every = cells(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[str, str], list[Row]] = {}
    made: Row = {}
    for i, ((claim, entry, seed), cell) in enumerate(every.items()):
        path = asked.out / f"{claim}-{entry}-{seed}.json"
        if not path.exists():
            if i % processes != first or asked.table:
                continue
            write_json(path, {"made": machine(), "found": cell()})
        made, found = json.loads(path.read_text()).values()
        print(claim, "|", entry, "|", seed, "|", found, flush=True)
        done.setdefault((claim, entry), []).append(found)
    if processes > 1:
        return
    claims: dict[str, dict[str, Row]] = {}
    for (claim, entry), rows in done.items():
        means = {c: mean(row[c] for row in rows) for c in rows[0]}
        claims.setdefault(claim, {})[entry] = {"seeds": len(rows), **means}
    write_json(RESULTS, {"made": made, "claims": claims})
    write_evidence(claims, made)


if __name__ == "__main__":
    main()
