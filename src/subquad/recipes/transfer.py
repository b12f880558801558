"""Attention transfer: each new mixer learns what the attention it replaces does, by itself.

The teacher runs once a batch, layer by layer; a layer's loss is taken and its graph freed before
the next layer runs, so that one layer's activations exist at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subquad.mixers.base import Mixer
from subquad.models import CausalLM
from subquad.models.blocks import normed
from subquad.ops import checks
from subquad.ops.kernel_attention import Near
from subquad.recipes.base import Transfer
from subquad.recipes.fit import Groups

TINY = 1e-12


def trained(mixers: Mapping[int, Mixer], stage: Transfer) -> Groups:
    """The parameters that learn, a group a layer; all others are frozen.

    Raises:
        ValueError: where ``stage.train`` names none.
    """
    groups = {}
    for l, mixer in mixers.items():
        mixer.requires_grad_(False)
        names = {
            name: p
            for name, p in mixer.named_parameters()
            if not stage.train or any(part in name for part in stage.train)
        }
        if not names:
            raise ValueError(f"train must name parameters of the new mixer, got {stage.train}")
        for p in names.values():
            p.requires_grad_(True)
        groups[f"layer {l}"] = {f"layers.{l}.{name}": p for name, p in names.items()}
    return groups


def check(mixer: Mixer, stage: Transfer) -> None:
    """Raise ValueError where a mixer has nothing that the target could be compared with, and warn
    where the texts are so short that it is the softmax that it replaces."""
    wanted = {"heads": "heads_out", "weights": "weights"}.get(stage.target)
    if wanted is not None and not hasattr(mixer, wanted):
        raise ValueError(
            f"target must be 'output' for {type(mixer).__name__}, which has no {wanted}, "
            f"got {stage.target!r}"
        )
    near = getattr(mixer, "near", None)
    if isinstance(near, Near) and stage.length <= near.reach:
        warnings.warn(
            f"texts of {stage.length} tokens lie within the {near.reach} that "
            f"{type(mixer).__name__} reads by softmax: its feature maps learn nothing",
            stacklevel=2,
        )


def stepper(
    teacher: CausalLM, mixers: Mapping[int, Mixer], stage: Transfer, autocast: Callable[[], Any]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """One batch through the teacher, with each new mixer beside its layer."""
    last = max(mixers)

    def step(tokens: Tensor) -> dict[str, Tensor]:
        losses = {}
        h = teacher.embed_tokens(tokens)
        for l, block in enumerate(teacher.blocks[: last + 1]):
            with torch.no_grad(), autocast():
                x = normed(block.mixer_norm, h)
                target, y = _target(block.mixer, x, stage.target)
            if l in mixers:
                with autocast():
                    loss = difference(mixers[l], x, target, stage.target)
                (loss * stage.scale).backward()
                losses[f"layer {l}"] = loss.detach()
            if l == last:
                break
            with torch.no_grad(), autocast():
                h = h + y
                if block.mlp is not None:
                    h = h + block.mlp(normed(block.mlp_norm, h))
        return losses

    return step


def difference(mixer: Any, x: Tensor, target: Tensor, kind: str) -> Tensor:
    """The loss of a new mixer against what its layer did, a float32 scalar at least."""
    checks.one_of("target", kind, ("heads", "output", "weights"))
    if kind == "weights":
        a = mixer.weights(x, _context(mixer, x))
        a = a.to(torch.promote_types(a.dtype, torch.float32)).clamp_min(TINY)
        return -(target.to(a.dtype) * a.log()).sum(-1).mean()
    if kind == "heads":
        found = mixer.heads_out(x, _context(mixer, x))[0]
    else:
        found = mixer(x)[0]
    wide = torch.promote_types(found.dtype, torch.float32)
    return nn.functional.mse_loss(found.to(wide), target.to(wide))


def _target(mixer: Any, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What the new mixer is compared with, and the layer's own output."""
    if kind == "output":
        y = mixer(x)[0]
        return y, y
    context = _context(mixer, x)
    heads = mixer.heads_out(x, context)[0]
    y = mixer.o_proj(heads.flatten(-2))
    return (mixer.weights(x, context) if kind == "weights" else heads), y


def _context(mixer: Any, x: Tensor) -> Any:
    return mixer._context(x, None, None, None, None, None)
