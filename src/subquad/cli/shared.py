"""The command line's application, and what its commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

try:
    import typer
except ImportError:
    sys.exit("the command line needs its extra: pip install 'subquad[cli]'")

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from subquad.bench.progress import Display

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Long-context attention systems: what there is, what it costs, what it recalls.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point: what a user did wrong is one red line and exit code 2, no traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None


def console(**options: Any) -> Console:
    from rich.console import Console

    return Console(**options)


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def dtype_of(name: str) -> torch.dtype:
    import torch

    from subquad.ops import checks

    checks.one_of("dtype", name, ("float32", "bfloat16", "float16", "float64"))
    return getattr(torch, name)


@contextmanager
def progress(screen: Console, again: str = "the same command") -> Iterator[Display]:
    """Progress of training; stopping it, or a loss that diverges, is no traceback.

    Args:
        again: what goes on with a stopped run.
    """
    from subquad.bench.progress import Display
    from subquad.train import NonFiniteLoss

    try:
        with Display(screen) as display:
            yield display
    except KeyboardInterrupt:
        screen.print(f"stopped; {again} goes on from here")
        raise typer.Exit(130) from None
    except NonFiniteLoss as error:
        raise ValueError(str(error)) from None
