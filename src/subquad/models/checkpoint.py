"""Checkpoints that are whole or not there: saving aside, loading with every key accounted for."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from subquad.models.blocks import Block, build_mixer


class Checkpoints(PreTrainedModel):
    """What a model of mixers adds to transformers' saving and loading."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers' own, but a failure (a full disk) leaves an older checkpoint intact.

        Raises:
            OSError: where it could not be saved.
        """
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        with aside(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, from safetensors alone, and only where every key fits.

        Raises:
            ValueError: for a truncated file, keys that are missing, unexpected or of another
                shape (named), and the config of another kind of model.
        """
        name = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(
                name,
                *model_args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **{"use_safetensors": True, **kwargs},
            )
        except SafetensorError as error:
            raise ValueError(f"checkpoint {name} is corrupt: {error}") from error
        model, info = loaded
        if not ignore_mismatched_sizes:
            refuse_differences(str(name), info)
        restore_constants(model)
        return (model, info) if output_loading_info else model


def known(name: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds no model before transformers looks for its name elsewhere.

    Raises:
        ValueError: for what is no folder with a config.json and looks like a path.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return
    named = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    if path.exists() or not named or (path.parent != Path() and path.parent.exists()):
        raise ValueError(
            f"model must be a folder with a config.json or a name, got {os.fspath(name)!r}"
        )


def tokenizer_of(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model's folder or name.

    Raises:
        ValueError: where there is none, or no model.
    """
    from transformers import AutoTokenizer

    known(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer missing: {name} holds none ({error})") from None


@torch.no_grad()
def restore_constants(model: Any) -> None:
    """Fill the mixers' buffers that no checkpoint holds, which loading leaves uninitialised."""
    blocks = (module for module in model.modules() if isinstance(module, Block))
    for layer, block in enumerate(blocks):
        names = _unsaved_buffers(block.mixer)
        if names:
            fresh = build_mixer(model.config, layer)
            for name in names:
                block.mixer.get_buffer(name).copy_(fresh.get_buffer(name))


def _unsaved_buffers(module: nn.Module) -> list[str]:
    saved = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in saved]


@contextmanager
def aside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder beside ``folder``, whose files replace those of ``folder`` at the end.

    Each file is complete on disk before it takes its name. If anything fails inside the block,
    ``folder`` stays as it was.

    Raises:
        OSError: where the disk is full or cannot be written, naming the folder.
    """
    target = Path(os.path.abspath(folder))
    if target.exists() and not target.is_dir():
        raise ValueError(f"a checkpoint must be saved to a folder, {target} is a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, f"nothing was saved to {target}: {error.strerror}") from error
    try:
        yield fresh
        files = [path for path in fresh.rglob("*") if path.is_file()]
        for path in files:
            _sync(path)
        _replace(fresh, target, files)
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"{target} was left as it was, saving failed: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force the file to disk, where a full disk shows at the latest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(fresh: Path, target: Path, files: list[Path]) -> None:
    """Move the files over, weights first, and drop the shards of an older checkpoint."""
    names = {path.relative_to(fresh) for path in files}
    for name in sorted(names, key=lambda name: (name.suffix == ".json", str(name))):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, target / name)
    if any(_is_weights(name) for name in names):
        for path in target.iterdir():
            if _is_weights(path) and path.relative_to(target) not in names:
                path.unlink()


def _is_weights(path: Path) -> bool:
    return path.name.startswith("model") and path.name.endswith(
        (".safetensors", ".safetensors.index.json")
    )


def refuse_differences(where: str, info: dict[str, Any]) -> None:
    """Raise ValueError naming the keys in which a checkpoint differs from its model."""
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(
            f"{key} {list(saved)} instead of {list(wanted)}"
            for key, saved, wanted in info["mismatched_keys"]
        ),
    }
    said = [f"{what}: {_some(keys)}" for what, keys in found.items() if keys]
    if said:
        raise ValueError(f"checkpoint {where} does not fit its config.json; {'; '.join(said)}")


def _some(keys: list[str], most: int = 8) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
