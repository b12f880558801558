"""Which layers stay softmax: named, by a ratio, or by what a layer's replacement costs.

The score of layer l is the rise of the KL divergence from the teacher's logits when l alone is
replaced by its aligned twin, on the second copy of a stretch of shuffled tokens: there a model
predicts well only if it finds the first copy, as it must to answer a question. Scoring takes one
pass a layer and needs no task. "ratio" divides by the rise on plain text (HALO, Chen et al.,
arXiv 2601.22156, with KL in place of benchmark averages).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from subquad.mixers.base import Mixer
from subquad.models import CausalLM
from subquad.ops import checks
from subquad.recipes.base import Recipe
from subquad.recipes.student import assemble, plan
from subquad.recipes.texts import Texts
from subquad.recipes.tune import divergence
from subquad.tasks.base import EVAL_SEEDS

ROWS, HALF = 8, 384


def named(keep: str | int, depth: int) -> list[int] | int:
    """The layers that ``keep`` names, or how many are to be chosen.

    Args:
        keep: layers, ``"0,5"``; ``"3:1"`` for three new ones to one kept (layer l is kept where
            (l + 1) is a multiple of 4, the last where none is); a number, to be chosen by score.

    Raises:
        ValueError: for anything else.
    """
    wrong = ValueError(
        f"keep must be layers like '0,5', a ratio like '3:1' or a number of 0..{depth}, "
        f"got {keep!r}"
    )
    if isinstance(keep, bool):
        raise wrong
    if isinstance(keep, int):
        if not 0 <= keep <= depth:
            raise wrong
        return keep if keep else []
    text = keep.strip()
    if not text:
        return []
    if match := re.fullmatch(r"(\d+):1", text):
        ratio = int(match[1])
        return [l for l in range(depth) if (l + 1) % (ratio + 1) == 0] or [depth - 1]
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        raise wrong
    layers = sorted({int(part) for part in text.split(",")})
    if layers[-1] >= depth:
        raise wrong
    return layers


@torch.no_grad()
def scores(
    teacher: CausalLM,
    mixers: Mapping[int, Mixer],
    recipe: Recipe,
    texts: Texts,
) -> dict[int, dict[str, float]]:
    """For each layer, ``{"recall", "plain", "score"}``: the KL that its replacement costs."""
    rows, half = ROWS, min(HALF, max(stage.length for stage in recipe.stages) // 2)
    plain = texts.tokens(rows, half, EVAL_SEEDS).to(teacher.device)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows, half, generator=generator).argsort(1).to(teacher.device)
    shuffled = plain.gather(1, order)
    repeated = torch.cat([shuffled, shuffled], 1)
    want = _logits(teacher, repeated)[:, half:-1], _logits(teacher, plain)
    out = {}
    for l in sorted(mixers):
        others = [other for other in range(teacher.config.depth) if other != l]
        config = plan(teacher, _softmax(recipe), others)
        model = assemble(teacher, config, {l: mixers[l]})
        recall = divergence(_logits(model, repeated)[:, half:-1], want[0]).item()
        on_plain = divergence(_logits(model, plain), want[1]).item()
        score = recall if recipe.scored == "recall" else min(50.0, recall / (on_plain + 1e-10))
        out[l] = {"recall": recall, "plain": on_plain, "score": score}
    return out


def best(found: Mapping[int, Mapping[str, float]], count: int) -> list[int]:
    """The ``count`` layers that score highest."""
    checks.positive("keep", count)
    ranked = sorted(found, key=lambda l: (-found[l]["score"], l))
    return sorted(ranked[:count])


def _softmax(recipe: Recipe) -> Recipe:
    """The recipe, with kept layers as the teacher has them."""
    return replace(recipe, kept="softmax", kept_options={})


def _logits(model: CausalLM, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits
