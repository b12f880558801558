"""Measure the kernels of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.shared import app, console, dtype_of


@app.command()
def tune(
    sizes: Annotated[str, typer.Option(help="Head widths K:V.")] = "64:64,128:128,256:256",
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "bfloat16",
    forms: Annotated[
        str, typer.Option(help="Decay and rule, e.g. head:delta,channel; all if none.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The table; the cache folder's if none.")] = None,
) -> None:
    """Measure this GPU's own table of kernel configurations for the recurrence; takes minutes."""
    from subquad.bench import tune as measure
    from subquad.bench.recurrence import FORMS

    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", sizes):
        raise ValueError(f"sizes must be pairs like 64:64,128:128, got {sizes!r}")
    pairs = [tuple(int(n) for n in pair.split(":")) for pair in sizes.split(",")]
    named = {f"{decay}:delta" if delta else decay: (decay, delta) for decay, delta in FORMS}
    asked = [name for name in forms.split(",") if name] or list(named)
    if unknown := [name for name in asked if name not in named]:
        raise ValueError(f"forms must be among {', '.join(named)}, got {unknown[0]!r}")
    screen = console()

    def tell(event: dict[str, Any]) -> None:
        if "checked" in event and (event["refused"] or event["checked"] % 10 == 0):
            wrong = f", {event['kernel']} {event['config']} refused" if event["refused"] else ""
            screen.print(f"checked {event['checked']} of {event['of']}{wrong}")
        if "kernel" in event and "microseconds" in event:
            screen.print(f"{event['kernel']}: {event['config']}, {event['microseconds']:.0f} us")

    path = measure.tune(
        sizes=[(K, V) for K, V in pairs],
        dtypes=[dtype_of(dtype)],
        forms=[named[name] for name in asked],
        out=out,
        progress=tell,
    )
    screen.print(f"written to {path}")
