"""LongLoRA's fine-tuning: a pretrained model reads longer texts, few of its weights training.

Source: Chen et al., arXiv 2309.12307, sections 3.2 and 3.3; position interpolation:
arXiv 2306.15595.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from subquad.mixers.longlora import LongLoRA
from subquad.models import CausalLM
from subquad.ops import checks
from subquad.recipes.swap import swap

if TYPE_CHECKING:
    from peft import PeftModel

TRAINED_IN_FULL = ("embed", "norm")


def prepare(
    model: CausalLM,
    length: int,
    *,
    trained: int,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    trainable: tuple[str, ...] = TRAINED_IN_FULL,
    **options: Any,
) -> PeftModel:
    """Make ``model`` ready to be trained on texts of ``length`` tokens.

    Its softmax layers attend in shifted groups while training; positions are interpolated; q, k, v
    and o get LoRA adapters, and the weights whose name holds one of ``trainable`` train in full.
    All else is frozen. Before any training the outputs in ``eval()`` are those of the model with
    its positions interpolated.

    Args:
        trained: tokens of the texts that the model was trained on.
        rank, alpha, dropout: of LoRA: ``W x + alpha / rank B A x``.
        **options: of :class:`~subquad.mixers.longlora.LongLoRA`: group, ratio, variant.

    Raises:
        ValueError: where the model has no softmax layer.
    """
    from peft import LoraConfig, get_peft_model

    checks.positive("length", length)
    checks.positive("trained", trained)
    stretch = max(1, ceil(length / trained))
    before = {getattr(block.mixer, "rope_factor", 1.0) for block in model.blocks}
    longer = swap(model, "softmax", "longlora", **options, rope_factor=stretch * max(before))
    targets = [
        f"{name}.{part}_proj"
        for name, module in longer.named_modules()
        if isinstance(module, LongLoRA)
        for part in "qkvo"
    ]
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    tuned = get_peft_model(longer, lora)
    for name, parameter in tuned.named_parameters():
        if any(part in name for part in trainable):
            parameter.requires_grad_(True)
    return tuned


def finish(tuned: PeftModel) -> CausalLM:
    """The trained model with its adapters merged and full attention again."""
    return swap(tuned.merge_and_unload(), "longlora", "softmax")
