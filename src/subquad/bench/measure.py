"""What a model costs over the length: time, memory, state; measured, not estimated."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from subquad.models.causal_lm import CausalLM


def over_lengths(
    model: CausalLM,
    lengths: Sequence[int],
    *,
    budget: float = 20.0,
    steps: int = 16,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prefill, decode, peak memory and state of one sequence at each length.

    Args:
        model: in eval mode, on the device to measure.
        lengths: rising; the rest is left out once a prompt is expected to take longer than
            ``budget`` seconds.
        steps: decoded tokens, of which the median time counts.
        progress: is told ``{"length": T}`` before each.

    Returns:
        Lists beside ``"lengths"``: ``"prefill"`` and ``"decode"`` in seconds, ``"peak"`` and
        ``"state"`` in bytes; and ``"formula"`` with the state by the mixers' own formulas.
    """
    out: dict[str, Any] = {name: [] for name in ("lengths", "prefill", "decode", "peak", "state")}
    formula: list[int] = []
    for T in lengths:
        if _expected(T, out["lengths"], out["prefill"]) > budget:
            break
        if progress is not None:
            progress({"length": T})
        tokens = _tokens(model, T)
        prefill, decode, state = _times(model, tokens, steps)
        out["lengths"].append(T)
        out["prefill"].append(prefill)
        out["decode"].append(decode)
        out["state"].append(state)
        out["peak"].append(peak_memory(partial(read, model, tokens), model.device))
        formula.append(model.state_bytes(T))
    out["formula"] = {"state": formula}
    return out


def _expected(T: int, lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds that a prompt of T tokens will take, as the last two lengths grew."""
    if not lengths:
        return 0.0
    power = 1.0
    if len(lengths) > 1:
        power = math.log(seconds[-1] / seconds[-2]) / math.log(lengths[-1] / lengths[-2])
    return seconds[-1] * (T / lengths[-1]) ** min(max(power, 1.0), 2.0)


def read(model: CausalLM, tokens: torch.Tensor, cache: Any = None) -> Any:
    """Feed tokens and return the cache; the head sees the last one alone."""
    with torch.inference_mode():
        return model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).past_key_values


def _times(model: CausalLM, tokens: torch.Tensor, steps: int) -> tuple[float, float, int]:
    """Seconds of a prefill (the best of a few), of a decoded token, and bytes of the state."""
    best, spent, cache = float("inf"), 0.0, None
    for _ in range(5):
        cache = None  # so that two states never stand side by side
        elapsed, cache = timed(lambda: read(model, tokens), tokens.device)
        best, spent = min(best, elapsed), spent + elapsed
        if spent > 1.0:
            break
    assert cache is not None
    held = cache.nbytes
    one = tokens[:, -1:]
    times = [timed(lambda: read(model, one, cache), tokens.device)[0] for _ in range(steps)]
    return best, median(times), held


def _tokens(model: CausalLM, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T)
    tokens = torch.randint(model.config.vocab_size, (1, T), generator=generator)
    return tokens.to(model.device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that ``run`` takes on the device, and what it returns."""
    _synchronize(device)
    start = time.perf_counter()
    out = run()
    _synchronize(device)
    return time.perf_counter() - start, out


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``run`` needs on top of what is there: the GPU's allocator, or resident memory.

    On the CPU a thread samples the process every half millisecond, after all freed memory has been
    given back to the system; very short peaks of a few hundred KiB can hide.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    import psutil

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    process, over = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not over.wait(0.0005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        kept = run()
        highest = max(highest, process.memory_info().rss)
        del kept
    finally:
        over.set()
        watcher.join()
    return highest - before
