"""The progress of training and of a comparison, in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from subquad.bench import units


class Display:
    """A bar for the whole, a bar for what runs, and a line that stays for each part done.

    Called with the events that :func:`subquad.bench.compare.compare` and ``train`` report.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._whole = self._progress.add_task("all", total=None, visible=False, note="")
        self._part = self._progress.add_task("", total=None, visible=False, note="")
        self._name, self._began, self._note = "", 0.0, ""

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._close()
            self._progress.update(self._whole, completed=self._progress.tasks[0].total)
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if "cell" in event:
            self._open(event)
        elif "length" in event:
            self._note = f"{event['length']:,} tokens"
            self._progress.update(self._part, advance=1, note=self._note)
        elif "step" in event:
            self._note = _note(event)
            self._progress.update(self._part, completed=event["step"], note=self._note)

    def _open(self, event: dict[str, Any]) -> None:
        self._close()
        self._progress.update(
            self._whole, total=event["cells"], completed=event["index"], visible=True
        )
        if event["done"]:
            self._progress.console.print(f"[dim]{escape(event['cell'])}: kept[/dim]")
        else:
            self.start(event["cell"], event["total"])

    def start(self, name: str, total: int) -> None:
        """Open the bar of a part of ``total`` steps."""
        self._name, self._began, self._note = name, time.perf_counter(), ""
        self._progress.reset(
            self._part, total=total, description=escape(name), visible=True, note=""
        )

    def _close(self) -> None:
        if self._name:
            took = units.seconds(time.perf_counter() - self._began)
            said = ", ".join(filter(None, (took, self._note)))
            self._progress.console.print(f"{escape(self._name)}: {said}")
        self._name = ""


def _note(event: dict[str, Any]) -> str:
    """Loss, score and speed of a training step, as far as the event has them."""
    parts = [f"{name} {event[name]:.3f}" for name in ("loss", "accuracy") if name in event]
    if event.get("tokens_per_second"):
        parts.append(f"{units.count(event['tokens_per_second'])} tokens/s")
    return ", ".join(parts)
