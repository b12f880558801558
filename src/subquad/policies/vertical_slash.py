"""Vertical-Slash: the columns and the diagonals that the last queries attend to, for all queries.

MInference 1.0 (Jiang et al. 2024, arXiv 2407.02490); the other variant as in The Sparse Frontier
(Nawrot et al. 2025, arXiv 2504.17768).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from subquad.ops import checks
from subquad.policies.base import Call, Policy
from subquad.policies.parts import chosen, lines


class Settings(NamedTuple):
    """What the variants differ in: queries that estimate, keys and distances always taken, and the
    least numbers of columns and diagonals."""

    last_q: int
    sinks: int
    local: int
    least: tuple[int, int]


VARIANTS = {
    "minference": Settings(64, 30, 100, (30, 50)),
    "frontier": Settings(256, 4, 64, (0, 0)),
}


@dataclass(frozen=True)
class VerticalSlash(Policy):
    """Prefill: each head attends to the ``vertical`` keys and at the ``slash`` distances that
    weigh most in the exact attention of the last queries; decoding is as it was.

    Diagonals are computed as blocks of ``block`` keys, so a little more is seen than was chosen.

    Attributes:
        vertical, slash: columns and diagonals of each head.
        variant: "minference" or "frontier"; sets what is None below.
        last_q: queries that estimate; sinks: first keys always taken; local: least distances
            always taken.
        block: queries in a row and keys in a block.
        dense_layers: so many first layers stay dense.
    """

    VARIANTS: ClassVar[tuple[str, ...]] = tuple(VARIANTS)

    vertical: int = 1000
    slash: int = 6096
    variant: str = "minference"
    last_q: int | None = None
    sinks: int | None = None
    local: int | None = None
    block: int = 64
    dense_layers: int = 0

    def __post_init__(self) -> None:
        checks.one_of("variant", self.variant, self.VARIANTS)
        for name in ("vertical", "slash", "block"):
            checks.positive(name, getattr(self, name))
        for name in ("last_q", "local"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        for name in ("sinks", "dense_layers"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name), zero=True)
        own = self.settings
        if self.variant == "frontier" and (self.vertical < own.sinks or self.slash < own.local):
            raise ValueError(
                f"vertical and slash must be at least sinks={own.sinks} and local={own.local}, "
                f"got {self.vertical} and {self.slash}"
            )

    @property
    def settings(self) -> Settings:
        """The variant's, with what was given."""
        given = {name: getattr(self, name) for name in ("last_q", "sinks", "local")}
        changed = {name: value for name, value in given.items() if value is not None}
        return VARIANTS[self.variant]._replace(**changed)

    def prefill(self, call: Call) -> Tensor:
        if call.site.index < self.dense_layers:
            return call.dense()
        return call.unpadded(self._prefill)

    def _prefill(self, call: Call) -> Tensor:
        k = call.layer.keys
        columns, distances = self.select(call.q, k, call.scale, call.site.window)
        starts, single = lines.blocks(columns, distances, call.q.shape[1], k.shape[1], self.block)
        return chosen.attend(call, starts, self.block, self.block, single)

    def select(
        self, q: Tensor, k: Tensor, scale: float, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The keys and the distances that each head takes.

        Args:
            q: ``[B,T,H,K]``, the last tokens of ``k [B,S,G,K]``.
            window: of the model's own.

        Returns:
            int ``[B,H,v]`` and ``[B,H,s]``, rising.
        """
        own = self.settings
        sums = lines.last_rows(q[:, -own.last_q :], k, scale, window)
        (least_v, least_s), vertical, slash = own.least, self.vertical, self.slash
        keys, distances = (max(vertical, least_v), own.sinks), (max(slash, least_s), own.local)
        return lines.best(sums, keys, distances)
