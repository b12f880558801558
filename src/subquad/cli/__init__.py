"""The command line. One function a command; whatever is heavy is imported by the command."""

from subquad.cli import analysis, catalogue, pretrained, training, tuning
from subquad.cli.app import app, main

__all__ = ["analysis", "app", "catalogue", "main", "pretrained", "training", "tuning"]
