"""``convert``: a pretrained decoder through the stages of a recipe, to a model on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from subquad.models import CausalLM
from subquad.models.checkpoint import known, tokenizer_of
from subquad.ops import checks
from subquad.recipes import choose, create_recipe
from subquad.recipes.base import Recipe
from subquad.recipes.card import write_card
from subquad.recipes.conversion import Conversion
from subquad.recipes.fit import Tell
from subquad.recipes.folder import Folder, enough_disk
from subquad.recipes.teacher import import_decoder, refuse_windows
from subquad.recipes.texts import Texts
from subquad.tasks.base import Task


def convert(
    model: Any,
    recipe: Recipe | str,
    texts: str | os.PathLike[str] | Sequence[str] | Task,
    *,
    out: str | os.PathLike[str],
    keep: str | int = "",
    layers: Iterable[int] | None = None,
    at_once: int | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    save_every: int | None = None,
    progress: Tell | None = None,
) -> CausalLM | None:
    """Replace the attention of a pretrained model and train it to do without.

    Killed at any point, the same call with ``resume=True`` goes on and ends with the same weights.

    Args:
        model: a folder or name for AutoModelForCausalLM, or the model itself.
        recipe: a :class:`Recipe`, or its key.
        texts: a file or folder, "stdlib" for the source of Python's standard library, strings, or
            a task whose inputs are texts; some 5% are held out.
        out: the folder of the converted model.
        keep: layers that stay softmax: ``"0,5"``, ``"3:1"`` (new to kept), or how many, chosen by
            what the replacement of each costs (see ``recipes.choose``).
        layers: transfer these layers alone and stop; later calls (``resume=True``) use them.
        at_once: layers that are transferred together; all where None.
        tokenizer: where the model's folder holds none.
        resume, overwrite: what to do where ``out`` exists.
        device: "cpu" or "cuda"; what there is where None.
        dtype: what is computed in, "float32" or "bfloat16" (autocast; the weights are float32).
        save_every: steps between checkpoints; one a minute where None.
        progress: is told ``{"cells", "cell", "index", "total", "done"}`` before a stage and
            ``{"step", "loss", "losses", "tokens_per_second", "left"}`` in it.

    Returns:
        The converted model; None with ``layers``.

    Raises:
        ValueError: for what does not fit, before any work.
    """
    recipe = create_recipe(recipe) if isinstance(recipe, str) else recipe
    checks.one_of("dtype", dtype, ("float32", "bfloat16"))
    if device is not None:
        checks.device(device)
    for name, count in (("at_once", at_once), ("save_every", save_every)):
        if count is not None:
            checks.positive(name, count)
    folder = Folder(out, resume=resume, overwrite=overwrite)
    source = model if isinstance(model, str | os.PathLike) else None
    if source is not None:
        tokenizer, model = _load(source, tokenizer)
    given = Texts(texts, tokenizer)
    teacher = import_decoder(model).eval().requires_grad_(False)
    kept = choose.named(keep, teacher.config.depth)
    enough_disk(folder.path, teacher, recipe)
    run = Conversion(teacher, recipe, given, folder, kept, dtype, save_every, progress)
    alone = run.checked(layers)
    about = {"model": str(source or type(model).__name__), "keep": keep}
    folder.begin(run.identity(), about)
    if folder.record["done"]:
        return CausalLM.from_pretrained(folder.path)
    teacher.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    converted = run.go(alone, at_once)
    if converted is not None:
        converted.save_pretrained(folder.path)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder.path)
        write_card(folder.path, folder.record)
        folder.finish()
    return converted


def _load(source: str | os.PathLike[str], tokenizer: Any) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder; a model that cannot be converted is not loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known(source)
    tokenizer = tokenizer_of(source) if tokenizer is None else tokenizer
    refuse_windows(AutoConfig.from_pretrained(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return tokenizer, model
