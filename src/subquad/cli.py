"""The command line. One function a command; whatever is heavy is imported by the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:
    sys.exit("the command line needs its extra: pip install 'subquad[cli]'")

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from subquad.bench.progress import Display
    from subquad.catalogue import System

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context attention systems: what there is, what it costs, what it recalls.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
LENGTHS = (1024, 4096, 16384, 65536, 262144)


def main() -> None:
    """The entry point: what a user did wrong is one red line and exit code 2, no traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        _console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None


def _console(**options: Any) -> Console:
    from rich.console import Console

    return Console(**options)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


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
        print(json.dumps([asdict(card) for card in cards], indent=2))
        return
    from rich.table import Table

    table = Table("key", "name", "family", "kind", "arXiv", "shown", box=None, pad_edge=False)
    for card in cards:
        shown = " ".join(card.evidence)
        table.add_row(
            f"[bold]{card.key}[/bold]", card.name, card.family, card.kind, card.arxiv, shown
        )
    _console().print(table)


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
    console = _console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("paper", card.paper)
    if card.arxiv:
        facts.add_row("arXiv", f"https://arxiv.org/abs/{card.arxiv}")
    facts.add_row("family", card.family)
    facts.add_row("kind", card.kind + (", causal" if card.causal else ", not causal"))
    facts.add_row("home", card.home)
    facts.add_row("shown", ", ".join(card.evidence))
    console.print(f"[bold]{card.name}[/bold] ({card.key})")
    console.print(facts)
    if costs is not None:
        console.print(costs)
    page = _page(key)
    if page is not None:
        console.print()
        console.print(Markdown(page.read_text()))


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
    pages = (here.parent / "pages", here.parents[2] / "docs" / "systems")
    return next((p for folder in pages if (p := folder / f"{key}.md").is_file()), None)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="attention, recurrence or neighborhood.")],
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

        _console().print(tiles.report(spec.options(shape)))
        return
    import torch
    from rich.table import Table

    from subquad.bench import spec
    from subquad.ops import backend

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = {**spec.options(shape), "device": device, "dtype": _dtype(dtype)}
    if mask is not None:
        asked["mask"] = spec.mask(mask)
    try:
        answers = backend.explain(op, **asked)
    except TypeError as error:
        raise ValueError(f"shape {shape!r} does not fit {op}: {error}") from None
    table = Table("", "implementation", "because", box=None, pad_edge=False)
    for answer in answers:
        mark = "[green]runs[/green]" if answer.chosen else "could" if answer.ok else "[dim]no[/dim]"
        table.add_row(mark, answer.backend, _escape(answer.reason))
    _console().print(table)


def _dtype(name: str) -> torch.dtype:
    import torch

    from subquad.ops import checks

    checks.one_of("dtype", name, ("float32", "bfloat16", "float16", "float64"))
    return getattr(torch, name)


@contextmanager
def _progress(console: Console) -> Iterator[Display]:
    """Progress of training; stopping it, or a loss that diverges, is no traceback."""
    from subquad.bench.progress import Display
    from subquad.train import NonFiniteLoss

    try:
        with Display(console) as display:
            yield display
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    except NonFiniteLoss as error:
        raise ValueError(str(error)) from None


@app.command()
def compare(
    mixers: Annotated[
        str | None,
        typer.Option(help="Models: softmax,gla\\[heads=2],hybrid:3,mine=gated_deltanet*3 softmax"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks: mqar\\[pairs=8],text")] = None,
    preset: Annotated[str, typer.Option(help="What else is not given.")] = "default",
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    set_: Annotated[
        str, typer.Option("--set", help="More: dim=64,depth=4,heads=1,batch=32,lr=2e-3,seed=0,...")
    ] = "",
    text: Annotated[str | None, typer.Option(help="A file or folder for the task text.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Timed: 256,4096; none: 0.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/compare"),
) -> None:
    """Train and time mixers side by side: who recalls what at what cost.

    Stopped at any time, the same command goes on. Writes results.json and report.html.
    """
    from subquad.bench import compare as bench
    from subquad.bench import report, spec
    from subquad.ops import checks

    checks.one_of("preset", preset, bench.PRESETS)
    more = spec.options(set_)
    for name in more:
        checks.one_of("set", name, [f.name for f in fields(bench.Comparison)])
    given: dict[str, Any] = {
        "mixers": mixers and tuple(spec.listed(mixers)),
        "tasks": tasks and tuple(spec.listed(tasks)),
        "lengths": lengths and tuple(spec.value(T) for T in spec.listed(lengths) if T != "0"),
        "steps": steps,
        "text": text,
        "device": device,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen = replace(bench.PRESETS[preset], **{**more, **given})
    console = _console()
    with _progress(console) as display:
        results = bench.compare(chosen, out, display)
    console.print(report.table(results))
    path = report.write(results, out / "report.html")
    console.print(f"{results.path}\n{path}", soft_wrap=True)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="E.g. gla, 'gated_deltanet*3 softmax', hybrid:6.")],
    task: Annotated[str, typer.Option(help="E.g. text, mqar\\[pairs=8].")] = "text",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    depth: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and model.")] = Path("runs/one"),
) -> None:
    """Train one model on one task; stopped at any time, the same command goes on.

    The trained model goes to OUT/model, for AutoModelForCausalLM.
    """
    from subquad import tasks
    from subquad import train as training
    from subquad.bench import spec
    from subquad.bench.match import build

    name, options = spec.named(task)
    made = tasks.create_task(name, **options)
    lm = build(spec.model(model, vocab_size=made.vocab_size, dim=dim, depth=depth), seed, device)
    config = training.TrainConfig(steps=steps, batch=batch, lr=lr, seed=seed)
    console = _console()
    with _progress(console) as display:
        display.start(f"{model} on {task}", steps)
        found = training.train(lm, made, config, out=out, progress=display)
    training.export(lm, out / "model")
    console.print(f"{made.metric} {found.evals[-1][made.metric]:.4f}, saved in {out / 'model'}")


@app.command()
def tune(
    sizes: Annotated[str, typer.Option(help="Head widths K:V.")] = "64:64,128:128,256:256",
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="The table; the cache folder's if none.")] = None,
) -> None:
    """Measure this GPU's own table of kernel configurations for the recurrence; takes minutes."""
    from subquad.bench import tune as measure

    pairs = [tuple(int(n) for n in pair.split(":")) for pair in sizes.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"sizes must be pairs like 64:64,128:128, got {sizes!r}")
    console = _console()

    def tell(event: dict[str, Any]) -> None:
        if "kernel" in event and "microseconds" in event:
            console.print(f"{event['kernel']}: {event['config']}, {event['microseconds']:.0f} us")

    path = measure.tune(
        sizes=[(K, V) for K, V in pairs], dtypes=[_dtype(dtype)], out=out, progress=tell
    )
    console.print(f"written to {path}")


