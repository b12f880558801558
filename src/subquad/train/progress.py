"""Progress of training where nobody asked to be told: a bar on a terminal, else lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Progress = Callable[[dict[str, Any]], None]
LINE_EVERY = 10.0  # seconds


def display(steps: int) -> AbstractContextManager[Progress]:
    """What to tell of a run of so many steps."""
    if not sys.stderr.isatty():
        return Lines(steps)
    try:
        from rich.console import Console

        from subquad.bench.progress import Display
    except ImportError:  # rich comes with an extra
        return Lines(steps)
    bar = Display(Console(stderr=True))
    bar.start("train", steps)
    return bar


class Lines:
    """A line on stderr every ten seconds, and for the last step."""

    def __init__(self, steps: int) -> None:
        self._steps, self._said = steps, -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.perf_counter()
        if now - self._said < LINE_EVERY and event["step"] < self._steps:
            return
        self._said = now
        seen = [f"{name} {value:.4g}" for name, value in event.items() if name != "step"]
        print(f"step {event['step']}/{self._steps}: {', '.join(seen)}", file=sys.stderr)
