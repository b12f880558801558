"""Look into a pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.shared import app, console, dtype_of, escape


@app.command()
def analyse(
    model: Annotated[str, typer.Argument(help="A model of transformers: a folder, or its name.")],
    what: Annotated[str, typer.Option(help="retrieval_heads or secondary_sinks.")],
    set_: Annotated[
        str, typer.Option("--set", help="Options: length=1024,samples=20,seed=0,...")
    ] = "",
    text: Annotated[str | None, typer.Option(help="A file or folder of text.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/analyse"),
) -> None:
    """Which heads retrieve, which tokens are sinks: figures, a JSON file and pictures."""
    from subquad.analysis import analyse as run
    from subquad.bench import spec, writing
    from subquad.bench.results import machine, write_json

    writer = writing.Writer(model, None, device=device, dtype=dtype_of(dtype))
    options: dict[str, Any] = spec.options(set_)
    if text is not None:
        options["text"] = text
    screen = console()
    with console(stderr=True).status(f"{what} of {model}"):
        found = run(writer.model, writer.tokenizer, what, **options)
    for line in found.lines():
        screen.print(escape(line), highlight=False, soft_wrap=True)
    path = out / f"{what}.json"
    write_json(path, {"made": machine(), "model": model, "options": options, **found.summary()})
    for made in (path, *found.draw(out)):
        screen.print(str(made), soft_wrap=True)
