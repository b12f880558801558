"""Pictures of an analysis, with matplotlib and no screen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure of panels side by side, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need the extra viz: pip install 'subquad[viz]'") from None
    made = Figure(figsize=(5 * panels, 4), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def save(made: Any, path: Path) -> Path:
    """Write aside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    made.savefig(aside, format=path.suffix[1:], dpi=110)
    os.replace(aside, path)
    return path
