"""Measure a table of configurations for this GPU's recurrence kernels.

Every candidate is compiled and checked against float64 in worker processes first; the right ones
are then timed one after another, alone on the GPU, by the profiler's kernel times in a forward and
backward pass. The table goes into the user's cache folder, where the kernels find it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.bench.recurrence import FORMS, Case, gate, results
from subquad.ops.backend import backend
from subquad.ops.recurrence import recurrence
from subquad.ops.recurrence.triton import configs
from subquad.ops.recurrence.triton.layout import goes_plain

PLAIN = ("states", "outputs", "gradients")  # without the delta rule, unless per channel
TUNED = ("prepare", "scan", "scan_back", "score_grads", "grads", "scan_split", *PLAIN)
SPLIT_TOKENS = 2100  # one sequence of one head this long is split
Progress = Callable[[dict[str, Any]], None]


def candidates(kernel: str, K: int, V: int, itemsize: int) -> Iterator[dict[str, int]]:
    """The configurations worth trying for one kernel."""
    k, v = configs.key_width(K), configs.key_width(V)
    if kernel == "prepare":
        tried = [
            {"BK": 64, "num_warps": 4, **more} for more in ({}, {"maxnreg": 168}, {"maxnreg": 128})
        ]
    elif kernel == "score_grads":
        tried = [{"BV": 64, "num_warps": w, "num_stages": s} for w, s in ((4, 1), (4, 2), (8, 1))]
    elif kernel == "scan_split":
        tried = [
            {"BV": 64, "num_warps": 4, "num_stages": s, "fill": f} for s, f in ((3, 1), (2, 2))
        ]
    elif kernel == "states":
        tried = [{"BK": b, "BV": 64, "num_warps": 4, "num_stages": s, "fill": f}
                 for b, s, f in ((128, 3, 2), (128, 2, 2), (64, 3, 2), (64, 1, 2))]  # fmt: skip
    elif kernel == "gradients":
        tried = [{"BK": 64, "BV": 64, "num_warps": 4, "num_stages": s, **more}
                 for s in (1, 2, 3) for more in ({}, {"maxnreg": 168})]  # fmt: skip
    elif kernel == "grads":
        tried = [{"BK": 64, "BV": 64, "num_warps": w, "num_stages": s}
                 for w, s in ((4, 1), (4, 2), (8, 1), (8, 2))]  # fmt: skip
    else:
        blocks = [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2)]
        tried = [{"BV": b, "num_warps": w, "num_stages": s} for b, w, s in blocks]
    for config in tried:
        if config.get("BK", 0) <= k and config.get("BV", 0) <= v:
            yield {"num_stages": 1, **config}


def _check(case: Case, kernel: str, config: Mapping[str, int]) -> str:
    """Why a configuration cannot be used, or ""; compiles it on the way."""
    try:
        with configs.forced({kernel: config}):
            if kernel in ("scan_split", "states"):
                gate(replace(case, B=1, H=1), "cuda", tokens=SPLIT_TOKENS)
            else:
                gate(case, "cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def cases(
    sizes: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], forms=FORMS
) -> Iterator[Case]:
    """The measured shape of every form and size: enough tokens and heads to fill a GPU."""
    for dtype in dtypes:
        for K, V in sizes:
            for decay, delta in forms:
                yield Case(
                    decay, delta, B=4, T=8192, H=16 * 128 // max(K, V), K=K, V=V, dtype=dtype
                )


def kernel_times(inputs: Mapping[str, Tensor | None], repeats: int = 3) -> dict[str, float]:
    """Microseconds that each kernel takes in one forward and backward pass."""
    with backend("triton"):
        results(recurrence, inputs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                results(recurrence, inputs)
            torch.cuda.synchronize()
    return {e.key: e.device_time_total / repeats for e in profile.key_averages()}


def tune(
    *,
    sizes: Iterable[tuple[int, int]] = ((64, 64), (128, 128), (256, 256)),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    forms: Iterable[tuple[str, bool]] = FORMS,
    kernels: Iterable[str] = TUNED,
    out: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Measure and write this GPU's own table; entries that it held for other shapes stay.

    Args:
        sizes: pairs (K, V); dtypes: of q, k and v; forms: pairs (decay, delta).
        out: the file to write; the user's cache folder where None.
        workers: processes that compile and check; the number of cores (at most 16) where None.
        progress: is told of every checked candidate and every chosen configuration.

    Returns:
        The path of the table.

    Raises:
        ValueError: without a CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU, found none")
    tell = progress or (lambda event: None)
    arch = configs.arch(torch.device("cuda", torch.cuda.current_device()))
    path = out or configs.cache_file(arch)
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    jobs = [
        (case, kernel, config)
        for case in cases(sizes, dtypes, forms)
        for kernel in kernels
        if (kernel in PLAIN) == goes_plain(case.decay, case.delta)
        for config in candidates(kernel, case.K, case.V, case.dtype.itemsize)
    ]
    right = _checked(jobs, workers or min(16, os.cpu_count() or 1), tell)
    for case in dict.fromkeys(job[0] for job in jobs):
        for kernel in kernels:
            mine = [c for a, n, c in right if a == case and n == kernel]
            best = _fastest(case, kernel, mine, tell)
            if best is None:
                continue
            config, microseconds = best
            name = configs.key(
                kernel, decay=case.decay, delta=case.delta, K=case.K, V=case.V,
                itemsize=case.dtype.itemsize,
            )  # fmt: skip
            found[name] = config
            tell({"kernel": name, "config": config, "microseconds": microseconds})
        _write(path, found)
    return path


def apart(run: Callable[..., str], *arguments: Any) -> str:
    """What ``run`` says, in a process of its own: an illegal access leaves a process without its
    GPU, and a compiler can end it."""
    context = get_context("spawn")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=_say, args=(said, run, *arguments))
    process.start()
    said.close()  # so that the end of the process ends the waiting
    try:
        answer: str = heard.recv()
    except EOFError:
        process.join()
        answer = f"its process ended with exit code {process.exitcode}"
    process.join()
    return answer


def _say(said: Any, run: Callable[..., str], *arguments: Any) -> None:
    said.send(run(*arguments))


def _checked(jobs: list, workers: int, tell: Progress) -> list:
    right = []
    with ThreadPoolExecutor(workers) as threads:
        waiting = {threads.submit(apart, _check, *job): job for job in jobs}
        for n, future in enumerate(as_completed(waiting), 1):
            case, kernel, config = waiting[future]
            refused = future.result()
            if not refused:
                right.append((case, kernel, config))
            tell({"checked": n, "of": len(jobs), "kernel": kernel, "case": case.name,
                  "config": config, "refused": refused})  # fmt: skip
    return right


def _fastest(
    case: Case, kernel: str, configurations: list, tell: Progress
) -> tuple[dict[str, int], float] | None:
    timed = []
    together: tuple[str, ...] = (kernel,)
    if kernel == "scan_split":
        case, together = replace(case, B=1, T=32768), ("scan", "scan_back", "combine")
    elif kernel == "states":
        case, together = replace(case, B=1, T=32768), ("states", "join")
    elif kernel == "outputs":  # a pass of the same kernel
        together = ("states",)
    inputs = case.draw("cuda")
    for config in configurations:
        with configs.forced({kernel: config}):
            times = kernel_times(inputs)
        timed.append((sum(times.get(name, 0.0) for name in together), config))
        tell({"timed": kernel, "case": case.name, "config": config, "microseconds": timed[-1][0]})
    if not timed:
        return None
    microseconds, config = min(timed, key=lambda pair: pair[0])
    return config, microseconds


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    os.replace(aside, path)
