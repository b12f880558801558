"""The command line. One function a command; whatever is heavy is imported by the command."""

from subquad.cli import catalogue, pretrained, training, tuning
from subquad.cli.app import app, main

__all__ = ["app", "catalogue", "main", "pretrained", "training", "tuning"]
