"""The probe's kernels beside PyTorch's attention of the same shape, in one run.

    python benchmarks/probe.py --out benchmarks/results/probe.json

A row whose error against float64 is over its limit stops the run before anything is printed.
``--tune`` times candidates of the launch options instead, each checked first; ``--table`` writes
the table of the results at their own place into docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from subquad.bench.probe import Case, errors, gate
from subquad.bench.results import machine, write_json, write_section
from subquad.ops.probe import cost
from subquad.ops.probe.triton import launch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "probe.json"
ROWS = {
    "long": Case(B=1, T=16384, H=16, G=16, K=128, V=128),
    "batch": Case(B=4, T=4096, H=16, G=16, K=128, V=128),
    "grouped": Case(B=4, T=4096, H=16, G=4, K=128, V=128),
    "narrow": Case(B=8, T=2048, H=16, G=16, K=64, V=64),
    "window of 1024": Case(B=1, T=16384, H=16, G=16, K=128, V=128, window=1024),
    "decode, 1 text": Case(B=1, T=1, S=16384, H=8, G=8, K=128, V=128),
    "decode, 32 texts": Case(B=32, T=1, S=16384, H=8, G=8, K=128, V=128),
    "local linear": Case(B=4, T=2048, H=8, G=8, K=64, V=64, local=True),
}
# By bytes of an element and width of a head: (BM, BN, warps, stages).
CANDIDATES = {
    ("grad_kv", 128): (
        (64, 64, 8, 1), (32, 128, 8, 1), (32, 128, 8, 2), (16, 128, 8, 2), (16, 64, 4, 2),
        (64, 64, 8, 2),
    ),
    ("grad_q", 128): ((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    ("forward", 128): ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2)),
    ("grad_kv", 64): ((64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2)),
    ("grad_q", 64): ((64, 64, 4, 2), (128, 64, 8, 2)),
    ("forward", 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
}  # fmt: skip


def median(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    return triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median")


def times(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Forward, forward and backward (ms), peak bytes of the latter beyond what was there."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    with torch.no_grad():
        do = torch.randn_like(run(**leaves))

    def forward() -> Tensor:
        with torch.no_grad():
            return run(**leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(**leaves), list(leaves.values()), do)

    if do.shape[1] == 1:
        return {"forward_ms": median(forward)}
    both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    return {"forward_ms": median(forward), "both_ms": median(both), "peak_bytes": peak}


def ours(case: Case) -> dict[str, float]:
    options = case.options("cuda")
    return times(lambda **x: case.op(**x, **options, backend="triton"), case.draw("cuda"))


def dense(case: Case) -> dict[str, float]:
    """Causal softmax attention by PyTorch; it has no r, and sees all keys."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = case.H != case.G
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.T > 1, enable_gqa=grouped)

    inputs = {n: t for n, t in case.draw("cuda").items() if n != "r"}
    return times(run, inputs)


def small(case: Case) -> Case:
    """The same with few rows and heads: float64 takes long."""
    H = case.H // case.G * min(case.G, 2)
    return replace(case, B=1, T=min(case.T, 4096), S=min(case.S, 4096), H=H, G=min(case.G, 2))


def measure(out: Path) -> None:
    data: dict[str, Any] = {"made": machine(), "rows": {}}
    for name, case in ROWS.items():
        try:
            error = gate(small(case), "cuda")
        except ValueError as wrong:
            raise SystemExit(f"not printed: {wrong}") from None
        row: dict[str, Any] = {"case": case.name, "error": error, "checked": small(case).name}
        row |= {"ours": ours(case), "sdpa": dense(case)}
        if not case.local and case.window is None and case.T > 1:
            area = case.B * case.H * case.T * (case.T + 1) // 2
            done = cost.flops(area=area, K=case.K, V=case.V)
            row["tflops"] = done / row["ours"]["forward_ms"] / 1e9
        data["rows"][name] = row
        write_json(out, data)
        torch.cuda.empty_cache()
    print(data["made"])
    print(f"{'':16}|  forward     both  GiB | sdpa fwd     both  GiB | TFLOP/s | error")
    for name, row in data["rows"].items():
        sides = [
            "".join(f"{row[s].get(n, float('nan')):9.3f}" for n in ("forward_ms", "both_ms"))
            + f"{row[s].get('peak_bytes', 0) / 2**30:5.2f}"
            for s in ("ours", "sdpa")
        ]
        rate = f"{row['tflops']:7.0f}" if "tflops" in row else "      -"
        print(f"{name:16}|{' |'.join(sides)} | {rate} | {row['error']:.2g}")


