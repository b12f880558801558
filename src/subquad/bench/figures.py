"""The figures of the report, each a function of the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from subquad.bench import units
from subquad.bench.results import Results

# Of middle lightness: readable on white and on black. One colour an entry, in every figure.
COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#c9a227", "#9c755f",
    "#d37295", "#86a33b",
)  # fmt: skip
FRONT = "#8c8c8c"


def colours(results: Results) -> dict[str, str]:
    return {entry: COLOURS[i % len(COLOURS)] for i, entry in enumerate(results.order)}


def front(points: Iterable[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The Pareto front of (cost, quality) points: none cheaper is as good."""
    out: list[tuple[float, float]] = []
    sign = 1 if higher else -1
    for cost, quality in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not out or sign * quality > sign * out[-1][1]:
            out.append((cost, quality))
    return out


def crossing(x: Sequence[float], a: Sequence[float], b: Sequence[float]) -> float | None:
    """Where ``b`` falls below ``a`` and stays there, by interpolation between logarithms."""
    gap = [math.log(v) - math.log(u) for u, v in zip(a, b, strict=True)]
    if not gap or gap[-1] >= 0:
        return None
    last = max((i for i, g in enumerate(gap) if g >= 0), default=None)
    if last is None:
        return None
    share = gap[last] / (gap[last] - gap[last + 1])
    return x[last] * (x[last + 1] / x[last]) ** share  # exactly x[last] where they are equal there


