"""The whole converted model learns: the next token or the teacher's logits, LoRA or all weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.models import CausalLM
from subquad.models.loss import CHUNK_ELEMENTS
from subquad.recipes.base import Tune
from subquad.recipes.fit import Groups


def prepared(model: CausalLM, stage: Tune, layers: Collection[int]) -> tuple[nn.Module, Groups]:
    """The model as it is trained, with adapters in ``layers`` where the stage says so, and what
    learns."""
    model.requires_grad_(False)
    tuned: nn.Module = model
    if stage.how == "lora":
        from peft import LoraConfig, get_peft_model

        theirs = {id(m) for l in layers for m in model.blocks[l].mixer.modules()}
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and id(module) in theirs
            and name.rpartition(".")[2] in stage.targets
        ]
        if not names:
            raise ValueError(f"targets must name projections of the mixers, got {stage.targets}")
        lora = LoraConfig(
            r=stage.rank, lora_alpha=stage.alpha, lora_dropout=0.0, target_modules=names
        )
        with torch.random.fork_rng([]):  # the adapters' first weights are part of the result
            torch.manual_seed(stage.seed)
            tuned = get_peft_model(model, lora)
    learning = {}
    for name, p in tuned.named_parameters():
        chosen = (
            "lora_" in name or any(part in name for part in stage.train)
            if stage.how == "lora"
            else True
        )
        p.requires_grad_(chosen)
        if chosen:
            learning[name] = p
    return tuned, {"model": learning}


def merged(tuned: Any) -> CausalLM:
    """The model alone, adapters added to its weights."""
    model = tuned if isinstance(tuned, CausalLM) else tuned.merge_and_unload()
    return model.eval().requires_grad_(False)


def stepper(
    tuned: nn.Module, teacher: CausalLM, stage: Tune, autocast: Callable[[], Any]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """One batch: the loss and its gradient."""

    def step(tokens: Tensor) -> dict[str, Tensor]:
        if stage.loss == "next":
            with autocast():
                loss = tuned(input_ids=tokens, labels=tokens, use_cache=False).loss
        else:
            with autocast():
                found = tuned(input_ids=tokens, use_cache=False).logits
                with torch.no_grad():
                    wanted = teacher(tokens, use_cache=False).logits
            loss = divergence(found, wanted)
        loss.backward()
        return {"model": loss.detach()}

    return step


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the tokens of ``KL(wanted || found)``, in float32 a few rows at a time."""

    def total(a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide).log_softmax(-1), b.to(wide).log_softmax(-1)
        return F.kl_div(a, b, reduction="sum", log_target=True)

    rows = max(1, CHUNK_ELEMENTS // found.shape[-1])
    pairs = zip(found.flatten(0, -2).split(rows), wanted.flatten(0, -2).split(rows), strict=True)
    # Nothing in it is random: the state of the generators need not be kept.
    parts = [
        checkpoint(total, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in pairs
    ]
    return torch.stack(parts).sum() / found[..., 0].numel()
