"""What a policy learned about one model, on disk: a folder of one safetensors and one JSON file.

    <root>/<policy>/<model>/calibration.json, calibration-<digest>.safetensors

The root is ``$SUBQUAD_CALIBRATIONS``, or ``~/.cache/subquad/calibrations``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

_DATA, _PROBE = "calibration.json", "_probe"
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Calibration:
    """Tensors by name, and the settings that they were found with."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def folder(policy: str, model: PreTrainedModel | str, root: str | Path | None = None) -> Path:
    """Where the calibration of a policy (its key) for a model (or its name) lies."""
    if root is None:
        root = os.environ.get("SUBQUAD_CALIBRATIONS") or "~/.cache/subquad/calibrations"
    name = model if isinstance(model, str) else model.name_or_path or type(model).__name__
    slug = re.sub(r"[^\w.-]+", "--", Path(name).name if Path(name).exists() else name).strip("-")
    return Path(root).expanduser() / policy / slug


def save_calibration(
    policy: str,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    out: str | Path | None = None,
) -> Path:
    """Write what ``policy`` learned about ``model`` to ``out`` (:func:`folder` where None).

    The JSON file names the tensors' file and is renamed into place last: a reader finds the old
    calibration or the new one, whole.
    """
    path = folder(policy, model) if out is None else Path(out)
    path.mkdir(parents=True, exist_ok=True)
    named = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    raw = save({**named, _PROBE: probe(model)})
    file = f"calibration-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors"
    data = {
        "policy": policy,
        "model": model.name_or_path,
        "sizes": _sizes(model),
        "tensors": file,
        "settings": dict(settings),
    }
    _write(path / file, raw)
    _write(path / _DATA, json.dumps(data, indent=1).encode())
    for old in path.glob("calibration-*.safetensors"):
        if old.name != file:
            old.unlink()
    return path


def load_calibration(
    policy: str, model: PreTrainedModel, path: str | Path | None = None
) -> Calibration:
    """Read what ``policy`` learned about ``model`` from ``path`` (:func:`folder` where None).

    Raises:
        ValueError: if there is none, it cannot be read, or it is for another policy or model.
    """
    found = folder(policy, model) if path is None else Path(path)
    if not (found / _DATA).is_file():
        raise ValueError(
            f"no calibration of {policy} for {_name(model)} in {found}: "
            f"create_policy({policy!r}).calibrate(model, texts) makes one"
        )
    try:
        data = json.loads((found / _DATA).read_text())
        tensors = load_file(found / Path(data["tensors"]).name)
        theirs, sizes = tensors.pop(_PROBE), data["sizes"]
        of, settings, name = data["policy"], data["settings"], data["model"]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"the calibration in {found} cannot be read: {error}") from error
    if of != policy:
        raise ValueError(f"the calibration in {found} is for the policy {of}, not {policy}")
    own = probe(model)
    # Weights loaded in another dtype differ by its rounding.
    alike = own.shape == theirs.shape and torch.allclose(own, theirs, rtol=1e-2, atol=1e-6)
    if sizes != _sizes(model) or not alike:
        why = "its weights differ" if sizes == _sizes(model) else f"it has {sizes}"
        raise ValueError(
            f"the calibration in {found} is for another model, {name!r}, not for {_name(model)}: "
            f"{why}"
        )
    return Calibration(tensors, settings)


def probe(model: PreTrainedModel) -> Tensor:
    """A few weights of every layer by which a model is known again, float32 ``[n,8]``."""
    found = [p for name, p in model.named_parameters() if name.endswith("k_proj.weight")]
    return torch.stack([p.detach()[0, :8].float().cpu() for p in found])


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {name: getattr(config, name, None) for name in _SIZES}


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _write(path: Path, raw: bytes) -> None:
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_bytes(raw)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
