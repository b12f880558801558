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


def places(
    tokens: int, starts: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The place of each column's token in its sequence, and the sequence's number.

    Args:
        tokens: S, columns of a row.
        starts: int ``[B]`` or ``[1]``, the column of each row's token 0; None for 0.
        cu_seqlens: the boundaries of packed sequences, or None.

    Returns:
        int64 ``[B or 1, S]`` twice; a negative place is padding.
    """
    columns = torch.arange(tokens, device=device)[None]
    if cu_seqlens is None:
        place = columns if starts is None else columns - starts.long()[:, None]
        return place, torch.zeros_like(columns)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), columns, right=True)
    return columns - cu_seqlens[which], which
