"""Seconds of the first call of operations with kernels, where nothing has been compiled.

    python benchmarks/first_call.py --cores 2 16 --out benchmarks/results/first_call.json

Every call has a process of its own, an empty compilation cache and so many cores of its own; as
many calls run at once as there are cores for. Counted is from
before the first forward pass until the end of it (``forward``), and until the end of the backward
pass (``both``), the import of the kernels included; the start of Python and of CUDA is not. What a
first call leaves to be compiled is waited for by the second (``again``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor

import subquad
from subquad import mask
from subquad.bench import kernel_attention, recurrence
from subquad.bench.results import machine, write_json
from subquad.ops.attention import attention
from subquad.ops.kernel_attention import mixed_attention
from subquad.ops.probe import probe as probed
from subquad.ops.recurrence import recurrence as recurrent

ROOT = Path(__file__).resolve().parents[1]
BATCH = {"B": 4, "T": 8192, "H": 16, "K": 128, "V": 128}
FORMS = {
    "linear attention": ("none", False),
    "delta rule": ("none", True),
    "head decay": ("head", False),
    "gated delta rule": ("head", True),
    "channel decay": ("channel", False),
    "KDA": ("channel", True),
}
Call = tuple[Callable[..., Tensor], dict[str, Any]]


def _form(name: str, **sizes: int) -> Call:
    inputs = recurrence.Case(*FORMS[name], **{**BATCH, **sizes}).draw("cuda")
    return lambda **x: recurrent(**x, backend="triton")[0], inputs


def _window() -> Call:
    shape = (1, 8192, 16, 128)
    inputs = {n: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
    kept = mask.causal() & mask.window(1023)
    return lambda **x: attention(**x, mask=kept, backend="triton"), inputs


def _mixed() -> Call:
    case = kernel_attention.Case(
        T=2048, H=8, G=8, K=64, V=64, F=64, window=64, dtype=torch.bfloat16
    )
    tensors, rest = case.tensors("cuda")
    inputs = {n: t.cuda() for n, t in tensors.items()}
    return lambda **x: mixed_attention(**x, **rest, backend="triton")[0], inputs


def _probe() -> Call:
    shape = (1, 8192, 16, 128)
    inputs = {n: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for n in "qkvr"}
    return lambda **x: probed(**x, backend="triton"), inputs


def _layer(key: str, **options: int) -> Call:
    mixer = subquad.create_mixer(key, dim=1024, **options).to("cuda", torch.bfloat16)
    x = torch.randn(2, 4096, 1024, device="cuda", dtype=torch.bfloat16)
    return lambda x: mixer(x)[0], {"x": x}


ROWS: dict[str, Callable[[], Call]] = {
    **{name: lambda name=name: _form(name) for name in FORMS},
    "gated delta rule, split": lambda: _form("gated delta rule", B=1, T=32768),
    "KDA, 256 channels": lambda: _form("KDA", H=4, K=256, V=256),
    "window attention": _window,
    "mixed attention": _mixed,
    "probe": _probe,
    "Gated DeltaNet, a layer": lambda: _layer("gated_deltanet", heads=6, head_dim=128),
    "Kimi Delta Attention, a layer": lambda: _layer("kimi_linear", heads=8, head_dim=128),
}


def first(name: str, trains: bool) -> dict[str, float]:
    """The row, in this process."""
    run, inputs = ROWS[name]()
    live = []
    if trains:
        live = [
            t.requires_grad_() for t in inputs.values() if t is not None and t.is_floating_point()
        ]
    found = {}

    def call() -> None:
        start = time.perf_counter()
        with torch.set_grad_enabled(trains):
            out = run(**inputs)
        torch.cuda.synchronize()
        found["forward"] = time.perf_counter() - start
        if trains:
            # From a number, as training does: PyTorch imports sympy, seconds, to look at a gradient
            # that is given.
            torch.autograd.grad(out.float().sum(), live)
            torch.cuda.synchronize()
            found["both"] = time.perf_counter() - start

    torch.cuda.synchronize()
    cpu = sum(os.times()[:4])
    call()
    once = {**found, "cpu": sum(os.times()[:4]) - cpu}
    call()
    return {**once, "again": found["both" if trains else "forward"]}


def cold(name: str, cores: list[int], trains: bool) -> dict[str, Any]:
    """:func:`first` in a process of its own, bound to ``cores``."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--row", name, *(["--trains"] if trains else [])],
            env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONFAULTHANDLER": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{name}: rc {done.returncode}: {done.stdout}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, nargs="+", default=[2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/first_call.json")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--trains", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        print(json.dumps(first(asked.row, asked.trains)), flush=True)
        # PyTorch's threads may still be letting go of the graph: to exit meanwhile can abort.
        os._exit(0)
    mine = sorted(os.sched_getaffinity(0))
    if max(asked.cores) > len(mine):
        raise SystemExit(f"--cores must be at most {len(mine)}, got {asked.cores}")
    data: dict[str, Any] = {"made": machine(), "rows": {name: {} for name in asked.rows}}
    print(f"{'seconds':26} cores  inference, again  training (cpu), again")
    for count in asked.cores:
        free: Queue[list[int]] = Queue()
        for n in range(len(mine) // count):
            free.put(mine[n * count : (n + 1) * count])

        def measure(name: str, free=free) -> dict[str, Any]:
            cores = free.get()
            found = {
                kind: cold(name, cores, kind == "training") for kind in ("inference", "training")
            }
            free.put(cores)
            return found

        with ThreadPoolExecutor(free.qsize()) as pool:
            for name, found in zip(asked.rows, pool.map(measure, asked.rows), strict=True):
                data["rows"][name][str(count)] = found
                write_json(asked.out, data)
                infers, trains = found["inference"], found["training"]
                print(
                    f"{name:26} {count:5} {infers['forward']:10.1f} {infers['again']:6.1f} "
                    f"{trains['both']:9.1f} ({trains['cpu']:.1f}) {trains['again']:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
