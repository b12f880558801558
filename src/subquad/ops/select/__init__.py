"""Choosing blocks of keys: pool them, score them, take the best under a budget.

No step holds a T x S tensor of scores: pools are S / size long, masses and scores are reduced to
blocks while they are made. The results are block indices as :func:`subquad.mask.blocks` takes them:
int32, rising, -1 at the end of shorter rows.
"""

from subquad.ops.select.choose import cover, top
from subquad.ops.select.pool import means, pool
from subquad.ops.select.score import block_mass, peaks, products, window_mass
from subquad.ops.select.search import halves, halving

__all__ = [
    "block_mass",
    "cover",
    "halves",
    "halving",
    "means",
    "peaks",
    "pool",
    "products",
    "top",
    "window_mass",
]
