"""The claims of Parallax and local linear attention, in direction, with small models.

    python benchmarks/claims_probe.py --workers 6

Meant for a GPU, where the whole takes some minutes. Every cell keeps a file of its own in
``--out``, and what is there or in results/claims_probe.json is not measured again; ``--claim`` and
``--entry`` choose some (``--list`` names those that are missing), so that cells can run apart.
``--table`` takes the new ones into results/claims_probe.json and writes docs/evidence.md's tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from regressions import (
    DEVICE,
    Regression,
    Row,
    bayes,
    prompted,
    regressed,
    ridge_prompt,
    seeded,
    untrained,
)

from subquad.bench.results import Cells, table, write_json, write_section
from subquad.models import CausalLM, CausalLMConfig
from subquad.ops.probe import local_linear
from subquad.tasks import create_task
from subquad.train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "claims_probe.json"
EVIDENCE = ROOT / "docs" / "evidence.md"
Made = Iterator[tuple[str, Callable[[], Row]]]


# Regression without training: k = x, v = y of the pairs before, q = x.


def piecewise() -> Made:
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


FULL = {"heads": 4, "rope_theta": None, "qk_norm": True}
# Normed, a key no longer tells how long x is, and y = W x is not linear in it.
PLAIN = {**FULL, "qk_norm": False}
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax", **FULL},
    "softmax, 5 heads": {"name": "softmax", **FULL, "heads": 5, "head_dim": 16},
    "parallax": {"name": "parallax", **FULL},
    "lla": {"name": "lla", **FULL},
    "lla, ridge 30": {"name": "lla", **FULL, "ridge": 30.0},
    "softmax, no norm": {"name": "softmax", **PLAIN},
    "parallax, no norm": {"name": "parallax", **PLAIN},
    "lla, no norm": {"name": "lla", **PLAIN},
    "gla": {"name": "gla", "heads": 4},
    "mamba2": {"name": "mamba2", "heads": 4, "state_dim": 32},
    "gated_deltanet": {"name": "gated_deltanet", "heads": 4},
}
STEPS = 1500


def in_context(steps: int = STEPS) -> Made:
    """Regression in context: 256 pairs, x ~ N(0, I) of 5 features, y of noise 0.1, one map a
    sequence; two layers of width 64, 4 heads, no MLP, Muon for matrices (AdamW where named). Mean
    squared error of fresh sequences, the noise's 0.1 included."""
    data = Regression()
    yield "ridge regression (optimal)", partial(bayes, data)
    for name, options in MIXERS.items():
        yield name, partial(regressed, data, options, True, steps)
    for name in MIXERS:
        if name.split(",")[0] in ("softmax", "parallax", "lla") and "5 heads" not in name:
            yield f"{name}, AdamW", partial(regressed, data, MIXERS[name], False, steps)


