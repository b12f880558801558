"""Caches for transformers models. See :mod:`subquad.caches.states`."""

from subquad.lazy import getter

_HOMES = {"StateCache": "subquad.caches.states"}

__all__ = [*_HOMES]
__getattr__ = getter(__name__, _HOMES)
