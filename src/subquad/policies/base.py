"""The contract of a policy: how a pretrained model attends to its past, without training.

Legend: B batch, T new tokens, S cached entries, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from subquad import catalogue
from subquad import mask as masks
from subquad.caches.kv import KVLayer
from subquad.mask import Mask
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.attention.token import Rope, token


@dataclass(frozen=True)
class Site:
    """Where a policy works: one attention layer of the model.

    Attributes:
        index: of the layer; layers: how many the model has.
        heads, kv_heads, head_dim: H, G, K.
        window: the model's own sliding window here, None where it attends to everything.
    """

    index: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass
class Pairs:
    """(query, key) pairs over all heads, layers and rows.

    Attributes:
        attended: what the policy's attention read.
        visible: what the model without a policy would have.
    """

    attended: int = 0
    visible: int = 0

    @property
    def fraction(self) -> float:
        return self.attended / self.visible if self.visible else 1.0


@dataclass
class Tally:
    """The pairs of prompts (T > 1) and of decoded tokens."""

    prefill: Pairs = field(default_factory=Pairs)
    decode: Pairs = field(default_factory=Pairs)

    def add(self, tokens: int, attended: int = 0, visible: int = 0) -> None:
        pairs = self.prefill if tokens > 1 else self.decode
        pairs.attended += attended
        pairs.visible += visible


@dataclass(frozen=True)
class Call:
    """One forward pass through one attention layer.

    Attributes:
        site: where.
        q, k, v: the new tokens, ``[B,T,H,K]``, ``[B,T,G,K]``, ``[B,T,G,V]``; rotated, unless the
            policy asks for late rotation.
        layer: the cache layer, which already holds k and v.
        scale: of the scores.
        real: bool ``[B, tokens seen]``, False at padding (on the left); None without padding.
        positions: int64 ``[B,T]`` of the new tokens, as the model counts them.
        rotate: ``rotate(x [B,S,*,K], positions [B,S]) -> x`` rotates with the model's own RoPE.
        rope: ``rope(n)`` gives that in numbers, for positions 0..n-1; None where it has no such.
        tally: where to count the pairs attended to; None where nobody asks.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    layer: KVLayer
    scale: float
    real: Tensor | None
    positions: Tensor
    rotate: Callable[[Tensor, Tensor], Tensor]
    tally: Tally | None = None
    rope: Callable[[int], Rope | None] = lambda n: None

    @property
    def first(self) -> bool:
        """Whether these tokens are the first that the layer sees."""
        return self.layer.seen == self.q.shape[1]

    @property
    def starts(self) -> list[int]:
        """Columns of padding at the start of each row."""
        return self.layer.starts or [0] * self.q.shape[0]

    def mask(self) -> Mask:
        """Who may see whom in the model without any policy: causal, its own window, padding."""
        m = masks.causal()
        if self.site.window is not None:
            m = m & masks.window(self.site.window - 1, 0)
        if self.real is not None:
            held = self.real[:, -self.layer.keys.shape[1] :]
            m = m & masks.documents(torch.where(held, 0, -1))
        return m

    def attend(self, m: Mask | None = None) -> Tensor:
        """Attend to those of the layer's keys that the model and ``m`` let be seen, and count
        them: ``o [B,T,H,V]``. The layer must hold its keys in order."""
        m = self.mask() if m is None else self.mask() & m
        if self.tally is not None:
            shape = self.q.shape[1], self.layer.keys.shape[1]
            planes = m.planes[0] * m.planes[1]
            self.count(m.area(*shape) * self.q.shape[0] * self.site.heads // planes)
        return attention(self.q, self.layer.keys, self.layer.values, m, scale=self.scale)

    def dense(self) -> Tensor:
        """Attend to everything that the layer holds, ``[B,T,H,V]``: the model without a policy."""
        if self.layer.clock is not None:
            return token(self.q, *self.layer.held(), scale=self.scale, window=self.site.window)
        return self.attend()

    def count(self, pairs: int | Tensor) -> None:
        """Add to the pairs attended to, where somebody asks."""
        if self.tally is not None:
            self.tally.add(self.q.shape[1], attended=int(pairs))

    def visible(self) -> int:
        """The pairs that the model without any policy attends to."""
        T, window = self.q.shape[1], self.site.window or self.layer.seen
        pairs = 0
        for start in self.starts:
            after = self.layer.seen - start
            before = max(after - T, 0)
            # Token i sees min(i + 1, window) keys; sum over before <= i < after.
            pairs += _ramp(after, window) - _ramp(before, window)
        return pairs * self.site.heads

    def rows(self) -> Iterator[Call]:
        """The same call for each row alone, without its padding (T may differ, and be 0)."""
        T = self.q.shape[1]
        for b, start in enumerate(self.starts):
            own, skip = slice(b, b + 1), max(start - (self.layer.seen - T), 0)
            yield dataclasses.replace(
                self,
                q=self.q[own, skip:],
                k=self.k[own, skip:],
                v=self.v[own, skip:],
                layer=self.layer.row(b),
                real=None,
                positions=self.positions[own, skip:],
            )

    def unpadded(self, attend: Callable[[Call], Tensor]) -> Tensor:
        """``attend``, which need not know of padding: each row alone where there is some.

        Where a system counts blocks from the first token, padding would move them.
        """
        if self.real is None:
            return attend(self)
        o = self.q.new_zeros(*self.q.shape[:3], self.v.shape[3])
        for b, row in enumerate(self.rows()):
            if row.q.shape[1]:
                o[b : b + 1, -row.q.shape[1] :] = attend(row)
        return o


Look = Callable[[Tensor, int | None], Call]


def _ramp(n: int, top: int) -> int:
    """The sum of min(i + 1, top) over i < n."""
    low = min(n, top)
    return low * (low + 1) // 2 + (n - low) * top


class Policy:
    """How the prompt and the generated tokens attend, and what the cache keeps.

    A subclass is a frozen dataclass of its budgets. It writes ``prefill``, ``decode``, ``layer``,
    ``settle``, or some of them; what it leaves alone stays as the model has it, and ``A() + B()``
    joins a policy for the prompt with one for decoding.

    Class attributes:
        late_rope: the cache keeps keys before their rotation and the policy rotates them
            (``Call.rotate``), as renumbered positions need.
        batched: whether it takes more than one sequence at a time.
    """

    late_rope: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    def prepare(self, model: Any) -> Policy:
        """This policy with what it must know of ``model``: a calibration, a tokenizer."""
        return self

    def check(self, sites: list[Site]) -> None:
        """Refuse, with a ValueError, a model that this policy cannot serve."""

    def read(self, ids: Tensor, look: Look) -> Tensor:
        """The text ``[B,T']`` that is read in place of the first prompt ``ids [B,T]``.

        Args:
            look: runs the model over a text, without a cache, and returns the call of an attention
                layer (the last, where None): its queries and keys.
        """
        return ids

    def layer(self, site: Site) -> KVLayer:
        """A fresh cache layer for ``site``; by default all keys and values that the model sees."""
        return KVLayer(site.window)

    def prefill(self, call: Call) -> Tensor:
        """Attention of a prompt, or a further piece of one (T > 1): ``o [B,T,H,V]``."""
        return call.dense()

    def decode(self, call: Call) -> Tensor:
        """Attention of one token (T = 1): ``o [B,1,H,V]``; once the layer is ``compressed``, of a
        further piece of text too."""
        return call.dense()

    def settle(self, call: Call) -> None:
        """After the attention of a prompt, or a piece of one: drop what the cache will not keep."""

    def repeats(self, site: Site) -> bool:
        """Whether a decoded token makes the same launches whatever the length, once its layer has a
        ``clock``, so that a GPU can repeat them."""
        return not self.shapes_decode and not self.reads

    @property
    def reads(self) -> bool:
        """Whether it reads another text in a prompt's place."""
        return type(self).read is not Policy.read

    @property
    def shapes_prefill(self) -> bool:
        return type(self).prefill is not Policy.prefill

    @property
    def shapes_decode(self) -> bool:
        own = type(self)
        return own.decode is not Policy.decode or own.layer is not Policy.layer

    def __add__(self, other: Policy) -> Policy:
        return Joined(self, other)


@dataclass(frozen=True)
class Joined(Policy):
    """``prompt`` shapes the prefill, ``answer`` the decoding and the cache.

    Raises:
        ValueError: where both claim the same phase, or they disagree on when keys are rotated.
    """

    prompt: Policy
    answer: Policy

    def __post_init__(self) -> None:
        for part in (self.prompt, self.answer):
            if not isinstance(part, Policy):
                raise ValueError(f"a policy joins with a policy, got {part!r}")
        a, b = type(self.prompt).__name__, type(self.answer).__name__
        if self.prompt.reads or self.answer.reads:
            raise ValueError(f"{a} + {b}: one of them reads the prompt in its own way, alone")
        if self.prompt.shapes_decode:
            raise ValueError(f"{a} + {b}: {a} shapes the decoding, so it must come alone or last")
        if self.answer.shapes_prefill:
            raise ValueError(f"{a} + {b}: {b} shapes the prefill, which {a} does already")
        if self.prompt.late_rope != self.answer.late_rope:
            raise ValueError(f"{a} + {b}: one rotates keys before the cache, the other after")

    @property
    def late_rope(self) -> bool:  # type: ignore[override]
        return self.answer.late_rope

    @property
    def batched(self) -> bool:  # type: ignore[override]
        return self.prompt.batched and self.answer.batched

    @property
    def shapes_prefill(self) -> bool:
        return True

    @property
    def shapes_decode(self) -> bool:
        return True

    def prepare(self, model: Any) -> Policy:
        return Joined(self.prompt.prepare(model), self.answer.prepare(model))

    def check(self, sites: list[Site]) -> None:
        self.prompt.check(sites)
        self.answer.check(sites)

    def layer(self, site: Site) -> KVLayer:
        return self.answer.layer(site)

    def prefill(self, call: Call) -> Tensor:
        return self.prompt.prefill(call)

    def decode(self, call: Call) -> Tensor:
        return self.answer.decode(call)

    def settle(self, call: Call) -> None:
        self.answer.settle(call)

    def repeats(self, site: Site) -> bool:
        return self.answer.repeats(site)


def create_policy(name: str, **options: Any) -> Policy:
    """Build a policy by its key in the catalogue, e.g. ``create_policy("quest", budget=1024)``.

    Raises:
        ValueError: for an unknown policy or option (with the nearest ones) or a value out of range.
    """
    checks.one_of("policy", name, [card.key for card in catalogue.systems(kind="policy")])
    made = catalogue.system(name).load()
    known = [f.name for f in dataclasses.fields(made) if f.init]
    for option in options:
        checks.one_of(f"options of policy {name!r}", option, known)
    return made(**options)
