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


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """:func:`encode` of every text, at once where the tokenizer is one of the tokenizers library:
    there on all cores, and without stopping other threads of Python."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    # What is set to pad or to cut would do so here, where transformers' encode sets it aside.
    if getattr(fast, "padding", 0) is None and getattr(fast, "truncation", 0) is None:
        run = getattr(fast, "encode_batch_fast", fast.encode_batch)
        return [found.ids for found in run(list(texts), add_special_tokens=False)]
    return [encode(tokenizer, text) for text in texts]


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
