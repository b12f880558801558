"""Which pairs are exact: the recent tokens of each token, and what has left them for the state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops import checks

LAYOUTS = ("sliding", "terraced")


@dataclass(frozen=True)
class Near:
    """The tokens that a token sees exactly.

    Attributes:
        window: w. "sliding": the last w tokens, its own included; "terraced": those of its own
            block of w tokens and of the block before, w + 1 to 2 w where so many are.
        layout: "sliding" or "terraced".
    """

    window: int
    layout: str = "sliding"

    def __post_init__(self) -> None:
        checks.positive("window", self.window)
        checks.one_of("layout", self.layout, LAYOUTS)

    @property
    def terraced(self) -> bool:
        return self.layout == "terraced"

    @property
    def reach(self) -> int:
        """Tokens, its own included, that a token may need to see exactly at most."""
        return 2 * self.window if self.terraced else self.window

    def exact(self, p: Tensor, j: Tensor) -> Tensor:
        """bool, whether the token at place p sees the one at j <= p exactly."""
        if self.terraced:
            return p // self.window - j // self.window <= 1
        return p - j < self.window

    def flushed(self, seen: Tensor) -> Tensor:
        """How many of the first ``seen`` tokens (int64) lie in the state after them: those that
        the last of them no longer sees exactly."""
        last = seen - 1
        left = (last // self.window - 1) * self.window if self.terraced else seen - self.window
        return left.clamp_min(0)

    def pairs(self, T: int) -> int:
        """(query, key) pairs of one head that are exact over T tokens."""
        w = self.window
        if not self.terraced:
            rising = min(T, w)
            return rising * (rising + 1) // 2 + (T - rising) * w
        whole, rest = divmod(T, w)
        own = whole * (w * (w + 1) // 2) + rest * (rest + 1) // 2
        return own + (T - w) * w if w < T else own


@dataclass(frozen=True)
class How:
    """What mixed attention is asked, beside its five tensors; see the public function."""

    near: Near
    scale: float
    weight: Tensor | None = None
    gate: Tensor | None = None
    chosen: Tensor | None = None
    per: int = 0
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    state: tuple[Tensor, Tensor] | None = None
    starts: Tensor | None = None
    seen: Tensor | None = None
    cu_seqlens: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Places:
    """Where the S columns stand.

    Attributes:
        place: int64 ``[B or 1, S]``, each token's place in its sequence; negative at padding.
        ids: int64, likewise, the number of its sequence.
        live: bool, likewise, whether it is there and not yet in the state.
        flushed: bool, likewise, whether the state after the call takes it over (unless chosen).
    """

    place: Tensor
    ids: Tensor
    live: Tensor
    flushed: Tensor

    @property
    def key_ids(self) -> Tensor:
        return torch.where(self.live, self.ids, -1)


def places(T: int, S: int, how: How, device: torch.device) -> Places:
    """Of T queries, the last of S columns. A packed row has no past: its state covers none."""
    columns, near = torch.arange(S, device=device)[None], how.near
    if how.cu_seqlens is not None:
        cu = how.cu_seqlens
        which = torch.searchsorted(cu[1:].contiguous(), columns, right=True)
        place = columns - cu[which]
        after = cu.diff()[which]
        live = torch.ones_like(place, dtype=torch.bool)
        return Places(place, which, live, place < near.flushed(after))
    place = columns if how.starts is None else columns - how.starts.long()[:, None]
    live = place >= 0
    if how.state is not None or how.seen is not None:
        seen = place[:, 0] + S - T if how.seen is None else how.seen
        live = live & (place >= near.flushed(seen.clamp_min(0))[:, None])
    after = near.flushed((place[:, :1] + S).clamp_min(0))
    return Places(place, torch.zeros_like(place), live, live & (place < after))