def few(steps: int = STEPS) -> Made:
    """Regression in context with little training: 32 pairs of 3 features, noise 0.1; two layers of
    width 32, 2 heads, 300 steps of 16 sequences with AdamW at 4e-3. Mean squared error of fresh
    sequences over three seeds."""
    data = Regression(d=3, pairs=32)
    yield "ridge regression (optimal)", partial(bayes, data)
    for name in ("softmax", "parallax", "lla"):
        for norm in (True, False):
            options = {"name": name, "heads": 2, "rope_theta": None, "qk_norm": norm}
            entry = name if norm else f"{name}, no norm"
            yield entry, partial(seeded, data, options, steps // 5)
    for name in ("gla", "gated_deltanet"):
        yield name, partial(seeded, data, {"name": name, "heads": 2}, steps // 5)


def changing(steps: int = STEPS) -> Made:
    """The same where the map changes: 4 segments of 64 pairs, each with a part of the sphere of its
    own (8 features to 8, no noise)."""
    data = Regression(d=8, out=8, pairs=256, segments=4, spread=0.7, noise=0.0)
    for name, options in MIXERS.items():
        yield name, partial(regressed, data, options, True, steps)


# One layer over a prompt: heads of softmax, and what the probe saves.


def heads(steps: int = STEPS) -> Made:
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
    "softmax, normed": {"mixer": "softmax", "heads": 1, "qk_norm": True},
    "parallax, normed": {"mixer": "parallax", "heads": 1, "qk_norm": True},
    "lla, normed": {"mixer": "lla", "heads": 1, "qk_norm": True},
    "lla, ridge 30": {"mixer": "lla", "heads": 1, "ridge": 30.0},
    "lla, normed, ridge 30": {"mixer": "lla", "heads": 1, "qk_norm": True, "ridge": 30.0},
    "gla": {"mixer": "gla", "heads": 1},
    "mamba2": {"mixer": "mamba2", "heads": 1, "state_dim": 32},
    "gated_deltanet": {"mixer": "gated_deltanet", "heads": 1},
}


def recalled(options: dict[str, Any], pairs: int, steps: int) -> Row:
    task = create_task("mqar", vocab_size=1024, length=256, pairs=pairs)
    accuracy = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = CausalLMConfig(
            vocab_size=1024, dim=32, depth=2, layers="base_conv m", mixers={"m": options},
            mlp_dim=64, init_std=0.05,
        )  # fmt: skip
        lm = CausalLM(config).to(DEVICE)
        how = TrainConfig(
            steps=steps, batch=64, lr=4e-3, seed=seed, eval_batches=8, dtype="float32"
        )
        ended = train(lm, task, how, progress=lambda _: None)
        accuracy.append(ended.evals[-1]["accuracy"])
    return {"accuracy": sum(accuracy) / 2, "least": min(accuracy)}


def recall(steps: int = STEPS) -> Made:
    """MQAR: 64 pairs among 256 tokens, 1,024 words, width 32, a short convolution and one layer of
    one head (without the convolution nothing was learned in as many steps), AdamW; accuracy, mean
    and least of two seeds."""
    for name, options in RECALL.items():
        yield name, partial(recalled, options, 64, steps)


def solution() -> Made:
    """Local linear attention's relative error, of the output and of the queries' gradient, against
    its closed form in float64, for keys and values of 128 tokens in float32, by steps of conjugate
    gradients; 16 is the default. In the rows "11 directions" q, k and v are maps of 11 features, as
    in the regressions above."""
    for K, ridge in product((16, 32, 64), (0.1, 1.0)):
        yield f"K={K}, ridge {ridge}", partial(solved, K, ridge)
    for K in (16, 32):
        yield f"K={K}, ridge 1.0, 11 directions", partial(solved, K, 1.0, 11)


def solved(K: int, ridge: float, directions: int | None = None) -> Row:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if directions is None:
        x = [normal(1, 128, 2, K) for _ in "qkv"]
    else:
        h = normal(1, 128, directions)
        x = [(h @ normal(directions, 2 * K)).unflatten(-1, (2, K)) for _ in "qkv"]
        x = [F.rms_norm(t, (K,)) for t in x]
    do = normal(1, 128, 2, K).to(DEVICE)

    def run(dtype: torch.dtype, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.to(DEVICE, dtype).requires_grad_() for t in x)
        o = local_linear(q, k, v, ridge=ridge, **how)
        return o.detach(), torch.autograd.grad(o, q, do.to(dtype))[0]

    exact = run(torch.float64, backend="reference")
    row = {}
    for name, steps in {"8 steps": 8, "16": 16, "K": K, "2 K": 2 * K}.items():
        for what, found, want in zip(("", ", dq"), run(torch.float32, steps=steps), exact):
            row[name + what] = ((found - want).norm() / want.norm()).item()
    return row


CLAIMS: dict[str, Callable[..., Made]] = {
    "piecewise": piecewise,
    "in_context": in_context,
    "few": few,
    "changing": changing,
    "heads": heads,
    "recall": recall,
    "solution": solution,
}
UNTRAINED = ("piecewise", "solution")


def write_evidence(claims: dict[str, dict[str, Row]], made: dict[str, Any]) -> None:
    lines = [
        f"`python benchmarks/claims_probe.py` on {made['device']}, torch {made['torch']}, "
        f"{made['date']}.",
        "",
    ]
    for name, make in CLAIMS.items():
        entries = [entry for entry, _ in make()]
        rows = {entry: claims[name][entry] for entry in entries if entry in claims.get(name, {})}
        if rows:
            lines += [f"**{name}.** {' '.join((make.__doc__ or '').split())}", "", *table(rows)]
            missing = [entry for entry in entries if entry not in rows]
            lines += [f"Not measured: {'; '.join(missing)}.", ""] if missing else []
    write_section(EVIDENCE, "claims_probe", "Claims of the kernel regressions", "\n".join(lines))


def tables(kept: Cells) -> None:
    """Take what is new into the results; a row of another machine than the first's says so."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "claims": {}}
    for name, make in CLAIMS.items():
        for entry, _ in make():
            if f"{name}-{entry}" not in kept:
                continue
            row = kept[f"{name}-{entry}"]
            made = row.pop("made")
            found["made"] = found["made"] or made
            if made["device"] != found["made"]["device"]:
                row["on"] = f"{made['device']}, torch {made['torch']}"
            found["claims"].setdefault(name, {})[entry] = row
    write_json(RESULTS, found)
    write_evidence(found["claims"], found["made"])


def work(name: str, entry: str, steps: int) -> Row:
    torch.set_num_threads(1)
    make = CLAIMS[name]
    return dict(make() if name in UNTRAINED else make(steps))[entry]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claim", choices=list(CLAIMS), nargs="*", default=list(CLAIMS))
    parser.add_argument("--entry", help="the only one to measure")
    parser.add_argument("--list", action="store_true", help="print what is not measured yet")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims_probe")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true", help="only the tables of what is there")
    asked = parser.parse_args()
    kept = Cells(asked.out)
    if asked.table:
        return tables(kept)
    before = json.loads(RESULTS.read_text())["claims"] if RESULTS.exists() else {}
    todo = [
        (name, entry)
        for name in asked.claim
        for entry, _ in CLAIMS[name]()
        if asked.entry in (None, entry)
        if f"{name}-{entry}" not in kept and entry not in before.get(name, {})
    ]
    todo.sort(key=lambda cell: "lla" in cell[1])  # the longest last
    if asked.list:
        print("\n".join(" | ".join(cell) for cell in todo))
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.workers, mp_context=context) as pool:
        waiting = {pool.submit(work, *cell, asked.steps): cell for cell in todo}
        for future in as_completed(waiting):
            name, entry = waiting[future]
            try:
                kept.keep(f"{name}-{entry}", future.result())
            except Exception as error:
                print(name, "|", entry, "| failed:", error, flush=True)
    return None


if __name__ == "__main__":
    main()
