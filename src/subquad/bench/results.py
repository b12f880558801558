"""What a comparison measured, on disk: results.json, always whole, one cell at a time."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass
class Results:
    """The cells of a comparison and where they are kept.

    Attributes:
        path: results.json.
        cells: ``"train/<entry>/<task>"`` and ``"speed/<entry>"`` to what was measured. Every cell
            has ``kind``, ``entry``, ``spec`` (all that it depends on) and its measurements.
        order: the entries in the order asked for.
        made: versions and machine.
    """

    path: Path
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results.json; empty results where there is none yet.

        Raises:
            ValueError: for a file that is not a comparison's.
        """
        if not path.exists():
            return cls(path)
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}); remove it to start anew") from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(
                f"{path} must be results of version {VERSION}; remove it to start anew"
            )
        return cls(path, data["cells"], data["order"], data["made"])

    def save(self) -> None:
        data = {"version": VERSION, "made": self.made, "order": self.order, "cells": self.cells}
        write_json(self.path, data)

    def done(self, name: str, spec: Any) -> bool:
        """Whether the cell is there and was measured for just this ``spec``."""
        return name in self.cells and self.cells[name]["spec"] == json.loads(json.dumps(spec))

    def trained(self, task: str | None = None) -> Iterator[dict[str, Any]]:
        """The training cells, of one task where given, in the order of the entries."""
        for entry in self.order:
            for cell in self.cells.values():
                wanted = (cell["kind"], cell["entry"]) == ("train", entry)
                if wanted and task in (None, cell["task"]):
                    yield cell

    def timed(self) -> Iterator[dict[str, Any]]:
        """The speed cells, in the order of the entries."""
        return (c for e in self.order if (c := self.cells.get(f"speed/{e}")) is not None)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell["task"] for cell in self.trained()))


@dataclass(frozen=True)
class Cells:
    """Measurements in a folder, a file each, so that several processes can share the work: what is
    there is not measured again."""

    folder: Path

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def __getitem__(self, name: str) -> dict[str, Any]:
        """What was kept, and as ``made`` where and when it was measured."""
        return json.loads(self._path(name).read_text())

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Write and print a measurement."""
        print(name, "|", dict(found), flush=True)
        write_json(self._path(name), {"made": machine(), **found})


def write_json(path: Path, data: Any) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_section(page: Path, name: str, title: str, body: str) -> None:
    """Put ``body`` under ``title`` in a Markdown page, between the marks of the section ``name``;
    the rest of the page stays as it is."""
    start, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
    text = page.read_text()
    if start not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{start}\n{end}\n"
    before, _, rest = text.partition(start)
    page.write_text(f"{before}{start}\n\n{body.strip()}\n\n{end}{rest.partition(end)[2]}")


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """``{entry: {column: value}}`` as the lines of a Markdown table and an empty one; a column that
    an entry lacks stays blank."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for entry, row in rows.items():
        lines.append(f"| {entry} | {' | '.join(_shown(row.get(c, '')) for c in columns)} |")
    return [*lines, ""]


def _shown(value: str | float) -> str:
    """Whole numbers in full, others in three digits."""
    if isinstance(value, str):
        return value
    whole = isinstance(value, int) or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What the figures were taken on, and when."""
    import torch

    import subquad

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "device": gpu or f"{_cpu()}, {torch.get_num_threads()} threads",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
