"""Masks as nested tuples of constants, and back."""

from __future__ import annotations

from typing import Any

from subquad.mask.algebra import And, Band, First, Mask, Not, Or, Stairs, Strided
from subquad.mask.grid import Axis, Neighborhood


def from_spec(spec: Any) -> Mask:
    """The mask whose ``spec()`` this is."""
    if isinstance(spec, Mask):
        return spec
    name, *rest = spec
    if name in ("and", "or"):
        parts = tuple(from_spec(part) for part in rest)
        return And(parts) if name == "and" else Or(parts)
    if name == "not":
        return Not(from_spec(rest[0]))
    if name == "neighborhood":
        return Neighborhood(tuple(Axis(*axis) for axis in rest[0]), rest[1])
    return {"band": Band, "first": First, "stairs": Stairs, "strided": Strided}[name](*rest)
