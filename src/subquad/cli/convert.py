"""Conversion of pretrained models, and what it lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.shared import app, console, escape, progress


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A model of transformers: a folder, or its name.")],
    recipe: Annotated[str, typer.Option(help="lolcats, hedgehog, gated_deltanet, sala, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the converted model.")],
    text: Annotated[
        str, typer.Option(help="File or folder; stdlib for Python's own source.")
    ] = "stdlib",
    keep: Annotated[
        str, typer.Option(help="Softmax layers: a count like 1 (the best), 0,5 or a ratio 3:1.")
    ] = "0",
    layer: Annotated[
        list[int] | None, typer.Option(help="Transfer this layer alone, and stop; repeatable.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(help="Layers transferred together; all.")] = None,
    set_: Annotated[
        str, typer.Option("--set", help="steps=200,batch=8,length=512,seed=0, of every stage.")
    ] = "",
    transfer: Annotated[str, typer.Option(help="lr=3e-2,... of the attention transfer.")] = "",
    tune: Annotated[str, typer.Option(help="lr=2e-3,steps=20,... of the tuning.")] = "",
    option: Annotated[str, typer.Option(help="Options of the mixer, window=64,...")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what OUT holds.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what there is.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (autocast).")] = "float32",
) -> None:
    """Replace the softmax attention of a pretrained model and train it to do without.

    Stopped at any time, the same command with --resume goes on to the same result. A single number
    for --keep is a count, chosen by score; layer 5 alone is '5,'.
    """
    from subquad import recipes
    from subquad.bench import spec
    from subquad.recipes.fit import Diverged
    from subquad.recipes.run import convert as run

    changes = spec.options(set_)
    chosen = recipes.create_recipe(
        recipe, options=spec.options(option), transfer=spec.options(transfer),
        tune=spec.options(tune), **changes,
    )  # fmt: skip
    layers: str | int = int(keep) if keep.strip().isdigit() else keep.strip().rstrip(",")
    screen = console()
    try:
        with progress(screen, "the same command with --resume") as display:
            made = run(
                model, chosen, text, out=out, keep=layers, layers=layer or None, at_once=at_once,
                resume=resume, overwrite=overwrite, device=device, dtype=dtype, progress=display,
            )  # fmt: skip
    except Diverged as error:
        raise ValueError(str(error)) from None
    if made is None:
        screen.print(f"transferred; --resume without --layer goes on with {escape(str(out))}")
    else:
        screen.print(f"{made.config.layers}\nsaved in {escape(str(out))}", soft_wrap=True)


@app.command("eval")
def eval_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.")],
    task: Annotated[str, typer.Option(help="Of niah (needles), text (perplexity).")] = "niah,text",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "1024,4096",
    speed: Annotated[
        str, typer.Option(help="Tokens behind which decoding is timed; none: 0.")
    ] = "1024,4096,16384,65536",
    samples: Annotated[int, typer.Option(help="Prompts at each length.")] = 10,
    text: Annotated[str | None, typer.Option(help="File or folder of the texts.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The model before, if it moved.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """What a conversion lost and saved: a table, before and after, also in DIR's README.md."""
    from rich.markdown import Markdown

    from subquad.bench import conversion, spec

    screen = console()
    with progress(screen) as display:
        found = conversion.evaluate(
            folder, tasks=tuple(spec.listed(task)),
            lengths=tuple(spec.value(T) for T in spec.listed(lengths)),
            speed=tuple(spec.value(T) for T in spec.listed(speed) if T != "0"),
            samples=samples, text=text, teacher=teacher, device=device, dtype=dtype,
            progress=display,
        )  # fmt: skip
    screen.print(Markdown("\n".join(conversion.table(found["rows"]))))
    screen.print(f"written to {escape(str(folder / 'README.md'))}", soft_wrap=True)
