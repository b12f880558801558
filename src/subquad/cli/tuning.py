"""Measure the kernels of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.shared import app, console, dtype_of


@app.command()
def tune(
    sizes: Annotated[str, typer.Option(help="Head widths K:V.")] = "64:64,128:128,256:256",
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="The table; the cache folder's if none.")] = None,
) -> None:
    """Measure this GPU's own table of kernel configurations for the recurrence; takes minutes."""
    from subquad.bench import tune as measure

    pairs = [tuple(int(n) for n in pair.split(":")) for pair in sizes.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"sizes must be pairs like 64:64,128:128, got {sizes!r}")
    screen = console()

    def tell(event: dict[str, Any]) -> None:
        if "kernel" in event and "microseconds" in event:
            screen.print(f"{event['kernel']}: {event['config']}, {event['microseconds']:.0f} us")

    path = measure.tune(
        sizes=[(K, V) for K, V in pairs], dtypes=[dtype_of(dtype)], out=out, progress=tell
    )
    screen.print(f"written to {path}")
