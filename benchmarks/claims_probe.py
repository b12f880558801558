"""The claims of Parallax and local linear attention, in direction, with small models.

    python benchmarks/claims_probe.py --workers 6

Meant for a GPU, where the whole takes some minutes. Every result is written to ``--out`` when it is
there and not measured again. The tables of the results at their own place go into docs/evidence.md
(``--table``: only that).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import subquad
from subquad.bench.results import machine, write_json, write_section
from subquad.models import CausalLM, CausalLMConfig
from subquad.ops.probe import local_linear, probe
from subquad.tasks import create_task
from subquad.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_probe.json"
EVIDENCE = ROOT / "docs" / "evidence.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Row = dict[str, Any]
Cells = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True)
class Regression:
    """Sequences of pairs (x, y = W x + noise); W changes ``segments`` times as often as not.

    Attributes:
        d, out: of x and y.
        pairs: of a sequence.
        segments: equal parts, each with a W of its own.
        spread: None for x ~ N(0, I); else every segment has a part of the unit sphere of its own,
            around a random centre, and ``spread`` is how wide it is.
        noise: variance of y's.
    """

    d: int = 5
    out: int = 1
    pairs: int = 256
    segments: int = 1
    spread: float | None = None
    noise: float = 0.1

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x ``[n,pairs,d]`` and y ``[n,pairs,out]``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        s, each = self.segments, self.pairs // self.segments
        x = normal(n, s, each, self.d)
        if self.spread is not None:
            centre = F.normalize(normal(n, s, 1, self.d), dim=-1)
            x = F.normalize(centre + self.spread * self.d**-0.5 * x, dim=-1)
        y = x @ normal(n, s, self.d, self.out)
        if self.spread is None:
            y = y * self.d**-0.5
        y = y + self.noise**0.5 * normal(*y.shape)
        return x.flatten(1, 2), y.flatten(1, 2)

    def parts(self, error: Tensor) -> list[float]:
        """Mean of ``[n,pairs]`` over each segment but its first token, which nothing foretells."""
        return error.unflatten(1, (self.segments, -1))[:, :, 1:].mean((0, 2)).tolist()


def before(x: Tensor) -> Tensor:
    """Each place's predecessor, zero at the first."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))


# Regression without training: k = x, v = y of the pairs before, q = x.

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def untrained(data: Regression, method: str) -> Row:
    """At the best bandwidth (and ridge) of a grid."""
    x, y = (t.to(DEVICE) for t in data.draw(32, torch.Generator().manual_seed(0)))
    q, k, v = (t.double()[:, :, None] for t in (x[:, 1:], x[:, :-1], y[:, :-1]))
    best: Row = {}
    for scale, ridge in product(SCALES, (0.03, 0.1, 0.3, 1.0)):
        if method == "softmax":
            o = probe(q, k, v, torch.zeros_like(q), scale=scale)
        elif method == "lla":
            o = local_linear(q, k, v, ridge=ridge, scale=scale)
        elif scale:
            break  # a global fit has no bandwidth
        else:
            o = local_linear(q, k, v, ridge=ridge, scale=0.0)
        error = (o[:, :, 0] - y[:, 1:]).square().mean(-1)
        parts = data.parts(F.pad(error, (1, 0)))
        found = {"first segment": parts[0], "later segments": sum(parts[1:]) / len(parts[1:])}
        if not best or found["later segments"] < best["later segments"]:
            best = {**found, "scale": scale, "ridge": "" if method == "softmax" else ridge}
    return best


def piecewise() -> Cells:
    """Regression at test time, nothing trained: four segments of 128 pairs, each with a linear
    map of its own, y of unit variance and no noise. Mean squared error at each method's best
    bandwidth and ridge for the later segments. In the rows "a part each" every segment has its own
    part of the sphere; where all share the sphere, nothing tells old pairs from new ones."""
    for d, spread in ((4, 0.7), (8, 0.7), (16, 0.7), (8, 1e4)):
        data = Regression(d=d, out=d, pairs=512, segments=4, spread=spread, noise=0.0)
        where = "all of the sphere" if spread > 100 else "a part each"
        for method in ("softmax", "global ridge", "lla"):
            yield f"d={d}, {where}: {method}", partial(untrained, data, method)


