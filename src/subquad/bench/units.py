"""Quantities as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_(n: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    n, unit = _scaled(n, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)
    return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.3g} {unit}"


def flops(n: float) -> str:
    """``2e9`` as ``2 GFLOP``."""
    n, unit = _scaled(n, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), 1000)
    return f"{n:.3g} {unit}"


def count(n: float) -> str:
    """``212000`` as ``212 k``."""
    n, unit = _scaled(n, ("", " k", " M", " G"), 1000)
    return f"{n:.3g}{unit}"


def seconds(n: float) -> str:
    """``0.0021`` as ``2.1 ms``."""
    if n >= 120:
        return f"{n / 60:.3g} min"
    if n >= 1:
        return f"{n:.3g} s"
    n, unit = _scaled(n * 1e6, ("us", "ms"), 1000)
    return f"{n:.3g} {unit}"


def _scaled(n: float, names: Sequence[str], base: int) -> tuple[float, str]:
    """``n`` in the first unit of ``names`` that keeps it below ``base``."""
    power = 0
    while abs(n) >= base and power < len(names) - 1:
        n, power = n / base, power + 1
    return n, names[power]
