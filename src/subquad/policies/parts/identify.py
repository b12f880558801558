"""Which heads need the whole text: gates that are optimised on passkeys hidden in it.

DuoAttention (Xiao et al. 2025, arXiv 2410.10819), section 2.3 and the authors' code.

Legend: B batch, T tokens, H query heads, G key heads, K head dim, C model dim, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad import mask
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.policies.base import Call, Policy

WORDS = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"),
    *("kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango"),
    *("uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
BREAK = "\n\n"
FACT = "Remeber this sequence of words, it's the {which} passkey to the vault: {words}"
ASK = "What is the {which} passkey to the vault? The {which} passkey is:"


@dataclass(frozen=True, kw_only=True)
class Identification:
    """How gates are found.

    Attributes:
        steps: of AdamW, one text each; lr: its rate, which rises in the first fifth of the steps
            and falls in the last; reg: the price of a gate.
        sinks, recent: what a head sees that streams.
        lengths: least and most tokens of a haystack.
        passkeys: at most 10; words: of each; alphabet: they are drawn from.
        teacher_forced: full attention is that of the model's own hidden states, as the authors'
            code has it; else that of the gated ones.
    """

    steps: int = 2000
    lr: float = 0.02
    reg: float = 0.05
    sinks: int = 128
    recent: int = 256
    lengths: tuple[int, int] = (1000, 32000)
    passkeys: int = 10
    words: int = 32
    alphabet: tuple[str, ...] = WORDS
    teacher_forced: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "recent", "passkeys", "words"):
            checks.positive(name, getattr(self, name))
        for name in ("sinks", "seed"):
            checks.positive(name, getattr(self, name), zero=True)
        if self.passkeys > len(ORDINALS):
            raise ValueError(f"passkeys must be at most {len(ORDINALS)}, got {self.passkeys}")
        if not (self.lr > 0 and self.reg >= 0):
            raise ValueError(f"lr must be > 0 and reg >= 0, got {self.lr} and {self.reg}")
        low, high = self.lengths
        if not 0 < low <= high:
            raise ValueError(f"lengths must be (least, most), positive, got {self.lengths}")

    def factor(self, step: int) -> float:
        """What the rate is multiplied by."""
        fifth = self.steps / 5
        return min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))


class Passkeys:
    """Endless texts with passkeys in them, and which of their tokens are answers."""

    def __init__(self, tokenizer: Any, texts: Iterable[str], settings: Identification) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.settings, self.generator = settings, torch.Generator().manual_seed(settings.seed)
        most = settings.lengths[1]
        ids = itertools.chain.from_iterable(self.encode(text) for text in texts)
        self.haystack = torch.tensor(list(itertools.islice(ids, 64 * most)))
        if len(self.haystack) < most:
            raise ValueError(f"texts must have {most} tokens or more, got {len(self.haystack)}")

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """ids int64 ``[1,T]``, and bool ``[T]``, the tokens of the answers."""
        s = self.settings
        sizes = torch.linspace(*s.lengths, 50).long()
        depths = torch.linspace(0.05, 0.95, 1000)
        while True:
            length = int(sizes[self._integer(0, len(sizes))])
            start = self._integer(0, len(self.haystack) - length + 1)
            hay = self.haystack[start : start + length]
            chosen = torch.randperm(len(depths), generator=self.generator)[: s.passkeys]
            places = (depths[chosen.sort().values] * length).long().tolist()
            keys = [self._words() for _ in places]
            ids: list[int] = []
            last = 0
            for which, (place, words) in enumerate(zip(places, keys, strict=True)):
                fact = FACT.format(which=ORDINALS[which], words=words)
                ids += [*hay[last:place].tolist(), *self.encode(f"{BREAK}{fact}{BREAK}")]
                last = place
            ids += hay[last:].tolist()
            answer = [False] * len(ids)
            for which, words in enumerate(keys):
                ask = self.encode(f"{BREAK}{ASK.format(which=ORDINALS[which])}")
                said = self.encode(f" {words}")
                ids += ask + said
                answer += [False] * len(ask) + [True] * len(said)
            yield torch.tensor([ids]), torch.tensor(answer)

    def _words(self) -> str:
        alphabet = self.settings.alphabet
        return " ".join(
            alphabet[self._integer(0, len(alphabet))] for _ in range(self.settings.words)
        )


class Gated(Policy):
    """The two ways of a text: first the whole one, whose attention is noted, then the gated one.

    Attributes:
        gates: ``[L,G]``, or None for the whole way.
        noted: the whole way's attention of each layer.
    """

    def __init__(self, settings: Identification) -> None:
        self.settings = settings
        self.gates: Tensor | None = None
        self.noted: dict[int, Tensor] = {}

    def prefill(self, call: Call) -> Tensor:
        layer = call.site.index
        if self.gates is None:
            self.noted[layer] = call.dense()
            return self.noted[layer]
        whole = self.noted[layer] if self.settings.teacher_forced else call.dense()
        return mix(whole, self.stream(call), self.gates[layer])

    def stream(self, call: Call) -> Tensor:
        """Attention to the sinks and the recent tokens, itself among these, ``[B,T,H,V]``."""
        s = self.settings
        m = mask.causal() & (mask.sinks(s.sinks) | mask.window(s.recent - 1))
        if call.site.window is not None:
            m = m & mask.window(call.site.window - 1)
        return attention(call.q, call.k, call.v, m, scale=call.scale)


def mix(whole: Tensor, stream: Tensor, gates: Tensor) -> Tensor:
    """``g whole + (1 - g) stream`` of ``[B,T,H,V]``; a gate for each key head, ``[G]``, in 0..1."""
    g = gates.clamp(0, 1).repeat_interleave(whole.shape[2] // len(gates))[:, None].to(whole.dtype)
    return g * whole + (1 - g) * stream


def identify(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    settings: Identification,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Tensor:
    """The gates ``[L,G]``, float32 in 0..1; the model is left as it was."""
    from subquad.policies.hook import apply
    from subquad.policies.parts.decoder import decoder_of

    data, policy, decoder = iter(Passkeys(tokenizer, texts, settings)), Gated(settings), None
    needed = [(p, p.requires_grad) for p in model.parameters()]
    training, device = model.training, model.device
    model.eval().requires_grad_(False)
    try:
        with apply(model, policy) as on:
            decoder = decoder_of(model)
            shape = len(on.sites), on.sites[0].kv_heads
            gates = torch.ones(shape, device=device, requires_grad=True)
            optimiser = torch.optim.AdamW([gates], lr=settings.lr, weight_decay=0.0)
            for step in range(settings.steps):
                ids, answer = (x.to(device) for x in next(data))
                with torch.no_grad():
                    gates.clamp_(0, 1)
                    policy.gates = None
                    want = decoder(input_ids=ids, use_cache=False).last_hidden_state
                policy.gates = gates
                got = decoder(input_ids=ids, use_cache=False).last_hidden_state
                distill = loss(want, got, answer)
                total = distill + settings.reg * gates.abs().mean()
                for group in optimiser.param_groups:
                    group["lr"] = settings.lr * settings.factor(step)
                optimiser.zero_grad()
                total.backward()
                optimiser.step()
                if progress is not None:
                    at = {"step": step + 1, "loss": total.item(), "distill": distill.item()}
                    progress({**at, "mean": gates.detach().clamp(0, 1).mean().item()})
    finally:
        model.train(training)
        for p, wanted in needed:
            p.requires_grad_(wanted)
    return gates.detach().clamp(0, 1).float().cpu()


def loss(want: Tensor, got: Tensor, answer: Tensor) -> Tensor:
    """The squared difference of last hidden states ``[1,T,C]`` at the answers ``[T]``, the mean."""
    return (want[:, answer].float() - got[:, answer].float()).square().mean()


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """``tokenizer`` itself, or the one that goes by the model's name."""
    if tokenizer is not None:
        return tokenizer
    if not model.name_or_path:
        raise ValueError("tokenizer must be given: the model has no name to find its own by")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.name_or_path)