@app.command()
def bench(
    models: Annotated[str, typer.Argument(help="As compare names them, e.g. softmax,gla,hybrid:3")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "256,1024,4096,16384",
    dim: Annotated[int, typer.Option(help="Width of the models.")] = 256,
    depth: Annotated[int, typer.Option(help="Layers of the models.")] = 4,
    budget: Annotated[float, typer.Option(help="Most seconds of a prompt.")] = 20.0,
    device: Annotated[str, typer.Option(help="cpu, or cuda (in bfloat16).")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/bench"),
) -> None:
    """Time models over the length, untrained: prefill, decode, state and peak memory."""
    from subquad.bench import compare as bench
    from subquad.bench import report, spec

    comparison = bench.Comparison(
        mixers=tuple(spec.listed(models)),
        tasks=(),
        lengths=tuple(spec.value(T) for T in spec.listed(lengths)),
        dim=dim,
        depth=depth,
        mlp_dim=2 * dim,
        budget=budget,
        device=device,
    )
    console = _console()
    with _progress(console) as display:
        results = bench.compare(comparison, out, display)
    console.print(report.timings(results))


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="A model of transformers: a folder, or its name.")],
    policy: Annotated[
        list[str], typer.Option(help="quest:budget=512, vertical_slash+quest, ...; repeatable.")
    ],
    task: Annotated[str, typer.Option(help="Of niah (needles), text (perplexity).")] = "niah,text",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "1024,4096",
    samples: Annotated[int, typer.Option(help="Prompts at each length.")] = 10,
    text: Annotated[str | None, typer.Option(help="File or folder of the haystack.")] = None,
    pieces: Annotated[int | None, typer.Option(help="Prompt tokens fed at once; all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/apply"),
) -> None:
    """What policies cost a pretrained model in quality, and what they save, beside the model alone.

    Stopped at any time, the same command goes on. Writes results.json and report.html.
    """
    from subquad.bench import policies, policy_report, spec

    study = policies.Study(
        model=model,
        policies=tuple(policy),
        tasks=tuple(spec.listed(task)),
        lengths=tuple(spec.value(T) for T in spec.listed(lengths)),
        samples=samples,
        text=text,
        pieces=pieces,
        device=device,
        dtype=dtype,
    )
    console = _console()
    with _progress(console) as display:
        results = policies.study(study, out, display)
    console.print(policy_report.table(results))
    path = policy_report.write(results, out / "report.html")
    console.print(f"{results.path}\n{path}", soft_wrap=True)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model of transformers: a folder, or its name.")],
    prompt: Annotated[str, typer.Argument(help="The prompt, or the end of it behind --file.")] = "",
    file: Annotated[Path | None, typer.Option(help="A text file to read first.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="E.g. vertical_slash+quest:budget=512.")
    ] = None,
    new: Annotated[int, typer.Option(help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Let a pretrained model answer a prompt, a file or both, with a policy or without."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from subquad.bench import units, writing

    text = (file.read_text() if file else "") + prompt
    errors = _console(stderr=True)
    writer = writing.Writer(model, policy, device=device, dtype=_dtype(dtype))
    ids = writer.tokens(text)
    bar = Progress("reading", BarColumn(), TextColumn(f"{ids.shape[1]:,} tokens"),
                   TimeElapsedColumn(), console=errors, transient=True)  # fmt: skip

    def write(piece: str) -> None:
        if bar.live.is_started:
            bar.stop()
        print(piece, end="", flush=True)

    with bar:
        task = bar.add_task("", total=1.0)
        done = writer.write(
            ids, new, temperature, lambda share: bar.update(task, completed=share), write
        )
    print()
    errors.print(
        f"[dim]read {ids.shape[1]:,} tokens in {units.seconds(done.read)}, wrote {done.tokens} at "
        f"{done.rate:.1f} tokens/s, cache {units.bytes_(done.cache)}[/dim]"
    )


if __name__ == "__main__":
    main()
