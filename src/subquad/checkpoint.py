"""Checkpoints of a run: named tensors and plain data on disk, whole or not there at all.

A folder keeps the last two, ``step-00000100`` and so on. Each is written aside and renamed once it
is complete, so a process killed at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2
_DATA = "data.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at ``path``: groups of named tensors, and data."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    data: Mapping[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    data: Mapping[str, Any],
) -> Path:
    """Write ``folder/step-<step>``: a safetensors file for each group, JSON for the data.

    Raises:
        OSError: if it could not be written (a full disk, say); older checkpoints are untouched.
    """
    whole = folder / f"step-{step:08d}"
    aside = folder / f".{whole.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()
        for group, named in tensors.items():
            save_file({name: t.contiguous() for name, t in named.items()}, aside / _file(group))
        (aside / _DATA).write_text(json.dumps({**data, "groups": list(tensors)}))
        for file in aside.iterdir():
            _flush(file)
        if whole.exists():  # a broken one, or it would have been gone on from
            shutil.rmtree(whole)
        os.replace(aside, whole)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"could not save a checkpoint in {folder}: {error}") from error
    for old in _steps(folder)[:-KEPT]:
        # Out of sight in one move: half-deleted, it must not be taken for whole.
        os.replace(old, folder / f".{old.name}")
        shutil.rmtree(folder / f".{old.name}", ignore_errors=True)
    return whole


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; None where there is none at all.

    A newer one that cannot be read is passed over with a warning.

    Raises:
        ValueError: if there are checkpoints, but none that can be read.
    """
    broken = []
    for path in reversed(_steps(folder)):
        try:
            found = json.loads((path / _DATA).read_text())
            tensors = {group: load_file(path / _file(group)) for group in found.pop("groups")}
            return Checkpoint(path, int(path.name[5:]), tensors, found)
        except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
            broken.append(f"{path}: {error}")
            warnings.warn(f"passed over an unreadable checkpoint, {broken[-1]}", stacklevel=2)
    if broken:
        raise ValueError(f"out holds no checkpoint that can be read: {'; '.join(broken)}")
    return None


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, unread."""
    return max(_steps(folder), default=None)


def whole(t: Tensor) -> Tensor:
    """The tensor itself, put together where it is sharded: every rank must ask."""
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard(t: Tensor, like: Any) -> Tensor:
    """The whole tensor ``t`` on the device of ``like``, and sharded as it is."""
    t = t.to(like.device)
    if not hasattr(like, "full_tensor"):
        return t
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    return distribute_tensor(t, like.device_mesh, like.placements)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers by name, tied ones once."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def moments(optimizer: Any, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of named parameters as ``name/key``, on the CPU: every rank must ask."""
    return {
        f"{name}/{key}": whole(t).cpu()
        for name, p in parameters.items()
        for key, t in optimizer.state[p].items()
    }


def load_moments(
    optimizer: Any, parameters: Mapping[str, Any], found: Mapping[str, Tensor]
) -> None:
    """Undo :func:`moments`."""
    fused = optimizer.defaults.get("fused")
    for key, t in found.items():
        name, _, part = key.rpartition("/")
        p = parameters[name]
        # The count of steps lies on the CPU, unless the fused kernel reads it.
        t = (t.to(p.device) if fused else t) if part == "step" else shard(t, p)
        optimizer.state[p][part] = t


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def _file(group: str) -> str:
    return f"{group}.safetensors"


def _flush(path: Path) -> None:
    """Down to the disk, lest a power cut leaves a name without its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
