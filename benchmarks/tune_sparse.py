"""Measure configurations of the block-sparse kernels on this GPU.

    python benchmarks/tune_sparse.py --out configs.json

Candidates are compiled, and checked against float64, by worker processes; those that are right are
then timed one after another, each by its kernel's own time in a forward and backward pass. The
table is what ``ops/attention/triton/configs.json`` holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from subquad import mask
from subquad.ops.attention import attention
from subquad.ops.attention.triton import configs, op

PORTABLE = ("forward", "grad_q", "grad_kv")
KERNELS = {
    **{k: f"attention_{k}" for k in PORTABLE},
    **{f"hopper_{k}": f"hopper_{k}" for k in PORTABLE},
}


@dataclass(frozen=True)
class Shape:
    """Programs of ``rows`` rows of queries, head dim D, elements of ``itemsize`` bytes."""

    rows: int
    D: int
    itemsize: int = 2

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.itemsize == 2 else torch.float32

    def problem(self, T: int, H: int):
        """Tensors and a mask that runs such programs."""
        G = H if self.rows > 16 else H // 16
        q, k, v = (
            torch.randn(1, T, h, self.D, device="cuda", dtype=self.dtype, requires_grad=True)
            for h in (H, G, G)
        )
        if self.rows == 16:
            own = torch.arange(T, device="cuda")[:, None] // 64
            index = own - torch.arange(24, device="cuda").flip(0)
            index = torch.where(index < 0, T, index).sort(-1)[0]
            index = torch.where(index == T, -1, index).int()
            return (q, k, v), mask.blocks(index[None].repeat(G, 1, 1), 64, rows=1) & mask.causal()
        if self.rows == 64:
            side = int(T**0.5)
            return (q, k, v), mask.neighborhood((side, side), 9, tile=(8, 8))
        return (q, k, v), mask.causal() & mask.window(min(1023, T // 3))


HOPPER = {  # (step, stages)
    ("hopper_forward", 64): [(128, 3), (128, 4), (64, 4)],
    ("hopper_forward", 128): [(128, 2), (64, 3), (64, 4)],
    ("hopper_grad_q", 64): [(64, 3), (64, 4), (64, 6)],
    ("hopper_grad_q", 128): [(64, 3), (64, 4)],
    ("hopper_grad_kv", 64): [(64, 3), (64, 4)],
    ("hopper_grad_kv", 128): [(64, 2), (64, 3), (64, 4)],
}
# Those that fit the registers by the compiler's report: (step, warps, stages), and what else the
# kernel takes.
CANDIDATES = {
    ("forward", 128): [
        (64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3), (32, 4, 4), (128, 8, 2), (128, 8, 3),
        (64, 8, 2), (64, 8, 3),
    ],
    ("forward", 64): [(64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3)],
    ("forward", 16): [(64, w, s) for w in (1, 2, 4) for s in (1, 2, 3)],
    ("grad_q", 128): [
        (64, 8, 2), (64, 8, 3), (32, 8, 3), (128, 8, 1),
        *[(n, 4, s, ("queries", 64)) for n in (32, 64) for s in (2, 3)],
    ],
    ("grad_q", 64): [(64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 3)],
    ("grad_q", 16): [(64, 4, 1), (64, 4, 2), (64, 2, 2), (64, 1, 2), (32, 2, 2), (64, 2, 1)],
    ("grad_kv", 128): [
        *[(n, 8, s, ("keys", 128)) for n, s in ((64, 2), (32, 3))],
        *[(n, 4, s, ("keys", 64)) for n, s in ((64, 2), (32, 3))],
        *[(64, 4, s, ("keys", 64), ("upright", 1)) for s in (1, 2, 3)],
        (128, 8, 2, ("keys", 64), ("upright", 1)), (64, 8, 2, ("keys", 64), ("upright", 1)),
        (64, 8, 3, ("keys", 128), ("upright", 1)),
    ],
    ("grad_kv", 64): [
        *[(n, 4, s, ("keys", 64)) for n in (32, 64) for s in (2, 3)],
        *[(64, 4, s, ("keys", 64), ("upright", 1)) for s in (1, 2, 3)],
    ],
    ("grad_kv", 16): [
        *[(n, 4, 2, ("keys", 64)) for n in (32, 64)], (128, 8, 1, ("keys", 64)),
        *[(64, 4, s, ("keys", 64), ("upright", 1)) for s in (1, 2, 3)],
        *[(128, 8, s, ("keys", 64), ("upright", 1)) for s in (1, 2)],
    ],
}  # fmt: skip


def candidates(kernel: str, shape: Shape) -> Iterator[dict[str, int]]:
    if kernel.startswith("hopper_"):
        if shape.rows == 128 and shape.itemsize == 2:
            for step, stages in HOPPER[kernel, shape.D]:
                yield {"step": step, "num_stages": stages}
        return
    for step, warps, stages, *more in CANDIDATES[kernel, shape.rows]:
        yield {**dict(more), "step": step, "num_warps": warps, "num_stages": stages}


@contextmanager
def only(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """With this configuration of this kernel; of those for Hopper with no other."""
    before = set(op.HOPPER)
    op.HOPPER.clear()
    op.HOPPER.update({kernel.removeprefix("hopper_")} - {kernel})
    try:
        with configs.forced({kernel: config}):
            yield
    finally:
        op.HOPPER.update(before)


def run(tensors, m):
    o, lse = attention(*tensors, m, return_lse=True, backend="triton")
    grads = torch.autograd.grad(o, tensors, torch.ones_like(o) * 0.1)
    return (o, lse, *grads)


def check(job) -> str:
    """Why a configuration cannot be used, or "" (compiles it on the way)."""
    shape, kernel, config = job
    try:
        torch.manual_seed(0)
        T = 576 if shape.rows == 64 else 640
        tensors, m = shape.problem(T, 2 if shape.rows > 16 else 16)
        with only(kernel, config):
            got = run(tensors, m)
        exact = [x.detach().double().requires_grad_() for x in tensors]
        o, lse = attention(*exact, m, return_lse=True, backend="reference")
        want = (o, lse, *torch.autograd.grad(o, exact, torch.ones_like(o) * 0.1))
        for a, b in zip(got, want, strict=True):
            error = float((a.double().nan_to_num(nan=1e9) - b).norm() / b.norm())
            if not error < (1e-2 if shape.itemsize == 2 else 1e-4):
                return f"error {error:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:80]
    return ""


def kernel_times(tensors, m, repeats: int = 3) -> dict[str, float]:
    """Microseconds of each kernel in one forward and backward pass."""
    run(tensors, m)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run(tensors, m)
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / repeats for e in profile.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=["128x128", "64x64", "64x128", "16x128"])
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("configs.json"))
    options = parser.parse_args()
    shapes = [Shape(*map(int, text.split("x"))) for text in options.shapes]
    jobs = [(s, k, c) for s in shapes for k in KERNELS for c in candidates(k, s)]
    # A process for each: an illegal access leaves a process without its GPU.
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), max_tasks_per_child=8
    ) as pool:
        verdicts = list(pool.map(check, jobs, chunksize=1))
    rows = []
    for shape in shapes:
        tensors, m = shape.problem(16384, 16)
        for kernel, name in KERNELS.items():
            times = []
            for (s, k, config), why in zip(jobs, verdicts, strict=True):
                if (s, k) != (shape, kernel):
                    continue
                if why:
                    print(f"{shape} {kernel} {config}: {why}")
                    continue
                with only(kernel, config):
                    found = kernel_times(tensors, m)
                times.append((found[name], config))
            times.sort(key=lambda x: x[0])
            for microseconds, config in times[:6]:
                print(f"{shape.rows}x{shape.D} {kernel} {microseconds:9.1f} us {config}")
            if times:
                most = 1 << 20 if kernel == "grad_kv" and shape.rows == 128 else shape.rows
                rows.append({
                    "kernel": kernel, "rows": most, "width": shape.D,
                    "itemsize": shape.itemsize, "config": times[0][1],
                })  # fmt: skip
    write(options.out, rows)


def write(path: Path, rows: list[dict]) -> None:
    """Put the rows in the table of the package, in place of those of the same shapes."""

    def key(row: dict) -> tuple:
        order = (*PORTABLE, "scatter_kv", *KERNELS).index(row["kernel"])
        return order, row["itemsize"], row["rows"], row["width"]

    merged = {key(row): row for row in [*configs.table(), *rows]}
    lines = ",\n".join("  " + json.dumps(merged[k]) for k in sorted(merged))
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
