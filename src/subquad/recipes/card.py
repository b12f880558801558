"""The model card of a converted model: what was done, and what it lost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
MARKS = ("<!-- eval begins -->", "<!-- eval ends -->")


def write_card(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write ``README.md``: the recipe, its stages and losses, the layers kept."""
    asked = record["identity"]
    lines = [
        f"# {Path(record['model']).name}, converted with {asked['recipe']}",
        "",
        f"Softmax attention replaced by `{asked['mixer']}`; layers kept: {_kept(record)}.",
        "Load it with `AutoModelForCausalLM.from_pretrained` after `import subquad`.",
        "",
        "| stage | tokens | loss at first | at the end |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, stage in record["stages"].items():
        first, last = stage["history"][0]["loss"], stage["history"][-1]["loss"]
        lines.append(f"| {name} | {stage['tokens']:,} | {first:.4g} | {last:.4g} |")
    if "scores" in record:
        lines += ["", "| layer | KL, repeated text | KL, plain text |", "| ---: | ---: | ---: |"]
        for l, found in record["scores"].items():
            lines.append(f"| {l} | {found['recall']:.4g} | {found['plain']:.4g} |")
    lines += ["", *MARKS, ""]
    return _write(folder / CARD, "\n".join(lines))


def write_eval(folder: Path, table: Sequence[str]) -> Path:
    """Put a table between the marks of the card."""
    path = folder / CARD
    text = path.read_text() if path.is_file() else f"# {folder.name}\n"
    if MARKS[0] not in text:
        text += "\n" + "\n".join(MARKS) + "\n"
    head, _, rest = text.partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    return _write(path, "\n".join([head + MARKS[0], "", *table, "", MARKS[1] + tail]))


def _kept(record: Mapping[str, Any]) -> str:
    kept = record.get("kept", record["identity"]["keep"])
    return ", ".join(map(str, kept)) if kept else "none"


def _write(path: Path, text: str) -> Path:
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)
    return path
