"""What there is, what it costs, and which implementation runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli.shared import app, console, dtype_of, escape

if TYPE_CHECKING:
    from subquad.catalogue import System

LENGTHS = (1024, 4096, 16384, 65536, 262144)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="Only this kind, e.g. mixer.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
) -> None:
    """The systems of the catalogue."""
    from subquad import catalogue

    for name, asked in (("kind", kind), ("family", family)):
        if asked is not None:
            from subquad.ops import checks

            checks.one_of(name, asked, sorted({getattr(c, name) for c in catalogue.systems()}))
    cards = catalogue.systems(kind=kind, family=family)
    if as_json:
        print(json.dumps([dataclasses.asdict(card) for card in cards], indent=2))
        return
    from rich.table import Table

    table = Table("key", "name", "family", "kind", "arXiv", "shown", box=None, pad_edge=False)
    table.columns[0].min_width = max(len(card.key) for card in cards)  # whole, to be copied
    for card in cards:
        shown = " ".join(card.evidence)
        table.add_row(
            f"[bold]{card.key}[/bold]", card.name, card.family, card.kind, card.arxiv, shown
        )
    console().print(table)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A key of the catalogue.")],
    option: Annotated[str, typer.Option(help="Options of the mixer, name=value,...")] = "",
    dim: Annotated[
        int | None, typer.Option(help="The width that the costs are for; 1024 where it fits.")
    ] = None,
) -> None:
    """The card of a system, what it costs, and its page."""
    from rich.markdown import Markdown
    from rich.table import Table

    from subquad import catalogue

    card = catalogue.system(key)
    costs = _costs(card, option, dim) if card.kind == "mixer" else None
    screen = console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("paper", card.paper)
    if card.arxiv:
        facts.add_row("arXiv", f"https://arxiv.org/abs/{card.arxiv}")
    facts.add_row("family", card.family)
    facts.add_row("kind", card.kind + (", causal" if card.causal else ", not causal"))
    facts.add_row("home", card.home)
    facts.add_row("shown", ", ".join(card.evidence))
    if options := _options(card):
        facts.add_row("options", escape(", ".join(f"{k}={v}" for k, v in options.items())))
    screen.print(f"[bold]{card.name}[/bold] ({card.key})")
    screen.print(facts)
    if costs is not None:
        screen.print(costs)
    page = _page(key)
    if page is not None:
        screen.print()
        screen.print(Markdown(page.read_text()))


def _options(card: System) -> dict[str, Any]:
    """What a mixer or a policy can be told, and what it takes where it is not."""
    if card.kind == "policy":
        return {f.name: f.default for f in dataclasses.fields(card.load()) if f.init}
    if card.kind != "mixer":
        return {}
    from subquad.mixers.base import options_of

    place = ("dim", "layer", "layers", "bounds")  # which a model says
    return {k: v for k, v in options_of(card.key).items() if k not in place}


def _costs(card: System, option: str, dim: int | None) -> Any:
    """What one layer costs over the length, by the mixer's own formulas."""
    import torch
    from rich.table import Table

    import subquad
    from subquad.bench import spec, units

    if dim is None:  # a mixer of six heads has no default at 1024
        try:
            return _costs(card, option, 1024)
        except ValueError:
            return _costs(card, option, 768)
    with torch.device("meta"):
        mixer = subquad.create_mixer(card.key, dim=dim, **spec.options(option))
    title = f"one layer of width {dim}, bfloat16, one sequence"
    table = Table("tokens", "state", "forward", title=title, title_justify="left", box=None)
    for T in LENGTHS:
        held = units.bytes_(mixer.state_bytes(T, torch.bfloat16))
        table.add_row(f"{T:,}", held, units.flops(mixer.flops(T)))
    table.columns[0].justify = table.columns[1].justify = table.columns[2].justify = "right"
    return table


def _page(key: str) -> Path | None:
    """The page of a system: in the installed package, or in the checkout."""
    here = Path(__file__).resolve()
    pages = (here.parents[1] / "pages", here.parents[3] / "docs" / "systems")
    return next((p for folder in pages if (p := folder / f"{key}.md").is_file()), None)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="attention, recurrence, probe, ... or neighborhood.")],
    shape: Annotated[
        str, typer.Option(help="Sizes and switches, e.g. T=4096,H=8,K=64,decay=head,delta=true.")
    ],
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; what there is if left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    mask: Annotated[
        str | None, typer.Option(help="Of attention, e.g. 'causal & (window(511) | sinks(4))'.")
    ] = None,
) -> None:
    """Which implementation of an operation runs for a shape, and why the others do not.

    Of a neighborhood (grid=30x48x80,window=18x24x24,stride=16x8x8,tile=2x8x8): how much faster than
    dense a kernel of such tiles can be.
    """
    if op == "neighborhood":
        from subquad.bench import spec, tiles

        console().print(tiles.report(spec.options(shape)))
        return
    import torch
    from rich.table import Table

    from subquad.bench import spec
    from subquad.ops import backend, checks

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checks.one_of("device", device, ("cpu", "cuda"))  # one that is not there may be asked about
    asked = {**spec.options(shape), "device": device, "dtype": dtype_of(dtype)}
    if "decay" in asked:
        asked["decay"] = asked["decay"] or "none"  # which reads as None
        checks.one_of("decay", asked["decay"], ("none", "head", "channel"))
    if mask is not None:
        asked["mask"] = spec.mask(mask)
    try:
        answers = backend.explain(op, **asked)
    except TypeError as error:
        raise ValueError(f"shape {shape!r} does not fit {op}: {error}") from None
    table = Table("", "implementation", "because", box=None, pad_edge=False)
    for answer in answers:
        mark = "[green]runs[/green]" if answer.chosen else "could" if answer.ok else "[dim]no[/dim]"
        table.add_row(mark, answer.backend, escape(answer.reason))
    console().print(table)
