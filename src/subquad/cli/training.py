"""Train, compare and time models."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.shared import app, console, progress


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
    screen = console()
    with progress(screen) as display:
        results = bench.compare(chosen, out, display)
    screen.print(report.table(results))
    path = report.write(results, out / "report.html")
    screen.print(f"{results.path}\n{path}", soft_wrap=True)


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
    sequence: Annotated[
        int, typer.Option(help="Under torchrun: processes that share a sequence.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and model.")] = Path("runs/one"),
) -> None:
    """Train one model on one task; stopped at any time, the same command goes on.

    The trained model goes to OUT/model, for AutoModelForCausalLM. On several devices:
    torchrun --nproc-per-node 4 -m subquad.cli train MODEL --sequence 2
    """
    from subquad import tasks
    from subquad import train as training
    from subquad.bench import spec
    from subquad.bench.match import build

    name, options = spec.named(task)
    made = tasks.create_task(name, **options)
    lm = build(spec.model(model, vocab_size=made.vocab_size, dim=dim, depth=depth), seed, device)
    config = training.TrainConfig(steps=steps, batch=batch, lr=lr, seed=seed, sequence=sequence)
    screen = console()
    screen.quiet = os.environ.get("RANK", "0") != "0"  # under torchrun one process speaks
    with progress(screen) as display:
        display.start(f"{model} on {task}", steps)
        found = training.train(lm, made, config, out=out, progress=display)
    training.export(lm, out / "model")
    screen.print(f"{made.metric} {found.evals[-1][made.metric]:.4f}, saved in {out / 'model'}")


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
    screen = console()
    with progress(screen) as display:
        results = bench.compare(comparison, out, display)
    screen.print(report.timings(results))
