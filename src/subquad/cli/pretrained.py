"""Policies on pretrained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.shared import app, console, dtype_of, progress


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
    screen = console()
    with progress(screen) as display:
        results = policies.study(study, out, display)
    screen.print(policy_report.table(results))
    path = policy_report.write(results, out / "report.html")
    screen.print(f"{results.path}\n{path}", soft_wrap=True)


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
    errors = console(stderr=True)
    writer = writing.Writer(model, policy, device=device, dtype=dtype_of(dtype))
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
