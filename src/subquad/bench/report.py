"""The comparison as one self-contained page and as a table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.bench import figures, units
from subquad.bench.results import Results

if TYPE_CHECKING:
    import plotly.graph_objects as go

_STYLE = """
:root { color-scheme: light dark; --text: #22262b; --soft: #66707a; --line: #d9dde2;
  --back: #fdfdfc; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e8; --soft: #9aa3ad; --line: #343a41;
  --back: #16191c; } }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .2rem; }
p { margin: 0 0 .8rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 1.4rem 0; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .45rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.best { font-weight: 700; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .55em; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .85rem; }
"""

# The figures' text follows the reader's light or dark theme.
_THEME = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.querySelectorAll(".plotly-graph-div").forEach(div =>
  Plotly.relayout(div, {"font.color": dark.matches ? "#b9c0c7" : "#4a525a",
    "hoverlabel.bgcolor": dark.matches ? "#24292e" : "#ffffff"}));
dark.addEventListener("change", paint);
paint();
"""


# What is timed over the length: its key in a cell, its title, how a value is written.
MEASURED = (
    ("state", "state", units.bytes_),
    ("prefill", "prefill", units.seconds),
    ("decode", "a token", units.seconds),
    ("peak", "peak memory", units.bytes_),
)


@dataclass(frozen=True)
class Section:
    """A figure with its heading and a sentence on how to read it."""

    title: str
    text: str
    figure: go.Figure


@dataclass(frozen=True)
class Column:
    """One column of the summary: a value per entry, how it is written, and which is best."""

    title: str
    values: dict[str, float]
    shown: dict[str, str]
    best: str | None


def sections(results: Results) -> Iterator[Section]:
    """The figures that the results have measurements for."""
    for task in results.tasks:
        cell = next(results.trained(task))
        better = "higher" if cell["higher_is_better"] else "lower"
        images = not any(c["state_bytes"] for c in results.trained(task))
        paid = (
            "image of {:,} tokens costs" if images else "sequence of {:,} tokens leaves in memory"
        )
        yield Section(
            f"{task}: {cell['metric']} against {'work' if images else 'state'}",
            f"What one {paid.format(cell['tokens'])}, and what the model made of it after "
            f"{cell['steps']:,} steps; {better} is better, further left is cheaper. "
            "Below the dotted front lies what another beats on both counts.",
            figures.quality(results, task),
        )
        yield Section(
            f"{task}: loss while training",
            "Equal parameters, equal steps, the same batches in the same order. Each point is the "
            "mean of a fiftieth of the steps.",
            figures.curves(results, task),
        )
    if not any(cell["lengths"] for cell in results.timed()):
        return
    yield _cost(
        results,
        "state",
        "State against length",
        "What decoding keeps for one sequence: measured (dots) and by the formula (lines).",
    )
    yield _cost(
        results, "prefill", "Reading a prompt", "One forward pass over a prompt of this length."
    )
    yield _cost(
        results, "decode", "Writing a token", "One decoding step after a prompt of this length."
    )
    yield _cost(
        results, "peak", "Peak memory", "What reading the prompt needs on top of the weights."
    )


def _cost(results: Results, key: str, title: str, text: str) -> Section:
    """A measurement over the length, and in words where entries overtake the first one."""
    seconds = key in ("prefill", "decode")
    verb = "faster" if seconds else "smaller"
    figure = figures.over_length(
        results,
        key,
        "time" if seconds else "memory",
        units.seconds if seconds else units.bytes_,
        figures.seconds_axis if seconds else figures.bytes_axis,
        verb,
    )
    first = next(results.timed())["entry"]
    marks = figures.crossings(results, key)
    where = ", ".join(f"{entry} from {T:,.0f} tokens" for entry, T in marks.items())
    rings = f" Rings: {verb} than {first} for good: {where}." if where else ""
    return Section(title, text + rings, figure)


def columns(results: Results) -> list[Column]:
    """The summary, a column a figure, the values keyed by entry."""
    out = []
    parameters = {c["entry"]: c["parameters"] for c in results.trained()}
    out.append(_column("parameters", parameters, units.count, None))
    for task in results.tasks:
        cells = list(results.trained(task))
        score = {c["entry"]: c["score"] for c in cells}
        higher = cells[0]["higher_is_better"]
        out.append(_column(f"{task} {cells[0]['metric']}", score, "{:.3f}".format, higher))
        state = {c["entry"]: c["state_bytes"] for c in cells}
        if any(state.values()):
            out.append(_column(f"{task} state", state, units.bytes_, False))
        else:
            work = {c["entry"]: c["flops"] for c in cells}
            out.append(_column(f"{task} FLOPs", work, units.count, False))
    timed = [cell for cell in results.timed() if cell["lengths"]]
    if timed:
        T = min(cell["lengths"][-1] for cell in timed)
        for key, title, shown in MEASURED:
            values = {c["entry"]: c[key][c["lengths"].index(T)] for c in timed}
            out.append(_column(f"{title} at {T:,}", values, shown, False))
    return out


def timings(results: Results) -> Any:
    """What was timed as a rich table: a row a measurement and length, a column an entry."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    cells = list(results.timed())
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "tokens", *(plain(cell["entry"]) for cell in cells)):
        out.add_column(title, justify="right" if title else "left")
    lengths = sorted({T for cell in cells for T in cell["lengths"]})
    for key, title, shown in MEASURED:
        for T in lengths:
            values = [
                shown(cell[key][cell["lengths"].index(T)]) if T in cell["lengths"] else "-"
                for cell in cells
            ]
            out.add_row(
                title if lengths[0] == T else "", f"{T:,}", *values, end_section=lengths[-1] == T
            )
    return out


def _column(title: str, values: dict[str, float], shown: Any, higher: bool | None) -> Column:
    best = None
    if higher is not None and values:
        best = (max if higher else min)(values, key=lambda entry: values[entry])
    return Column(title, values, {e: shown(v) for e, v in values.items()}, best)


def table(results: Results) -> Any:
    """The summary as a rich table: a row a figure, a column an entry, the best in green."""
    from rich import box
    from rich.markup import escape as plain
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("")
    for entry in results.order:
        out.add_column(plain(entry), justify="right")
    for column in columns(results):
        shown = {entry: column.shown.get(entry, "-") for entry in results.order}
        if column.best in shown:
            shown[column.best] = f"[bold green]{shown[column.best]}[/]"
        out.add_row(column.title, *shown.values())
    return out


def write(results: Results, path: Path) -> Path:
    """Write the page, plotly's script inlined, aside and renamed."""
    return write_page(html(results), path)


def write_page(text: str, path: Path) -> Path:
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def html(results: Results) -> str:
    """The page as a string."""
    entries = ", ".join(results.order)
    lead = f"{entries}: trained alike, then timed over the length."
    return page(results, _title(results), lead, columns(results), sections(results))


def page(
    results: Results,
    title: str,
    lead: str,
    summary: Sequence[Column],
    figures: Iterable[Section],
) -> str:
    """A page of a heading, a table with a row an entry, and figures."""
    from plotly.offline import get_plotlyjs

    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(lead)}</p>",
        f'<div class="scroll">{_summary(results, summary)}</div>',
    ]
    for i, section in enumerate(figures):
        drawn = section.figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{i}",
            config={
                "displaylogo": False,
                "responsive": True,
                "modeBarButtons": [["toImage", "zoom2d", "resetScale2d"]],
            },
        )
        body.append(
            f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{drawn}</section>"
        )
    made = " · ".join(f"{key} {value}" for key, value in results.made.items())
    body.append(f"<footer>{escape(made)}</footer>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><main>{''.join(body)}</main><script>{_THEME}</script></body></html>\n"
    )


def _title(results: Results) -> str:
    return f"Who recalls what at what cost: {' and '.join(results.tasks) or 'speed'}"


def _summary(results: Results, shown: Sequence[Column]) -> str:
    colour = figures.colours(results)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in shown)
    rows = []
    for entry in results.order:
        dot = f'<span class="dot" style="background:{colour[entry]}"></span>'
        cells = "".join(
            f"<td{' class=best' if column.best == entry else ''}>"
            f"{escape(column.shown.get(entry, '–'))}</td>"
            for column in shown
        )
        rows.append(f"<tr><td>{dot}{escape(entry)}</td>{cells}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