# Regression in context: two layers learn to predict y from the pairs before.


class Stack(nn.Module):
    """Two mixers with residuals over tokens (x_t, x_(t-1), y_(t-1)); y_t is read from the last."""

    def __init__(self, data: Regression, options: dict[str, Any], dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * data.d + data.out, dim)
        self.mixers = nn.ModuleList(subquad.create_mixer(dim=dim, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.head = nn.Linear(dim, data.out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(torch.cat([x, before(x), before(y)], -1))
        for norm, mixer in zip(self.norms, self.mixers):
            h = h + mixer(norm(h))[0]
        return self.head(self.norms[2](h))


FULL = {"heads": 4, "rope_theta": None, "qk_norm": True}
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax", **FULL},
    "softmax, 5 heads": {"name": "softmax", **FULL, "heads": 5, "head_dim": 16},
    "parallax": {"name": "parallax", **FULL},
    "lla": {"name": "lla", **FULL},
    "gla": {"name": "gla", "heads": 4},
    "mamba2": {"name": "mamba2", "heads": 4, "state_dim": 32},
    "gated_deltanet": {"name": "gated_deltanet", "heads": 4},
}
STEPS, BATCH = 1500, 64


def regressed(data: Regression, options: dict[str, Any], muon: bool, steps: int) -> Row:
    """Error at the better of two learning rates, by the same evaluation for every model."""
    rates = (0.005, 0.02) if muon else (1e-3, 4e-3)
    found = [fitted(data, options, muon, rate, steps) for rate in rates]
    return min(found, key=lambda row: row["error"])


def fitted(data: Regression, options: dict[str, Any], muon: bool, lr: float, steps: int) -> Row:
    torch.manual_seed(0)
    model = Stack(data, options).to(DEVICE)
    matrices = [p for p in model.mixers.parameters() if p.dim() == 2 and muon]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizers: list[Any] = [torch.optim.AdamW(rest, lr=3e-3 if muon else lr, weight_decay=0.0)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=o.param_groups[0]["lr"], total_steps=steps, pct_start=0.05,
            cycle_momentum=False,
        )
        for o in optimizers
    ]  # fmt: skip
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(steps):
        x, y = data.draw(BATCH, generator)
        loss = (model(x, y) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, schedule in zip(optimizers, schedules):
            o.step()
            schedule.step()
            o.zero_grad()
    return {
        **score(data, model),
        "lr": lr,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def score(data: Regression, model: Callable[[Tensor, Tensor], Tensor]) -> Row:
    generator = torch.Generator(DEVICE).manual_seed(2)
    errors = []
    for _ in range(16):
        x, y = data.draw(128, generator)
        errors.append((model(x, y) - y).square().mean(-1))
    error = torch.cat(errors)
    if data.segments > 1:
        parts = data.parts(error)
        late = error.unflatten(1, (data.segments, -1))[:, 1:, -16:].mean().item()
        return {
            "error": sum(parts) / len(parts), "first segment": parts[0],
            "later segments": sum(parts[1:]) / len(parts[1:]), "their last 16 pairs": late,
        }  # fmt: skip
    return {"error": error.mean().item(), "after 40 pairs": error[:, 36:45].mean().item(),
            "last 64": error[:, -64:].mean().item()}  # fmt: skip


def bayes(data: Regression) -> Row:
    """Ridge regression of the pairs before, with the prior's and the noise's true variances."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.double(), y.double()
        gram = (x[..., :, None] * x[..., None, :]).cumsum(1) - x[..., :, None] * x[..., None, :]
        moment = (x[..., :, None] * y[..., None, :]).cumsum(1) - x[..., :, None] * y[..., None, :]
        eye = data.noise * data.d * torch.eye(data.d, dtype=x.dtype, device=x.device)
        return (x[..., None, :] @ torch.linalg.solve(gram + eye, moment))[..., 0, :].float()

    return score(data, predict)


def in_context(steps: int = STEPS) -> Cells:
    """Regression in context: 256 pairs, x ~ N(0, I) of 5 features, y of noise 0.1, one map a
    sequence; two layers of width 64, 4 heads, no MLP, Muon for matrices (AdamW where named). Mean
    squared error of fresh sequences, the noise's 0.1 included."""
    data = Regression()
    yield "ridge regression (optimal)", partial(bayes, data)
    for name, options in MIXERS.items():
        yield name, partial(regressed, data, options, True, steps)
    for name in ("softmax", "parallax", "lla"):
        yield f"{name}, AdamW", partial(regressed, data, MIXERS[name], False, steps)


def changing(steps: int = STEPS) -> Cells:
    """The same where the map changes: 4 segments of 64 pairs, each with a part of the sphere of its
    own (8 features to 8, no noise)."""
    data = Regression(d=8, out=8, pairs=256, segments=4, spread=0.7, noise=0.0)
    for name, options in MIXERS.items():
        yield name, partial(regressed, data, options, True, steps)


# One layer over a prompt: heads of softmax, and what the probe saves.


class Prompt(nn.Module):
    """One layer: (x_q, 0) reads the tokens (x_l, y_l), all heads as wide as a token; no bias,
    positions or residual (He et al., arXiv 2503.12734)."""

    def __init__(self, method: str, d: int, heads: int) -> None:
        super().__init__()
        E, self.heads, self.method = d + 1, heads, method
        names = ("q_proj", "k_proj", "v_proj", *["r_proj"] * (method == "parallax"))
        for name in names:
            setattr(self, name, nn.Linear(E, E * heads, bias=False))
        self.o_proj = nn.Linear(E * heads, 1, bias=False)
        self.ridge = nn.Parameter(torch.zeros(heads)) if method == "lla" else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x ``[n,L+1,d]``, y ``[n,L+1,1]``; the last y is predicted ``[n]``, not seen."""
        z = torch.cat([x[:, :-1], y[:, :-1]], -1)
        asked = torch.cat([x[:, -1:], torch.zeros_like(y[:, -1:])], -1)
        k, v = (m(z).unflatten(-1, (self.heads, -1)) for m in (self.k_proj, self.v_proj))
        q = self.q_proj(asked).unflatten(-1, (self.heads, -1))
        if self.ridge is not None:
            o = local_linear(q, k, v, ridge=F.softplus(self.ridge) + 1e-4, causal=False)
        else:
            r = torch.zeros_like(q)
            if self.method == "parallax":
                r = self.r_proj(asked).unflatten(-1, (self.heads, -1))
            o = probe(q, k, v, r, causal=False)
        return self.o_proj(o.flatten(-2))[:, 0, 0]


def prompted(method: str, heads: int, steps: int) -> Row:
    """Trained on prompts of 40 pairs; errors there and on 100."""
    torch.manual_seed(0)
    data, model = Regression(pairs=41), Prompt(method, 5, heads).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for _ in range(steps):
        x, y = data.draw(256, generator)
        loss = (model(x, y) - y[:, -1, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return asked_last(model)


@torch.no_grad()
def asked_last(model: Callable[[Tensor, Tensor], Tensor]) -> Row:
    row = {}
    for length in (40, 100):
        x, y = Regression(pairs=length + 1).draw(20_000, torch.Generator(DEVICE).manual_seed(2))
        row[f"error, {length} pairs"] = (model(x, y) - y[:, -1, 0]).square().mean().item()
    return row


def ridge_prompt() -> Row:
    def predict(x: Tensor, y: Tensor) -> Tensor:
        past, seen = x[:, :-1].double(), y[:, :-1].double()
        eye = 0.5 * torch.eye(5, dtype=past.dtype, device=past.device)
        W = torch.linalg.solve(past.mT @ past + eye, past.mT @ seen)
        return (x[:, -1:].double() @ W)[:, 0, 0].float()

    return asked_last(predict)


def heads(steps: int = STEPS) -> Cells:
    """One layer over a prompt of 40 pairs (5 features, noise 0.1), 6,000 steps of Adam. One head of
    softmax is biased; two of them with opposite signs are debiased gradient descent, which one
    head with a probe can be alone."""
    yield "ridge regression (optimal)", ridge_prompt
    for method, count in (
        ("softmax", 1), ("softmax", 2), ("softmax", 4), ("parallax", 1), ("parallax", 2),
        ("lla", 1), ("lla", 2),
    ):  # fmt: skip
        yield (
            f"{method}, {count} head{'s' * (count > 1)}",
            partial(prompted, method, count, 4 * steps),
        )


# Associative recall.

RECALL: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax", "heads": 1},
    "parallax": {"mixer": "parallax", "heads": 1},
    "lla": {"mixer": "lla", "heads": 1},
    "gla": {"mixer": "gla", "heads": 1},
    "mamba2": {"mixer": "mamba2", "heads": 1, "state_dim": 32},
    "gated_deltanet": {"mixer": "gated_deltanet", "heads": 1},
}


def recalled(options: dict[str, Any], dim: int, pairs: int, steps: int) -> Row:
    task = create_task("mqar", vocab_size=1024, length=256, pairs=pairs)
    accuracy = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = CausalLMConfig(
            vocab_size=1024, dim=dim, depth=2, layers="m", mixers={"m": options}, mlp_dim=2 * dim
        )
        lm = CausalLM(config).to(DEVICE)
        how = TrainConfig(
            steps=steps, batch=64, lr=3e-3, seed=seed, eval_batches=8, dtype="float32"
        )
        ended = train(lm, task, how, progress=lambda _: None)
        accuracy.append(ended.evals[-1]["accuracy"])
    return {"accuracy": sum(accuracy) / 2, "least": min(accuracy)}


def recall(steps: int = STEPS) -> Cells:
    """MQAR: 256 tokens, 1,024 words, two layers of one head, AdamW; accuracy, mean and least of two
    seeds."""
    for (dim, pairs), (name, options) in product(((32, 32), (32, 64)), RECALL.items()):
        yield f"{pairs} pairs, width {dim}: {name}", partial(recalled, options, dim, pairs, steps)


CLAIMS: dict[str, Callable[..., Cells]] = {
    "piecewise": piecewise,
    "in_context": in_context,
    "changing": changing,
    "heads": heads,
    "recall": recall,
}


def table(name: str, found: dict[str, Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = [f"**{name}.** {' '.join((CLAIMS[name].__doc__ or '').split())}", ""]
    lines += ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for entry, row in found.items():
        cells = (row.get(c, "") for c in columns)
        shown = (f"{c:.3g}" if isinstance(c, float) else f"{c:,}" if c != "" else c for c in cells)
        lines.append(f"| {entry} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def write_evidence(claims: dict[str, dict[str, Row]], made: dict[str, Any]) -> None:
    lines = [
        f"`python benchmarks/claims_probe.py` on {made['device']}, torch {made['torch']}, "
        f"{made['date']}.",
        "",
    ]
    for name, make in CLAIMS.items():
        rows = {entry: claims[name][entry] for entry, _ in make() if entry in claims.get(name, {})}
        lines += table(name, rows) if rows else []
    write_section(EVIDENCE, "claims_probe", "Claims of the kernel regressions", "\n".join(lines))


def work(name: str, entry: str, steps: int) -> Row:
    torch.set_num_threads(1)
    make = CLAIMS[name]
    return dict(make() if name == "piecewise" else make(steps))[entry]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claim", choices=list(CLAIMS), nargs="*", default=list(CLAIMS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    kept = json.loads(asked.out.read_text()) if asked.out.exists() else {"claims": {}}
    done, made = kept["claims"], kept.get("made", machine())
    todo = [
        (name, entry)
        for name in asked.claim
        for entry, _ in CLAIMS[name]()
        if entry not in done.get(name, {}) and not asked.table
    ]
    todo.sort(key=lambda cell: "lla" not in cell[1])  # the longest first
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.workers, mp_context=context) as pool:
        waiting = {pool.submit(work, *cell, asked.steps): cell for cell in todo}
        for future in as_completed(waiting):
            name, entry = waiting[future]
            try:
                row = future.result()
            except Exception as error:
                print(name, "|", entry, "| failed:", error, flush=True)
                continue
            made = machine()
            done.setdefault(name, {})[entry] = row
            write_json(asked.out, {"made": made, "claims": done})
            print(name, "|", entry, "|", row, flush=True)
    if asked.out == RESULTS:
        write_evidence(done, made)


if __name__ == "__main__":
    main()
