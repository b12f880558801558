"""What a kernel's tiles leave of a neighborhood's saving, told before anything runs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from subquad.mask import neighborhood
from subquad.mask.simulate import MODES, simulate

# Tiles of 128 tokens where none is given, by the number of axes.
TILES = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}
_KNOWN = ("grid", "window", "stride", "dilation", "causal", "tile", "key_tile")


def report(options: dict[str, Any]) -> Table:
    """The bounds on the speed-up over dense attention for a geometry.

    Args:
        options: grid, window, stride, dilation, causal, tile and key_tile, each a number or
            ``"30x48x80"``, one number per axis.

    Raises:
        ValueError: for unknown options and geometries that do not fit.
    """
    unknown = set(options) - set(_KNOWN)
    if unknown or not {"grid", "window"} <= set(options):
        raise ValueError(f"a neighborhood is grid=,window= and any of {_KNOWN}, got {options}")
    given = {name: sizes(name, value) for name, value in options.items()}
    grid = given.pop("grid")
    tile = given.pop("tile", None) or TILES.get(len(grid), (128,))
    key_tile = given.pop("key_tile", None)
    causal = [bool(flag) for flag in given.pop("causal", (0,))]

    def of(name: str) -> int | tuple[int, ...]:
        row = given.get(name, (1,))
        return row[0] if len(row) == 1 else row

    mask = neighborhood(
        grid,
        of("window"),
        of("stride"),
        of("dilation"),
        causal[0] if len(causal) == 1 else causal,
    )
    found = {mode: simulate(mask.axes, tile, key_tile, mode) for mode in MODES}
    bound = found["static"].flop_bound
    table = Table(
        "tiles", "speed-up", "slowest tile", "visits", "of", "wasted",
        title=f"{'x'.join(map(str, grid))}: at most {bound:.2f}x by arithmetic",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    names = {
        "static": f"{'x'.join(map(str, tile))} on the grid",
        "dynamic": "the same, keys cut from the window's start",
        "flat": "as many tokens of the flattened sequence",
    }
    for mode, s in found.items():
        table.add_row(
            names[mode],
            f"{s.bound:.2f}x",
            f"{s.slowest_bound:.2f}x",
            f"{s.mean:.2f} (most {s.most})",
            str(s.dense),
            f"{s.wasted:.0%}",
        )
    return table


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """``30`` or ``"30x48x80"`` as a tuple of sizes; ``True`` is 1."""
    parts = value.split("x") if isinstance(value, str) else [value]
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers joined by x, got {value!r}") from None
