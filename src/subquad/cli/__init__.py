"""The command line. One function a command; whatever is heavy is imported by the command."""

from subquad.cli import analysis, catalogue, convert, diffusion, pretrained, training, tuning
from subquad.cli.shared import app, main

__all__ = [
    "analysis",
    "app",
    "catalogue",
    "convert",
    "diffusion",
    "main",
    "pretrained",
    "training",
    "tuning",
]
