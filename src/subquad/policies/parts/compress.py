"""What policies share that read a prompt whole and then keep a few of its keys.

Legend: B batch, w voting tokens, S tokens of a row, H query heads, G key heads, K head dim, N heads
of the cache, r query heads in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.caches.evicting import EvictingLayer
from subquad.ops import checks
from subquad.policies.base import Call, Policy, Site
from subquad.policies.parts import kept

POOLS, SHARES = ("avg", "max"), ("mean", "max", "none")


@dataclass(frozen=True, kw_only=True)
class Compress(Policy):
    """Compress the cache once, after the prompt, by the votes of its last tokens; what follows is
    never dropped. A subclass writes ``drops``, ``gather`` and ``choose``.

    Attributes:
        capacity: entries a head keeps of a prompt.
        window: w, the last tokens, which vote (and, in the original, stay).
        kernel: neighbours over which votes are smoothed, odd.
        pool: how, "avg" (the zeros beyond the ends count) or "max".
        share: how the query heads of a group vote together and share a cache, "mean" or "max";
            with "none" each keeps its own, and grouped heads save nothing.
        variant: "original"; or "frontier", which smooths the votes on all tokens, and keeps the
            first ``prefix`` and the last ``local`` in any case.
        pieces: the prompt may come in several pieces: wait for the first token of the answer. (Then
            all layers hold the whole prompt until it comes; else each drops it at once.)
    """

    DEFAULTS: ClassVar[dict[str, dict[str, Any]]]  # by variant, for what is None

    capacity: int
    window: int = None  # type: ignore[assignment]
    kernel: int = None  # type: ignore[assignment]
    pool: str = None  # type: ignore[assignment]
    share: str = None  # type: ignore[assignment]
    variant: str = "original"
    local: int = 128
    prefix: int = 4
    pieces: bool = False

    def __post_init__(self) -> None:
        checks.one_of("variant", self.variant, self.DEFAULTS)
        for name, value in self.DEFAULTS[self.variant].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("capacity", "window", "kernel"):
            checks.positive(name, getattr(self, name))
        for name in ("local", "prefix"):
            checks.positive(name, getattr(self, name), zero=True)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        fixed = self.DEFAULTS["frontier"]
        checks.one_of("pool", self.pool, (fixed["pool"],) if self.frontier else POOLS)
        checks.one_of("share", self.share, (fixed["share"],) if self.frontier else SHARES)
        least, why = self.window, "window"
        if self.frontier:
            least, why = self.local + self.prefix, "local + prefix"
        if self.capacity <= least:
            raise ValueError(f"capacity must exceed {why}={least}, got {self.capacity}")

    @property
    def frontier(self) -> bool:
        return self.variant == "frontier"

    def drops(self, site: Site, tokens: int) -> bool:
        """Whether anything of so many tokens would be dropped."""
        return tokens > self.capacity

    def gather(self, weights: Tensor) -> Tensor:
        """Attention weights ``[r,w,S]`` of a group to the votes of each of its heads, ``[r,S]``."""
        raise NotImplementedError

    def choose(self, site: Site, score: Tensor) -> Sequence[Tensor]:
        """The tokens that each head keeps, int ``[n]`` each, by ``score [N,S]`` (all tokens in the
        frontier, infinite for those that stay; else without the last w, which stay)."""
        raise NotImplementedError

    def select(self, site: Site, q: Tensor, k: Tensor, scale: float) -> list[Tensor]:
        """The tokens of a row that each head of the cache keeps.

        Args:
            q: ``[w,H,K]``, of the last tokens (all, where there are fewer); k: ``[S,G,K]``.

        Returns:
            N of int ``[n]``.
        """
        S, G = k.shape[:2]
        tokens = torch.arange(S, device=k.device)
        if not self.drops(site, S):
            return [tokens] * (q.shape[1] if self.share == "none" else G)
        votes = torch.cat([self._share(self.gather(a)) for a in weights(q, k, scale, site.window)])
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        votes = votes if self.frontier else votes[:, : S - self.window]
        score = pool(votes[None], self.kernel, stride=1, padding=self.kernel // 2)[0]
        if self.frontier:
            score[:, S - self.local :] = torch.inf
            score[:, : self.prefix] = torch.inf
            return list(self.choose(site, score))
        last = tokens[S - self.window :]
        return [torch.cat([index, last]) for index in self.choose(site, score)]

    def _share(self, votes: Tensor) -> Tensor:
        if self.share == "none":
            return votes
        return votes.mean(0, keepdim=True) if self.share == "mean" else votes.amax(0, keepdim=True)

    def layer(self, site: Site) -> EvictingLayer:
        return EvictingLayer()

    def settle(self, call: Call) -> None:
        layer = call.layer
        assert isinstance(layer, EvictingLayer)
        if layer.compressed:
            return
        if self.pieces:
            layer.watch(call.q, self.window)
        elif call.first:
            self._compress(call, layer, call.q)

    def decode(self, call: Call) -> Tensor:
        """One token, or a further piece of text once the cache is compressed."""
        layer = call.layer
        assert isinstance(layer, EvictingLayer)
        if layer.queries is not None:
            self._compress(call, layer, layer.queries, new=call.q.shape[1])
            layer.queries = None
        return kept.attend(call)

    def _compress(self, call: Call, layer: EvictingLayer, q: Tensor, new: int = 0) -> None:
        end = layer.keys.shape[1] - new
        tokens = [end - start for start in call.starts]
        if any(self.drops(call.site, n) for n in tokens):
            rows = zip(tokens, q, layer.keys, strict=True)
            chosen = [
                self.select(call.site, own[-min(n, self.window) :], k[end - n : end], call.scale)
                for n, own, k in rows
            ]
            layer.evict(chosen, new)


def weights(q: Tensor, k: Tensor, scale: float, window: int | None = None):
    """The causal attention weights of the last tokens, ``[r,w,S]`` for each key head in turn.

    Args:
        q: ``[w,H,K]``, the last of the tokens ``k [S,G,K]``; window: of the model's own.
    """
    (w, H, _), (S, G, _) = q.shape, k.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    distance = torch.arange(S - w, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    hidden = (distance < 0) | (distance >= (window or S))
    for own, keys in zip(q.unflatten(1, (G, H // G)).unbind(1), k.unbind(1)):
        scores = scale * torch.einsum("wrk,sk->rws", own.to(wide), keys.to(wide))
        yield scores.masked_fill_(hidden, -torch.inf).softmax(-1)
