"""A study of policies as a table and as a page: quality against what was attended to and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from subquad.bench import figures, report, units
from subquad.bench.policies import FULL, rows
from subquad.bench.results import Results

if TYPE_CHECKING:
    import plotly.graph_objects as go

Cell = dict[str, Any]


class Budget(NamedTuple):
    """What a policy may save, as a share of the model without one."""

    title: str
    text: str
    of: Callable[[Cell, Cell], float]


BUDGETS = (
    Budget(
        "pairs of the prompt",
        "Pairs of tokens that attend to each other while the prompt is read, of all that may.",
        lambda cell, full: cell["attended"]["prefill"],
    ),
    Budget(
        "keys read at a step",
        "Keys that a written token attends to, of all before it.",
        lambda cell, full: cell["attended"]["decode"],
    ),
    Budget(
        "cache",
        "Bytes that the keys and values take behind the prompt, of those of the whole cache.",
        lambda cell, full: cell["cache"] / full["cache"],
    ),
)
COLUMNS = (
    ("pairs", lambda c: f"{c['attended']['prefill']:.1%}"),
    ("read a step", lambda c: f"{c['attended']['decode']:.1%}"),
    ("prompt", lambda c: units.seconds(c["prefill"])),
    ("a token", lambda c: units.seconds(c["decode"])),
    ("peak", lambda c: units.bytes_(c["peak"])),
    ("cache", lambda c: units.bytes_(c["cache"])),
)


def table(results: Results) -> Any:
    """A row for every entry, task and length, as a rich table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("tokens", "task", "policy", "score", *(title for title, _ in COLUMNS)):
        out.add_column(title, justify="left" if title in ("task", "policy") else "right")
    cells, before = list(rows(results)), None
    for i, cell in enumerate(cells):
        head = (cell["length"], cell["task"])
        last = i + 1 == len(cells) or (cells[i + 1]["length"], cells[i + 1]["task"]) != head
        shown = [f"{head[0]:,}", f"{head[1]}, {cell['metric']}"] if head != before else ["", ""]
        values = [write(cell) for _, write in COLUMNS]
        score = f"{cell['score']:.3f}"
        out.add_row(*shown, escape(cell["entry"]), score, *values, end_section=last)
        before = head
    return out


def write(results: Results, path: Path) -> Path:
    """Write the page, plotly's script inlined."""
    policies = ", ".join(entry for entry in results.order if entry != FULL)
    lead = f"A pretrained model as it is and with {policies}: the same prompts for all."
    title = "What each policy costs in quality, and what it saves"
    return report.write_page(
        report.page(results, title, lead, _summary(results), _sections(results)), path
    )


def _summary(results: Results) -> list[report.Column]:
    """Scores at every length, and the costs at the longest."""
    out = []
    cells = list(rows(results))
    for T, task in dict.fromkeys((c["length"], c["task"]) for c in cells):
        own = [c for c in cells if (c["length"], c["task"]) == (T, task)]
        values = {c["entry"]: c["score"] for c in own}
        shown = {entry: f"{value:.3f}" for entry, value in values.items()}
        out.append(report.Column(f"{task} {own[0]['metric']} at {T:,}", values, shown, None))
    longest = [c for c in cells if c["length"] == cells[-1]["length"]]
    last = {c["entry"]: c for c in longest if c["task"] == longest[0]["task"]}
    for title, written in COLUMNS:
        shown = {entry: written(cell) for entry, cell in last.items()}
        out.append(report.Column(title, {}, shown, None))
    return out


def _sections(results: Results) -> Iterator[report.Section]:
    """Quality against each budget that any policy saves, by task and length."""
    cells = list(rows(results))
    for T, task in dict.fromkeys((c["length"], c["task"]) for c in cells):
        own = [c for c in cells if (c["length"], c["task"]) == (T, task)]
        full = next(c for c in own if c["entry"] == FULL)
        for budget in BUDGETS:
            points = {c["entry"]: budget.of(c, full) for c in own}
            if min(points.values()) > 0.99:
                continue
            better = "higher" if full["higher_is_better"] else "lower"
            yield report.Section(
                f"{task} at {T:,} tokens: {full['metric']} against {budget.title}",
                f"{budget.text} {better.capitalize()} is better, further left is cheaper; the "
                "dotted line is the model without a policy.",
                _curves(own, points, full, budget.title),
            )


def _curves(cells: list[Cell], points: dict[str, float], full: Cell, title: str) -> go.Figure:
    """A line for every policy, through its budgets."""
    figure = figures.blank(f"{title}, share", full["metric"])
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["entry"] != FULL:
            names = [part.partition(":")[0] for part in cell["entry"].split("+")]
            lines.setdefault(" + ".join(names), []).append(cell)
    for i, (name, own) in enumerate(lines.items()):
        own.sort(key=lambda cell: points[cell["entry"]])
        figure.add_scatter(
            x=[points[cell["entry"]] for cell in own],
            y=[cell["score"] for cell in own],
            name=name,
            mode="lines+markers",
            marker={"size": 9, "color": figures.COLOURS[i % len(figures.COLOURS)]},
            line={"width": 2},
            text=[cell["entry"] for cell in own],
            hovertemplate="%{y:.3f} at %{x:.1%}<br>%{text}<extra></extra>",
        )
    figure.add_hline(y=full["score"], line={"color": figures.FRONT, "dash": "dot", "width": 1.5})
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    if full["metric"] == "accuracy":
        figure.update_yaxes(range=[-0.03, 1.08], tickformat=".0%")
    return figure
