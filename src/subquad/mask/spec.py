"""Masks as nested tuples of constants, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from subquad.mask.algebra import And, Band, First, Mask, Not, Or, Stairs, Strided
from subquad.mask.data import Blocks, Documents, Packed, PerHead, Spans
from subquad.mask.grid import Axis, Neighborhood
from subquad.mask.placed import Placed
from subquad.mask.table import Table

JOINED: dict[str, Callable[..., Mask]] = {"and": And, "or": Or, "per_head": PerHead}
KINDS: dict[str, Callable[..., Mask]] = {
    "band": Band, "first": First, "stairs": Stairs, "strided": Strided, "not": Not,
    "neighborhood": Neighborhood, "packed": Packed, "placed": Placed, "documents": Documents,
    "blocks": Blocks, "spans": Spans,
}  # fmt: skip
TABLES = {  # which of their constants name tables
    "documents": slice(1), "blocks": slice(1), "spans": slice(2), "placed": slice(1, 3),
}  # fmt: skip


def from_spec(spec: Any) -> Mask:
    """The mask whose ``spec()`` this is.

    Raises:
        RuntimeError: for a mask that holds data, in another process than its own.
    """
    name, *rest = spec
    if name in ("and", "or", "per_head"):
        return JOINED[name](tuple(from_spec(part) for part in rest))
    if name in ("not", "packed", "placed"):
        rest[0] = from_spec(rest[0])
    if name == "neighborhood":
        rest[0] = tuple(Axis(*axis) for axis in rest[0])
    tables = TABLES.get(name, slice(0))
    rest[tables] = map(Table.named, rest[tables])
    return KINDS[name](*rest)
