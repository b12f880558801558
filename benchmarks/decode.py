"""One token of a Gated DeltaNet and a KDA layer between its projections, in one launch: time and
bytes a second beside those of a copy, in one run.

    python benchmarks/decode.py --out benchmarks/results/decode.json

Each row is first checked against float64. Bytes: the state read and written once (nothing else of a
layer's token is large). Times are those of a CUDA graph of launches on states of their own, more
than the cache holds. ``--tune`` tries other tiles.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import triton

from subquad.bench.recurrence import decode_defined, decode_inputs
from subquad.bench.results import machine, write_json
from subquad.ops.recurrence.triton import configs
from subquad.ops.recurrence.triton.decode import decode_layer

HEADS, WIDTH = 16, 128
BATCHES = (1, 4, 16, 64, 128, 256, 512)
TILES = [
    {"BV": BV, "num_warps": warps, "num_stages": 1}
    for BV in (8, 16, 32, 64, 128)
    for warps in (1, 2, 4, 8)
]
CACHED = 256 << 20  # bytes of states in a round, several times the GPU's cache


def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    x = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / (triton.testing.do_bench(lambda: y.copy_(x)) * 1e-3)


def draw(B: int, channel: bool, gated: bool) -> dict[str, Any]:
    return decode_inputs(
        "cuda", B=B, HQ=HEADS, H=HEADS, K=WIDTH, V=WIDTH, channel=channel, gated=gated,
        dtype=torch.bfloat16,
    )  # fmt: skip


def check(B: int, channel: bool, gated: bool) -> float:
    """The larger of the relative errors of y and of the state.

    Raises:
        SystemExit: where y is off by more than 1% or the state by more than 1e-4.
    """
    inputs = draw(min(B, 8), channel, gated)
    right, last = decode_defined(inputs)
    y, _ = decode_layer(**inputs)
    off = [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in ((y, right), (inputs["state"], last))
    ]
    if not (off[0] < 1e-2 and off[1] < 1e-4):
        raise SystemExit(f"not printed: B{B} {channel=} {gated=} is wrong by {off}")
    return max(off)


def replayed(run: Any, rounds: int) -> float:
    """Milliseconds of ``run()``, which launches ``rounds`` times, in a CUDA graph; of one."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, warmup=25, rep=80, return_mode="median") / rounds


def row(B: int, channel: bool, gated: bool) -> dict[str, float]:
    inputs = draw(B, channel, gated)
    state = inputs.pop("state")
    rounds = max(4, min(64, CACHED // state.nbytes))
    states = [torch.randn_like(state) for _ in range(rounds)]

    def run() -> None:
        for own in states:
            decode_layer(state=own, **inputs)

    ms = replayed(run, rounds)
    copies = [torch.empty_like(state) for _ in states]

    def copy() -> None:
        for own, to in zip(states, copies, strict=True):
            to.copy_(own)

    moved = 2 * state.nbytes
    copied = replayed(copy, rounds)
    return {
        "us": 1e3 * ms, "bytes": moved, "bytes_per_s": moved / ms * 1e3,
        "copy_us": 1e3 * copied, "copy_bytes_per_s": moved / copied * 1e3, "of_copy": copied / ms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    asked = parser.parse_args()
    ceiling = copy_rate()
    data: dict[str, Any] = {"made": machine(), "copy_bytes_per_s": ceiling, "rows": {}}
    print(data["made"], f"copy {ceiling / 1e12:.2f} TB/s", flush=True)
    for name, channel in (("gated delta rule", False), ("KDA", True)):
        for gated in (True, False):
            for B in asked.batches:
                label = f"{name}, B{B}, {'gate and norm inside' if gated else 'plain'}"
                if not asked.tune:
                    found = {"error": check(B, channel, gated)} | row(B, channel, gated)
                    data["rows"][label] = found
                    write_json(asked.out, data)
                    show(label, found, ceiling)
                    continue
                for tile in TILES:
                    if gated and tile["BV"] != WIDTH:
                        continue
                    with configs.forced({"decode": tile}):
                        try:
                            check(B, channel, gated)
                            show(f"{label} {tile}", row(B, channel, gated), ceiling)
                        except (SystemExit, Exception) as wrong:
                            print(label, tile, str(wrong)[:80], flush=True)


def show(label: str, found: dict[str, float], ceiling: float) -> None:
    print(
        f"{label:80} {found['us']:9.2f} us {found['bytes_per_s'] / 1e12:6.2f} TB/s "
        f"{found['bytes_per_s'] / ceiling:5.0%} of the copy ceiling, {found['of_copy']:5.0%} of a "
        "copy of the same size",
        flush=True,
    )


if __name__ == "__main__":
    main()
