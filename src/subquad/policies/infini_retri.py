"""InfiniRetri: a text of any length is read window by window; the sentences that the question looks
at are kept, and the answer is written from these alone.

Ye et al. 2025, Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing, arXiv
2502.12962.

Legend: c tokens of the context in a window, u of the question (to the end of the prompt).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.policies.base import Look, Policy, Site
from subquad.policies.parts.compress import weights
from subquad.policies.parts.identify import tokenizer_of

ENDS = re.compile(r"(\n\n)|([。！？.?!])")
SHORT = 8  # characters: what is no longer and follows a full stop was an abbreviation's
Sentence = list[int]


@dataclass(frozen=True)
class InfiniRetri(Policy):
    """The prompt is read as ``template`` says, its context by windows. Attention itself is the
    model's own; the cache holds the sentences kept at the end, the question and the answer.

    Attributes:
        window: tokens of the context read at once, besides those kept so far.
        topk: tokens whose sentences are kept.
        phrase: tokens over which attention is summed, a phrase's length.
        template: of the prompt, with "{context}" and "{question}".
        method: 1 looks at the attention as it is, 2 weighs the question's tokens, 3 sums over
            phrases, too.
        layer_index: the attention layer that is looked at; None for the last, the paper's.
        tokenizer: with encode and decode; None for the model's own, by its name.
    """

    batched: ClassVar[bool] = False

    window: int = 1024
    topk: int = 300
    phrase: int = 8
    template: str = "{context}\n\n{question}"
    method: int = 3
    layer_index: int | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("window", "topk", "phrase"):
            checks.positive(name, getattr(self, name))
        checks.one_of("method", self.method, (1, 2, 3))
        parts = re.split(r"\{context\}(.+)\{question\}", self.template, flags=re.S)
        if len(parts) != 3:
            raise ValueError(
                "template must hold {context} and after it, apart, {question}, "
                f"got {self.template!r}"
            )

    def prepare(self, model: Any) -> InfiniRetri:
        return dataclasses.replace(self, tokenizer=tokenizer_of(model, self.tokenizer))

    def check(self, sites: list[Site]) -> None:
        if self.layer_index is not None and not 0 <= self.layer_index < len(sites):
            raise ValueError(f"layer_index must lie in 0..{len(sites) - 1}, got {self.layer_index}")

    def read(self, ids: Tensor, look: Look) -> Tensor:
        before, context, between, question = self.parts(self.tokenizer.decode(ids[0].tolist()))
        head, middle, tail = (self._encode(text) for text in (before, between, question))
        kept: list[Sentence] = []
        by: Tensor | None = None

        def prompt(sentences: list[Sentence]) -> Tensor:
            tokens = [*head, *(i for s in sentences for i in s), *middle, *tail]
            return torch.tensor([tokens], dtype=ids.dtype, device=ids.device)

        for chunk in self.chunks(context):
            sentences = kept + chunk
            call = look(prompt(sentences), self.layer_index)
            last = call.q[0, -len(tail) :]
            # Every head's attention from the question, the sum.
            seen = sum(a.sum(0) for a in weights(last, call.k[0], call.scale, call.site.window))
            assert isinstance(seen, Tensor)
            by = seen[:, -len(tail) :].sum(1) if by is None else by
            size = sum(map(len, sentences))
            score = self.scores(seen[:, len(head) : len(head) + size], by)
            kept = hit(sentences, score.topk(min(self.topk, size)).indices)
        return prompt(kept)

    def scores(self, attention: Tensor, by: Tensor) -> Tensor:
        """How much the question looks at each token of the context, ``[c]``.

        Args:
            attention: ``[u,c]``, of the question's tokens, summed over heads.
            by: ``[u]``, how much each of them is looked at by the question itself.
        """
        if self.method == 3:
            after = (self.phrase - 1) // 2
            padded = F.pad(attention, (self.phrase - 1 - after, after))
            attention = F.avg_pool1d(padded[None], self.phrase, 1)[0] * self.phrase
        if self.method > 1:
            attention = by[:, None].square() * attention
        return attention.sum(0)

    def parts(self, text: str) -> tuple[str, str, str, str]:
        """What the template has before the context, the context, what is between, and the question
        with all that follows it.

        Raises:
            ValueError: if the prompt is not of the template.
        """
        before, between, after = re.split(r"\{context\}(.+)\{question\}", self.template, flags=re.S)
        body = text.removeprefix(before)
        end = len(body) - len(after) if after and body.endswith(after) else len(body)
        context, found, question = body[:end].rpartition(between)
        if not found or not text.startswith(before) or not body.endswith(after):
            raise ValueError(f"the prompt must be of the template {self.template!r}")
        return before, context, between, question + body[end:]

    def _encode(self, text: str) -> Sentence:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def chunks(self, context: str) -> Iterator[list[Sentence]]:
        """Sentences in order, as many at once as fit into a window."""
        chunk: list[Sentence] = []
        size = 0
        for sentence in self._sentences(context):
            if chunk and size + len(sentence) > self.window:
                yield chunk
                chunk, size = [], 0
            chunk.append(sentence)
            size += len(sentence)
        if chunk:
            yield chunk

    def _sentences(self, context: str) -> Iterator[Sentence]:
        for text in sentences(context):
            yield from self._fitting(text)

    def _fitting(self, text: str) -> Iterator[Sentence]:
        """A sentence's tokens; a longer one than the window is halved at a space."""
        tokens = self._encode(text)
        middle = text.find(" ", len(text) // 2)
        middle = middle if middle > 0 else text.rfind(" ", 1)
        if len(tokens) <= self.window or middle < 1:
            if tokens:
                yield tokens
            return
        yield from self._fitting(text[:middle])
        yield from self._fitting(text[middle:])


def sentences(text: str) -> list[str]:
    """The text cut behind its full stops and empty lines; joined it is the text again."""
    ends = [0, *(match.end() for match in ENDS.finditer(text)), len(text)]
    out: list[str] = []
    for start, end in pairwise(ends):
        piece = text[start:end]
        if out and out[-1].endswith(".") and len(piece) <= SHORT:
            out[-1] += piece
        elif piece:
            out.append(piece)
    return out


def hit(sentences: list[Sentence], tokens: Tensor) -> list[Sentence]:
    """The sentences that hold some of the ``tokens``, counted through all of them, in order."""
    chosen = set(tokens.tolist())
    ends = accumulate(map(len, sentences))
    return [s for s, end in zip(sentences, ends) if chosen & set(range(end - len(s), end))]
