"""Diffusion models of images: train one, put another attention into it, draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.shared import app, console, progress

diffuse = typer.Typer(no_args_is_help=True, help="Diffusion models of images: train, sample.")
app.add_typer(diffuse, name="diffuse")


@diffuse.command()
def train(
    mixer: Annotated[
        str | None, typer.Argument(help="E.g. softmax, sla\\[topk=0.1], 'sla*3 softmax'.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="A trained model to go on from, MIXER in the place of its softmax."),
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="A folder of images, one folder a class; none: digits.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side.  \\[32]")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3.  \\[1]")] = None,
    patch: Annotated[int | None, typer.Option(help="Pixels a side to a token.  \\[2]")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the model.  \\[192]")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks of the model.  \\[6]")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of a block.  \\[3]")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and model.")] = Path(
        "runs/diffusion"
    ),
) -> None:
    """Train a transformer by flow matching; stopped at any time, the same command goes on.

    The trained model goes to OUT/model. To fine-tune a model of softmax attention as another:
    subquad diffuse train "sla\\[topk=0.1]" --start runs/diffusion/model --out runs/sla
    """
    import torch

    from subquad import train as training
    from subquad.bench import spec
    from subquad.models.diffusion import DiT
    from subquad.ops import checks
    from subquad.recipes.swap import swap
    from subquad.tasks.flow import Flow

    given: dict[str, Any] = {
        "image_size": size, "channels": channels, "patch": patch,
        "dim": dim, "depth": depth, "heads": heads,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    checks.device(device)
    torch.manual_seed(seed)
    if start is not None:
        if given:
            raise ValueError(f"start has sizes of its own, got {sorted(given)} beside it")
        model = DiT.from_pretrained(start)
        if mixer is not None:
            key, options = spec.named(mixer)
            model = swap(model, "softmax", key, **options)
        task = Flow(size=model.config.image_size, channels=model.config.channels, path=path)
        if model.config.classes != task.vocab_size:
            raise ValueError(
                f"path must hold the {model.config.classes} classes of start, got {task.vocab_size}"
            )
    else:
        sizes = {"image_size": 32, "channels": 1, "dim": 192, "depth": 6, "heads": 3, **given}
        task = Flow(size=sizes["image_size"], channels=sizes["channels"], path=path)
        model = DiT(spec.diffusion(mixer or "softmax", classes=task.vocab_size, **sizes))
    config = training.TrainConfig(
        steps=steps, batch=batch, lr=lr, seed=seed, weight_decay=0.01, eval_batches=5
    )
    screen = console()
    with progress(screen) as display:
        keys = dict.fromkeys(model.config.mixer(alias)[0] for alias in model.config.pattern)
        display.start(f"{' '.join(keys)} on images", steps)
        found = training.train(model.to(device), task, config, out=out, progress=display)
    training.export(model, out / "model")
    screen.print(f"held-out loss {found.evals[-1]['loss']:.4f}, saved in {out / 'model'}")


@diffuse.command()
def sample(
    model: Annotated[Path, typer.Argument(help="A folder that train has written: OUT/model.")],
    count: Annotated[int, typer.Option(help="Pictures.")] = 100,
    classes: Annotated[
        str | None, typer.Option(help="Numbers of classes, taken in turn: 0,1,2; all in turn.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps from noise to picture.")] = 50,
    guidance: Annotated[float, typer.Option(help="How strongly to the class; 1: as it is.")] = 1.5,
    solver: Annotated[str, typer.Option(help="heun or euler.")] = "heun",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    columns: Annotated[int, typer.Option(help="Pictures in a row.")] = 10,
    zoom: Annotated[int, typer.Option(help="Pixels a side to each of a picture's.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The PNG file.")] = Path("samples.png"),
) -> None:
    """Draw pictures and write them as one PNG."""
    from subquad.bench import spec
    from subquad.bench.progress import Display
    from subquad.models import diffusion
    from subquad.ops import checks

    checks.positive("count", count)
    checks.device(device)
    if not (model / "config.json").is_file():
        raise ValueError(f"model must be a folder that train has written, got {str(model)!r}")
    made = diffusion.DiT.from_pretrained(model).to(device)
    asked = None
    if made.config.classes:
        known = range(made.config.classes)
        listed = [spec.value(c) for c in spec.listed(classes)] if classes else list(known)
        for c in listed:
            checks.one_of("classes", c, known)
        asked = [listed[i % len(listed)] for i in range(count)]
    elif classes:
        raise ValueError(f"classes must be left out: the model has none, got {classes!r}")
    screen = console()
    with Display(screen) as display:
        display.start("sample", steps * -(-count // diffusion.BATCH))
        images = diffusion.sample(
            made, count, classes=asked, steps=steps, guidance=guidance if asked else 1.0,
            solver=solver, seed=seed, progress=display,
        )  # fmt: skip
    path = diffusion.save_grid(images, out, columns=columns, zoom=zoom)
    screen.print(str(path), soft_wrap=True)
