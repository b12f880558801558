"""What goes on inside a pretrained decoder: one file an analysis."""

from __future__ import annotations

import dataclasses
from typing import Any

from subquad import catalogue
from subquad.ops import checks


def analyse(model: Any, tokenizer: Any, what: str, **options: Any) -> Any:
    """Run an analysis by its key in the catalogue on a decoder of transformers.

    Args:
        model: any decoder of transformers that uses its ``AttentionInterface``.
        tokenizer: its tokenizer.
        what: "retrieval_heads" or "secondary_sinks".
        **options: of the analysis; see the class that its card names.

    Returns:
        The analysis' result: ``summary()`` is plain data, ``draw(folder)`` writes its pictures.
    """
    cards = {card.key: card for card in catalogue.systems(kind="analysis")}
    checks.one_of("what", what, cards)
    made = cards[what].load()
    for option in options:
        known = [field.name for field in dataclasses.fields(made)]
        checks.one_of(f"options of {what!r}", option, known)
    return made(**options).run(model, tokenizer)
