"""Block sizes, warps and stages of the recurrence's kernels, from a measured table.

Nothing is tuned while a program runs. ``configs.json`` beside this file holds, per GPU architecture
(``"sm90"``), entries that were timed and whose results were checked against float64 on such a GPU;
``subquad tune`` writes a table of the same form for another GPU into the user's cache folder. What
neither table names gets :func:`safe`, small enough for any GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

Config = Mapping[str, Any]
KERNELS = (
    "prepare",
    "scan",
    "scan_split",
    "scan_keep",
    "scan_back",
    "combine",
    "score_grads",
    "grads",
    "states",
    "outputs",
    "gradients",
    "step",
    "decode",
)
_forced: dict[str, Config] = {}  # of the process: the backward pass runs in other threads
_forcings = 0


def cache_file(arch: str) -> Path:
    """Where a user's own table lies: ``$XDG_CACHE_HOME/subquad/recurrence-<arch>.json``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "subquad" / f"recurrence-{arch}.json"


@cache
def arch(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def copy_engine(device: torch.device) -> bool:
    """Whether the GPU copies tiles by a tensor's description (Hopper's does)."""
    return arch(device) == "sm90"


@cache
def table(arch: str) -> dict[str, dict[str, Any]]:
    shipped = json.loads((Path(__file__).parent / "configs.json").read_text())
    own = cache_file(arch)
    try:
        mine = json.loads(own.read_text()) if own.is_file() else {}
    except (OSError, ValueError):
        mine = {}
    return {**shipped.get(arch, {}), **mine}


def width(size: int) -> int:
    """The power of two, at least 16, that holds ``size`` channels."""
    return max(16, 1 << (size - 1).bit_length())


def key_width(K: int) -> int:
    """The columns that a state of K key channels takes: at least 64, since products 32 columns
    wide come out wrong on Hopper (Triton 3.6, 4 warps)."""
    return max(64, width(K))


def key(kernel: str, *, decay: str, delta: bool, K: int, V: int, itemsize: int) -> str:
    """A shape class: equal keys share one configuration."""
    rule = "delta" if delta else "plain"
    return f"{kernel} {decay} {rule} K{width(K)} V{width(V)} {8 * itemsize}bit"


@contextmanager
def forced(configs: Mapping[str, Config]) -> Iterator[None]:
    """Inside the block these kernels run with these configurations, whatever the tables say."""
    global _forcings
    before = dict(_forced)
    _forced.update(configs)
    _forcings += 1
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forcings += 1


def forcings() -> int:
    """How often :func:`forced` changed what :func:`config` answers."""
    return _forcings


def config(
    kernel: str, arch: str, decay: str, delta: bool, K: int, V: int, itemsize: int
) -> Config:
    """The configuration of ``kernel`` (one of ``KERNELS``) for one shape class."""
    return _forced.get(kernel) or _config(kernel, arch, decay, delta, K, V, itemsize)


@cache
def _config(
    kernel: str, arch: str, decay: str, delta: bool, K: int, V: int, itemsize: int
) -> Config:
    name = key(kernel, decay=decay, delta=delta, K=K, V=V, itemsize=itemsize)
    found = table(arch).get(name)
    if found is None and kernel == "scan_split":
        return {**_config("scan", arch, decay, delta, K, V, itemsize), "fill": 1}
    if found is None and kernel == "scan_keep":
        return {}  # that of the forward pass
    return found or safe(kernel, K=K, V=V, itemsize=itemsize)


def safe(kernel: str, *, K: int, V: int, itemsize: int) -> Config:
    """Blocks that fit 100 KB of shared memory."""
    k, v = key_width(K), width(V)
    small = itemsize * k > 256  # float32 over 64, or half precision over 128 channels
    if kernel == "prepare":
        return {"BK": min(k, 64), "num_warps": 4 if itemsize == 2 else 8, "num_stages": 1}
    if kernel in ("scan", "scan_back", "outputs"):
        if itemsize == 4 and k > 128:  # more values, and ptxas spills 20 kB a thread
            return {"BK": 128, "BV": min(v, 16), "num_warps": 8, "num_stages": 1}
        BV = min(v, 32 if small else 64)
        return {"BV": BV, "num_warps": 8 if small else 4, "num_stages": 1}
    if kernel == "states":
        wide = 64 if itemsize == 2 else 32
        return {"BK": 64, "BV": min(v, wide), "num_warps": 4, "num_stages": 1, "fill": 2}
    if kernel == "gradients":
        return {"BK": 64, "BV": min(v, 64), "num_warps": 4, "num_stages": 1}
    if kernel == "score_grads":
        return {"BV": 64, "num_warps": 4, "num_stages": 1}
    if kernel == "grads":
        return {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 1}
    if kernel == "combine":
        return {"BV": min(v, 16), "num_warps": 8, "num_stages": 2 if k > 128 else 1}
    if kernel == "decode":
        return decoding(K, min(v, 32))
    return {"BV": min(v, 16), "num_warps": 4, "num_stages": 1}


def decoding(K: int, BV: int) -> Config:
    """BV values a program, 128 elements of the state a thread: on an H200 twice as fast as 64 and
    five times as fast as 512 (which spill)."""
    return {"BV": BV, "num_warps": max(1, min(8, width(K) * BV // 4096)), "num_stages": 1}
