"""How large the kernels' steps are: a measured table, chosen by shape, never tuned at run time.

A row of ``configs.json`` holds for a kernel, programs of up to ``rows`` rows of queries, head dims
up to ``width`` (padded to a power of two) and elements of up to ``itemsize`` bytes. Each was
checked against float64 on an H200 before it was timed (``benchmarks/tune_sparse.py``). Kernels
named ``hopper_*`` are those written for that architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

# Not a context variable: the backward pass runs on a thread of autograd's own.
_forced: Mapping[str, Mapping[str, int]] = {}


@lru_cache(maxsize=1)
def table() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / "configs.json").read_text())


@contextmanager
def forced(configs: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Run the named kernels with these configurations inside the block, in the whole process."""
    global _forced
    before, _forced = _forced, configs
    try:
        yield
    finally:
        _forced = before


def forcing() -> bool:
    """Whether a block of :func:`forced` is open."""
    return bool(_forced)


def config(kernel: str, rows: int, width: int, itemsize: int) -> dict[str, int]:
    """``step`` (and the most ``queries``, or ``keys``, of a program), ``num_warps`` and
    ``num_stages`` (two at least for those of Hopper) of ``kernel``."""
    if kernel in _forced:
        return dict(_forced[kernel])
    return dict(_found(kernel, rows, width, itemsize))


@lru_cache(maxsize=256)
def _found(kernel: str, rows: int, width: int, itemsize: int) -> dict[str, int]:
    for row in table():
        limits = (rows, row["rows"]), (width, row["width"]), (itemsize, row["itemsize"])
        if row["kernel"] == kernel and all(asked <= limit for asked, limit in limits):
            return row["config"]
    raise ValueError(f"no configuration of {kernel} for {rows} rows of head dim {width}")
