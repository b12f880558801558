"""Caches for transformers models. See :mod:`subquad.caches.states`."""

from importlib import import_module
from typing import Any

_HOMES = {"StateCache": "subquad.caches.states"}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'subquad.caches' has no attribute {name!r}")