def quality(results: Results, task: str) -> go.Figure:
    """The task's score against the state that it was reached with (the work, for an image, which
    leaves none), and the Pareto front."""
    cells = list(results.trained(task))
    metric, higher = cells[0]["metric"], cells[0]["higher_is_better"]
    colour = colours(results)
    images = not any(c["state_bytes"] for c in cells)
    key = "flops" if images else "state_bytes"
    label = "forward pass of one image, FLOPs" if images else "state of one sequence, bytes"
    figure = blank(label, metric)
    edge = front([(c[key], c["score"]) for c in cells], higher)
    figure.add_scatter(
        x=[x for x, _ in edge],
        y=[y for _, y in edge],
        name="Pareto front",
        mode="lines",
        line={"color": FRONT, "dash": "dot", "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
    )
    for i, cell in enumerate(sorted(cells, key=lambda c: c[key])):
        held = f"{units.count(cell[key])} FLOPs" if images else units.bytes_(cell[key])
        figure.add_scatter(
            x=[cell[key]],
            y=[cell["score"]],
            name=cell["entry"],
            mode="markers+text",
            marker={"size": 13, "color": colour[cell["entry"]]},
            text=cell["entry"],
            textposition=("top center", "bottom center")[i % 2],
            cliponaxis=False,
            hovertemplate=f"{metric} {cell['score']:.3f}<br>{held}"
            f"<br>{units.count(cell['parameters'])} parameters<extra>{cell['entry']}</extra>",
        )
    costs = [c[key] for c in cells]
    if images:
        figure.update_xaxes(type="log")
    else:
        bytes_axis(figure.update_xaxes, costs)
    low, high = math.log10(min(costs)), math.log10(max(costs))
    room = 0.12 * (high - low) + 0.05
    figure.update_xaxes(range=[low - room, high + room])
    if metric == "accuracy":
        figure.update_yaxes(range=[-0.03, 1.13], tickformat=".0%")
    return figure


def curves(results: Results, task: str) -> go.Figure:
    """The training loss over the steps, each point the mean of a fiftieth of them."""
    figure = blank("step", "training loss, nats a token")
    colour = colours(results)
    for cell in results.trained(task):
        rows = cell["history"]
        size = max(1, len(rows) // 50)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        figure.add_scatter(
            x=[part[-1]["step"] for part in parts],
            y=[fmean(row["loss"] for row in part) for part in parts],
            name=cell["entry"],
            mode="lines",
            line={"color": colour[cell["entry"]], "width": 2},
            hovertemplate="%{y:.3f}",
        )
    figure.update_layout(hovermode="x unified")
    return figure


def over_length(
    results: Results,
    key: str,
    title: str,
    shown: Callable[[float], str],
    axis: Callable[..., Any],
    verb: str,
) -> go.Figure:
    """A measurement against the length, both axes logarithmic, with the crossings marked.

    Args:
        key: of the speed cells: "prefill", "decode", "peak" or "state".
        title: of the y axis, with its unit.
        shown: writes a value for the hover text.
        axis: sets the y axis's ticks for these values.
        verb: what an entry is after its crossing ("faster", "smaller").
    """
    figure = blank("length, tokens", title)
    colour = colours(results)
    cells = [cell for cell in results.timed() if cell["lengths"]]
    for cell in cells:
        figure.add_scatter(
            x=cell["lengths"],
            y=cell[key],
            name=cell["entry"],
            legendgroup=cell["entry"],
            mode="markers" if key in cell.get("formula", {}) else "lines+markers",
            marker={"color": colour[cell["entry"]], "size": 7},
            line={"width": 2},
            customdata=[shown(v) for v in cell[key]],
            hovertemplate="%{customdata}",
        )
        if key in cell.get("formula", {}):
            figure.add_scatter(
                x=cell["lengths"],
                y=cell["formula"][key],
                legendgroup=cell["entry"],
                showlegend=False,
                mode="lines",
                line={"color": colour[cell["entry"]], "width": 2},
                hoverinfo="skip",
            )
    for cell in cells[1:]:
        mark = _meet(cells[0], cell, key)
        if mark is not None:
            figure.add_scatter(
                x=mark[:1],
                y=mark[1:],
                legendgroup=cell["entry"],
                showlegend=False,
                mode="markers",
                marker={
                    "symbol": "circle-open",
                    "size": 16,
                    "color": colour[cell["entry"]],
                    "line": {"width": 2.5},
                },
                hovertemplate=f"{verb} than {cells[0]['entry']} from {mark[0]:,.0f} tokens"
                f"<extra>{cell['entry']}</extra>",
            )
    axis(figure.update_yaxes, [v for cell in cells for v in cell[key] if v > 0])
    ticks = sorted({T for cell in cells for T in cell["lengths"]})
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{T:,}" for T in ticks])
    figure.update_layout(hovermode="x unified", xaxis_hoverformat=",d")
    return figure


def crossings(results: Results, key: str) -> dict[str, float]:
    """For each entry, the length from which it beats the first one."""
    cells = [cell for cell in results.timed() if cell["lengths"]]
    marks = {cell["entry"]: _meet(cells[0], cell, key) for cell in cells[1:]}
    return {entry: mark[0] for entry, mark in marks.items() if mark is not None}


def _meet(a: dict[str, Any], b: dict[str, Any], key: str) -> list[float] | None:
    """Where entry ``b`` starts to stay below entry ``a``: [length, value]."""
    lengths = [T for T in a["lengths"] if T in b["lengths"]]
    one, two = ([c[key][c["lengths"].index(T)] for T in lengths] for c in (a, b))
    if min(one + two, default=0) <= 0:
        return None
    x = crossing(lengths, one, two)
    if x is None:
        return None
    i = max(j for j, T in enumerate(lengths) if x >= T)
    j = min(i + 1, len(lengths) - 1)
    share = 0.0 if i == j else math.log(x / lengths[i]) / math.log(lengths[j] / lengths[i])
    return [x, one[i] ** (1 - share) * one[j] ** share]


def bytes_axis(update: Callable[..., Any], values: Sequence[float]) -> None:
    """Ticks at powers of two, with quarters between where there are few, in KiB and MiB."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, math.ceil((high - low) / 6))
    marks = (1, 1.25, 1.5, 1.75) if high - low <= 1 else (1, 1.5) if high - low <= 3 else (1,)
    ticks = [m * 2.0**e for e in range(low, high + 1, step) for m in marks]
    update(type="log", tickvals=ticks, ticktext=[units.bytes_(t) for t in ticks])


def seconds_axis(update: Callable[..., Any], values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 of each decade, or at the decades alone, written in us, ms and s."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    marks = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [m * 10.0**e for e in range(low, high + 1) for m in marks]
    update(type="log", tickvals=ticks, ticktext=[units.seconds(t) for t in ticks])


def blank(x: str, y: str) -> go.Figure:
    """A figure without data, its axes titled."""
    grid = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "ticks": "outside",
            "tickcolor": "rgba(128,128,128,0.4)", "linecolor": "rgba(128,128,128,0.4)"}  # fmt: skip
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#777"},
            "margin": {"l": 78, "r": 16, "t": 12, "b": 54},
            "height": 400,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#999", "activecolor": "#4e79a7"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"title": {"text": x}, **grid},
            "yaxis": {"title": {"text": y, "standoff": 12}, "automargin": True, **grid},
        }
    )
