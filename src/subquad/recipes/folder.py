"""The folder of a conversion: what was asked, how far it is, and the checks before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subquad.models import CausalLM
from subquad.recipes.base import Recipe, Tune

RECORD = "conversion.json"
WORK = ".conversion"


class Folder:
    """``out``: the record ``conversion.json``, work under way in ``.conversion``.

    Args:
        path: of the folder.
        resume: whether to go on with the conversion in it; overwrite: whether to delete it.

    Raises:
        ValueError: where it exists and neither was asked, or both, or it is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> None:
        self.path = Path(path).expanduser()
        self.record: dict[str, Any] = {}
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        if not self.path.exists():
            return
        ours = (self.path / RECORD).is_file()
        if not self.path.is_dir() or (any(self.path.iterdir()) and not ours):
            raise ValueError(f"out must be a new folder or that of a conversion, got {self.path}")
        if ours and not (resume or overwrite):
            raise ValueError(
                f"out must be a new folder, {self.path} exists: --resume goes on with it, "
                "--overwrite begins anew"
            )
        if resume and ours:
            self.record = json.loads((self.path / RECORD).read_text())
        self._overwrite = overwrite

    def begin(self, identity: dict[str, Any], about: dict[str, Any]) -> None:
        """Take possession: write the record, or see that it is of the same conversion.

        Raises:
            ValueError: naming what differs from the conversion begun here.
        """
        identity = json.loads(json.dumps(identity, default=str))
        if self.record:
            differ = list(differences(self.record.get("identity"), identity))
            if differ:
                raise ValueError(
                    f"out must hold this same conversion to go on with, but {self.path} is of "
                    f"another: {'; '.join(differ[:4])}"
                )
            return
        if getattr(self, "_overwrite", False):
            shutil.rmtree(self.path)
        self.record = {"identity": identity, **about, "done": False, "stages": {}}
        self.save()

    def save(self) -> None:
        """Write the record aside and rename it."""
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / f".{RECORD}"
        aside.write_text(json.dumps(self.record, indent=1))
        os.replace(aside, self.path / RECORD)

    def stage(self, index: int) -> Path:
        return self.path / WORK / f"stage-{index}"

    def finish(self) -> None:
        self.record["done"] = True
        self.save()
        shutil.rmtree(self.path / WORK, ignore_errors=True)


def enough_disk(path: Path, model: CausalLM, recipe: Recipe) -> None:
    """Raise ValueError unless the model and two checkpoints of its training fit on the disk."""
    size = sum(p.numel() for p in model.parameters())
    full = any(isinstance(stage, Tune) and stage.how == "full" for stage in recipe.stages)
    attention = sum(p.numel() for block in model.blocks for p in block.mixer.parameters())
    # Weights and two moments, twice kept and once being written.
    need = 4 * (size + 9 * (size if full else attention))
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(
            f"out needs {need / 2**20:,.0f} MiB of disk for the model and its checkpoints, "
            f"{place} has {free / 2**20:,.0f} MiB free"
        )


def differences(saved: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where two trees of plain data differ, in words."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in {**wanted, **saved}:
            inner = f"{name}.{key}" if name else key
            yield from differences(saved.get(key), wanted.get(key), inner)
    elif isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        for i, (a, b) in enumerate(zip(saved, wanted)):
            yield from differences(a, b, f"{name}[{i}]")
    elif saved != wanted:
        yield f"{name} was {saved!r}, is {wanted!r}"
