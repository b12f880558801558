"""Decoding by a random Llama-shaped model under a policy, beside full attention.

    python benchmarks/policy_tokens.py             # the whole table (a GPU with 80 GB or more)
    python benchmarks/policy_tokens.py --quick     # the same code on small shapes, any device

Tokens are written in a row behind a prompt, each the likeliest after the one before: launched one
by one from Python, and recorded as a CUDA graph and repeated. Full attention is transformers' own
model and cache with SDPA; its graph is recorded in a cache that is written in place, at the length
of the prompt, which never grows: as fast as SDPA can be. Nothing is profiled, as a profiler leaves
a process in which the host takes longer to start a graph. Before anything is timed, the logits of
recorded tokens must be those of tokens launched one by one; otherwise nothing is. Every row is
printed and written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from policies import PAGE, RESULTS, SIZES, SMALL, random_model
from torch import Tensor

import subquad
from subquad.bench.measure import timed
from subquad.bench.policies import cache_bytes, new_cache, policy
from subquad.bench.results import machine, write_json, write_section
from subquad.policies import Duo, Policy

FULL, STEPS = "full", "full, in place"
ENTRIES = (
    FULL,
    STEPS,
    "quest:budget=1024",
    "quest:budget=1024,variant=frontier",
    "snapkv:capacity=1024",
    "duo:sparsity=0.75",
    "streaming_llm",
)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--quick", action="store_true", help="small shapes")
    asked.add_argument("--lengths", type=int, nargs="+", help="tokens")
    asked.add_argument("--policies", nargs="+", default=ENTRIES, help="rows")
    asked.add_argument("--out", type=Path, help="results/policy_tokens.json; with --quick none")
    asked.add_argument("--page", action="store_true", help="only write the figures to the docs")
    options = asked.parse_args()
    if options.page:
        write_page(options.out or RESULTS / "policy_tokens.json")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        asked.error("the whole table needs a GPU; --quick runs anywhere")
    sizes = SMALL if options.quick else SIZES
    out = options.out or (None if options.quick else RESULTS / "policy_tokens.json")
    lengths = options.lengths or ([1024] if options.quick else [32768, 131072])
    for entry in options.policies:
        gate(entry, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(sizes, max(lengths) + 1024, device, dtype)
    data: dict[str, Any] = {"made": machine(), "sizes": sizes, "dtype": str(dtype), "rows": []}
    for T in lengths:
        ids = torch.randint(100, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
        for entry in options.policies:
            try:
                row = {"tokens": T, "policy": entry, **measure(entry, model, ids)}
            except RuntimeError as error:  # out of memory, say: the other rows still count
                row = {"tokens": T, "policy": entry, "failed": str(error)[:300]}
            print(", ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)
            data["rows"].append(row)
            if out is not None:
                write_json(out, data)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def chosen(entry: str, layers: int, kv_heads: int) -> Policy:
    if entry in (FULL, STEPS):
        return Policy()
    made = policy(entry)
    if isinstance(made, Duo):  # a random model has no heads to find: any will do
        gates = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(0)).tolist()
        made = dataclasses.replace(made, gates=gates)
    return made


def gate(entry: str, device: torch.device) -> None:
    """Stop unless recorded tokens are those launched one by one."""
    sizes = {**SMALL, "layers": 3, "head_dim": 64}
    model = random_model(sizes, 4096, device, torch.float32)
    ids, outs = torch.randint(100, (1, 3000), device=device), []
    with torch.inference_mode(), subquad.apply(model, chosen(entry, 3, sizes["kv_heads"])) as on:
        for recorded in (False, True):
            cache = on.new_cache()
            model(ids, past_key_values=cache, logits_to_keep=1)
            one = on.steps(cache, room=7) if recorded else partial(launched, model, cache)
            outs.append(torch.stack([one(ids[:, t : t + 1]).double() for t in range(20)]))
    error = float((outs[1] - outs[0]).norm() / outs[0].norm())
    if not error < 1e-3:
        sys.exit(f"{entry}: recorded tokens are {error:.1e} from others; nothing is timed")
    print(f"{entry}: recorded tokens are {error:.1e} from those launched one by one", flush=True)


def launched(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model(ids, past_key_values=cache).logits[:, -1]


@torch.inference_mode()
def measure(entry: str, model: Any, ids: Tensor) -> dict[str, Any]:
    """Seconds of a token by the clock, both ways, and bytes of the cache."""
    row: dict[str, Any] = {}
    policy_ = chosen(entry, len(model.model.layers), model.config.num_key_value_heads)
    if entry == FULL:
        cache = new_cache(model)
        model(ids, past_key_values=cache, logits_to_keep=1)
        one = partial(launched, model, cache)
        row |= {"launched": written(one, ids), "cache": cache_bytes(cache)}
        del cache, one
    with subquad.apply(model, policy_) as on:
        cache = on.new_cache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        if entry != FULL:
            one = partial(launched, model, cache)
            row |= {"launched": written(one, ids), "cache": cache_bytes(cache)}
        if ids.is_cuda:
            one = frozen(model, cache, ids) if entry == FULL else on.steps(cache)
            for _ in range(4):
                one(ids[:, :1])
            row["recorded"] = written(one, ids, 64)
    return row


def written(one: Callable[[Tensor], Tensor], ids: Tensor, steps: int = 6) -> float:
    """Seconds a token, of some in a row."""

    def run() -> None:
        token = ids[:, :1]
        for _ in range(steps):
            token = one(token).argmax(-1, keepdim=True)

    one(ids[:, :1])
    return median(timed(run, ids.device)[0] for _ in range(3)) / steps


def frozen(model: Any, cache: Any, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """One token of full attention by SDPA as a CUDA graph, at the length that the cache has."""
    given = ids[:, :1].clone()
    for _ in range(2):
        launched(model, cache, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = launched(model, cache, given)

    def one(token: Tensor) -> Tensor:
        given.copy_(token)
        graph.replay()
        return logits

    return one


def write_page(results: Path) -> None:
    """The rows of a run as a table of docs/performance.md."""
    found = json.loads(results.read_text())
    made, rows = found["made"], [row for row in found["rows"] if "failed" not in row]
    peers = {row["tokens"]: row["recorded"] for row in rows if row["policy"] == STEPS}
    lines = [
        f"`python benchmarks/policy_tokens.py` on one {made['device']}, torch {made['torch']}, "
        f"Triton {made['triton']}, {made['date']}, bfloat16: milliseconds a token of a Llama of "
        "random weights with 28 layers, 12 heads of 128 and 2 key heads (1.5 B parameters), by the "
        f"clock, launched one by one and as a CUDA graph. `{FULL}` is transformers' "
        f"own model and cache with SDPA, `{STEPS}` full attention in our cache. *Faster*: time in "
        "a graph beside that of the latter.",
        "",
        "| tokens | policy | launched | in a graph | tokens/s | faster | cache, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        names = ("launched", "recorded")
        times = " | ".join(f"{1e3 * row[name]:.2f}" if name in row else "" for name in names)
        recorded = row.get("recorded")
        faster = (
            f"{1 / recorded:.0f} | {peers[row['tokens']] / recorded:.2f}" if recorded else " | "
        )
        cache = f"{row['cache'] / 1e6:,.0f}"
        lines.append(f"| {row['tokens']:,} | `{row['policy']}` | {times} | {faster} | {cache} |")
    write_section(PAGE, "policy tokens", "A decoded token under a policy", "\n".join(lines))


if __name__ == "__main__":
    main()
