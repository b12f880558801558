"""What goes on inside a pretrained decoder: one file an analysis."""

from __future__ import annotations

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
    try:
        analysis = cards[what].load()(**options)
    except TypeError as error:
        raise ValueError(f"options of {what!r}: {error}") from None
    return analysis.run(model, tokenizer)