def tune() -> None:
    """Times of each kernel's candidates, of those that are right; a process each, since a wrong one
    may end its process."""
    for (kernel, size, width), configs in CANDIDATES.items():
        for config in configs:
            asked = ",".join(map(str, (kernel, size, width, *config)))
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--candidate", asked],
                    capture_output=True, text=True, timeout=60,
                )  # fmt: skip
                said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
            except subprocess.TimeoutExpired:
                said = "not done in 60 s"
            print(f"{kernel:8} {size} bytes, {width}, {config}: {said[:150]}", flush=True)


def candidate(asked: str) -> str:
    """What :func:`tune` asks of one process."""
    kernel, *numbers = asked.split(",")
    size, width, *config = map(int, numbers)
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    # The other kernels of a pass as small as any, so that this one decides.
    spare = {"grad_q": (32, 32, 4, 1), "grad_kv": (32, 32, 4, 1), "forward": (32, 32, 4, 1)}
    forced = {**(spare if size == 4 else {}), kernel: tuple(config)}
    case = Case(B=2, T=4096, H=8, G=8, K=width, V=width, dtype=dtype)
    with launch.forced(forced):
        worst = 0.0
        for few in (replace(small(case), T=600), replace(case, B=1, T=333, H=4, G=2)):
            found = errors(few, "cuda")
            worst = max(worst, *found.values())
        return f"{times_of(kernel, case):.3f} ms, error {worst:.2g}, " + (
            "right" if worst <= case.limit else "WRONG"
        )


def times_of(kernel: str, case: Case) -> float:
    inputs = {n: t.detach().requires_grad_() for n, t in case.draw("cuda").items()}
    options = {**case.options("cuda"), "backend": "triton"}
    if kernel == "forward":
        with torch.no_grad():
            return median(lambda: case.op(**inputs, **options))
    o = case.op(**inputs, **options)
    do = torch.randn_like(o)
    leaves = list(inputs.values())
    return median(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True))


def write_table(data: dict[str, Any]) -> None:
    made = data["made"]
    lines = [
        f"`python benchmarks/probe.py` on one {made['device']}, torch {made['torch']}, Triton "
        f"{made['triton']}, {made['date']}; medians in ms, forward / forward and backward, beside "
        "PyTorch's causal attention of the shape (which has no probe, and sees all keys). Error: "
        "the largest of o and the gradients against float64, in norm, on the same shape with fewer "
        "heads and at most 4,096 tokens. TFLOP/s: of the forward's visible pairs.",
        "",
        "| | shape | here | SDPA | peak GiB, here / SDPA | TFLOP/s | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in data["rows"].items():
        sides = []
        for side in (row["ours"], row["sdpa"]):
            both = f" / {side['both_ms']:.3g}" if "both_ms" in side else ""
            sides.append(f"{side['forward_ms']:.3g}{both}")
        peaks = [row[s].get("peak_bytes") for s in ("ours", "sdpa")]
        peak = " / ".join(f"{p / 2**30:.2f}" for p in peaks if p is not None)
        rate = f"{row['tflops']:.0f}" if "tflops" in row else ""
        cells = name, row["case"], *sides, peak, rate, f"{row['error']:.1g}"
        lines.append(f"| {' | '.join(cells)} |")
    body = "\n".join(lines)
    write_section(ROOT / "docs" / "evidence.md", "probe", "The probe's kernels", body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        write_table(json.loads(RESULTS.read_text()))
    elif asked.candidate:
        print(candidate(asked.candidate))
    elif asked.tune:
        tune()
    else:
        measure(asked.out)


if __name__ == "__main__":
    main()
