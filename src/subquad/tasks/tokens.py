"""Any tokenizer object, bytes by default, behind three functions.

A tokenizer has ``encode(text)`` and ``decode(ids)``: those of transformers and tokenizers do, and
so may one of your own. None stands for bytes: the ids are those of UTF-8, 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of ``text``, without special tokens."""
    if tokenizer is None:
        return list(text.encode())
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except TypeError:
        ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
    if tokenizer is None:
        return bytes(ids).decode(errors="replace")
    return tokenizer.decode(list(ids))


def vocabulary(tokenizer: Any) -> int:
    """How many ids there are, added tokens included.

    Raises:
        ValueError: if the object is no tokenizer.
    """
    if tokenizer is None:
        return 256
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
        raise ValueError(
            f"tokenizer must have encode(text) and decode(ids), or be None for bytes, "
            f"got {type(tokenizer).__name__}"
        )
    if hasattr(tokenizer, "get_vocab_size"):
        return tokenizer.get_vocab_size()
    return len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.vocab_size
