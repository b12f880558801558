"""Turning a pretrained model into another: one file per conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.recipes.base import Recipe

# The only list of the recipes for ``convert``.
RECIPES = {
    "gated_deltanet": "subquad.recipes.hybrid:Hybrid",
    "hedgehog": "subquad.recipes.hedgehog:Hedgehog",
    "kimi_linear": "subquad.recipes.hybrid:HybridKimi",
    "lawcat": "subquad.recipes.lawcat:LAWCAT",
    "lolcats": "subquad.recipes.lolcats:LoLCATs",
    "sala": "subquad.recipes.sala:SALA",
    "still": "subquad.recipes.still:STILL",
}


def create_recipe(
    name: str,
    *,
    transfer: Mapping[str, Any] | None = None,
    tune: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe by its key, e.g. ``create_recipe("lolcats", options={"window": 32}, steps=200)``.

    Args:
        **changes: fields of the recipe (``options`` are added to its own), and ``steps``,
            ``batch``, ``length`` or ``seed`` for every stage.
        transfer, tune: fields of the stages of that kind alone, after ``changes``.

    Raises:
        ValueError: for an unknown recipe, with the nearest ones, or unknown changes.
    """
    from subquad.recipes.base import EVERY

    checks.one_of("recipe", name, RECIPES)
    module, _, attribute = RECIPES[name].partition(":")
    recipe: Recipe = getattr(import_module(module), attribute)()
    stages = {k: changes.pop(k) for k in EVERY if k in changes}
    if "options" in changes:
        changes["options"] = {**recipe.options, **changes["options"]}
    for change in changes:
        known = [*EVERY, *(field.name for field in fields(recipe))]
        checks.one_of(f"changes of recipe {name!r}", change, known)
    recipe = replace(recipe, **changes)
    recipe = recipe.with_stages(**stages).with_stages("transfer", **transfer or {})
    return recipe.with_stages("tune", **tune or {})
