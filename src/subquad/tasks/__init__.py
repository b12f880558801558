"""Evaluation tasks: generators that need no download, each with its labels and its score."""

from __future__ import annotations

import dataclasses
from typing import Any

from subquad.ops import checks
from subquad.tasks.base import EVAL_SEEDS, IGNORED, Batch, Prompt, Task, TextTask
from subquad.tasks.copying import Copy, Induction, SelectiveCopy
from subquad.tasks.images import Images
from subquad.tasks.listops import ListOps
from subquad.tasks.mqar import MQAR
from subquad.tasks.niah import NIAH
from subquad.tasks.passkey import Passkey, PasskeyText
from subquad.tasks.ruler import NIAHText
from subquad.tasks.state_tracking import Group, Parity
from subquad.tasks.text import Text

__all__ = ["EVAL_SEEDS", "IGNORED", "TASKS", "Batch", "Prompt", "Task", "TextTask", "create_task"]

_CLASSES: tuple[type[Task], ...] = (
    MQAR,
    Induction,
    Copy,
    SelectiveCopy,
    Passkey,
    PasskeyText,
    NIAH,
    NIAHText,
    Parity,
    Group,
    ListOps,
    Text,
    Images,
)
TASKS: dict[str, type[Task]] = {cls.name: cls for cls in _CLASSES}


def create_task(name: str, **options: Any) -> Task:
    """Build a task by its name, e.g. ``create_task("mqar", vocab_size=128, length=64, pairs=4)``.

    Raises:
        ValueError: for an unknown name or option (with the nearest ones) or a value out of range.
    """
    checks.one_of("task", name, TASKS)
    known = [f.name for f in dataclasses.fields(TASKS[name]) if f.init]
    for option in options:
        checks.one_of(f"options of task {name!r}", option, known)
    return TASKS[name](**options)
