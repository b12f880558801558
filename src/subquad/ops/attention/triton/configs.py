"""How large the kernels' steps are: a measured table, chosen by head dim, never tuned at run time.

Rows of ``configs.json``: kernel, the largest head dim (padded to a power of two) and the bytes of
an element they hold for, then BN or BM, warps and stages. Each was checked against float64 on the
GPU it names before it was timed (``benchmarks/sparse.py``).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@lru_cache(maxsize=1)
def table() -> list[dict[str, Any]]:
    return json.loads((Path(__file__).parent / "configs.json").read_text())


@lru_cache(maxsize=256)
def config(kernel: str, rows: int, width: int, itemsize: int, device: str) -> dict[str, int]:
    """The step, ``num_warps`` and ``num_stages`` of ``kernel`` for programs of ``rows`` rows."""
    for row in table():
        if (
            row["kernel"] == kernel
            and rows <= row["rows"]
            and width <= row["width"]
            and itemsize <= row["itemsize"]
        ):
            return {"step": row["step"], "num_warps": row["warps"], "num_stages": row["stages"]}
    raise ValueError(f"no configuration of {kernel} for head dim {width}")


@lru_cache(maxsize=8)
def processors(index: int | None) -> int:
    """Multiprocessors of the GPU; 8 where the kernels are interpreted."""
    if not torch.cuda.is_available():
        return 8
    return torch.cuda.get_device_properties(index or 0).multi_processor_count
