"""One sequence split over several devices, on ``torch.distributed``.

    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (8,))
    with subquad.parallel.sequence(mesh):
        y, state = mixer(x[:, mine])           # each process its own run of tokens

Inside the block the operations below, which every mixer calls, work over the processes of the mesh;
outside they are those of ``subquad.ops``. Each process holds T/W consecutive tokens, in the order
of the ranks; initial and final states, ``cu_seqlens`` and decays without a time axis are those of
the whole sequence, the same everywhere. A gradient with respect to such a shared tensor is each
rank's share of it, as that of a weight is: the gradient is their sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from subquad.ops import attention as _attention
from subquad.ops import recurrence as _recurrence
from subquad.ops import scan as _scan
from subquad.parallel.collectives import total
from subquad.parallel.gather import gathered
from subquad.parallel.lasp2 import lasp2
from subquad.parallel.mesh import Split, current, sequence
from subquad.parallel.ring_attention import ring
from subquad.parallel.scan import lasp2_scan
from subquad.parallel.tokens import join, shift_left, split
from subquad.parallel.ulysses import ulysses, ulysses_recurrence

__all__ = [
    "Split",
    "attention",
    "current",
    "join",
    "linear_attention",
    "recurrence",
    "scan",
    "sequence",
    "shift_left",
    "split",
    "total",
]


def recurrence(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`subquad.ops.recurrence.recurrence`, over the sequence mesh where one is set."""
    here = current()
    if here is None:
        return _recurrence.recurrence(q, k, v, **options)
    run = lasp2 if here.recurrence == "lasp2" else ulysses_recurrence
    return run(q, k, v, mesh=here, **options)


def scan(x: Tensor, decay: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`subquad.ops.scan.scan`, over the sequence mesh where one is set."""
    here = current()
    if here is None:
        return _scan.scan(x, decay, **options)
    return lasp2_scan(x, decay, mesh=here, **options)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """:func:`subquad.ops.recurrence.linear_attention`, over the sequence mesh where one is set.

    Raises:
        ValueError: for the form that is not causal, of packed sequences that are split.
    """
    here = current()
    if here is None:
        return _recurrence.linear_attention(q, k, v, **options)
    summed = partial(total, mesh=here)
    return _recurrence.linear_attention(q, k, v, recurrence=recurrence, total=summed, **options)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
    """:func:`subquad.ops.attention.attention`, over the sequence mesh where one is set.

    More keys than queries are those of a past and of the whole sequence, the same on every rank.
    """
    here = current()
    if here is None:
        return _attention.attention(q, k, v, mask, **options)
    C, S = q.shape[1], k.shape[1]
    if S != C:  # a past and all that is new, whole on every rank
        options["offset"] = S - (here.size - here.rank) * C
        return _attention.attention(q, k, v, mask, **options)
    run = {"ring": ring, "ulysses": ulysses, "gather": gathered}[here.attention]
    return run(q, k, v, mask, mesh=here, **options)
