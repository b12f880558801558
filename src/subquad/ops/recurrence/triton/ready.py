"""What the passes over time find ready: :mod:`prepare`'s launches, and what they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from subquad.ops.kernel import Launch
from subquad.ops.recurrence.triton import configs, layout
from subquad.ops.recurrence.triton.layout import NAMES, C, Plan, bound, described
from subquad.ops.recurrence.triton.prepare import invert, prepare
from subquad.ops.tape import empty

# exp(LIMIT) and its inverse times an input stay representable (see prepare.py).
LIMITS = {torch.float16: 6.0, torch.bfloat16: 80.0, torch.float32: 80.0}


class Ready(NamedTuple):
    """What :mod:`prepare` wrote, under its names; None where not needed."""

    A: Tensor | None = None
    AL: Tensor | None = None
    P: Tensor | None = None
    BS: Tensor | None = None
    QG: Tensor | None = None
    KG: Tensor | None = None
    KW: Tensor | None = None
    GS: Tensor | None = None
    FLAG: Tensor | None = None


@bound
def _prepare(p: Plan, scale: float, fine: bool, strong: bool) -> Launch:
    c, bulk = p.config("prepare"), p.bulk_prepare and not strong
    if p.decay == "channel" and not bulk:
        c = {**c, "num_stages": 1}
    if strong:  # rarely more than looked at, and sooner compiled
        c = {**c, "num_warps": 8}
    return prepare.bind(
        (p.chunks * p.H,), scale, p.T, **p.pick("H", "HQ", "HK", "HD", "HB"),
        K=p.K, C=C, DECAY=NAMES[p.decay], DELTA=p.delta, PACKED=p.packed, STRONG=strong,
        LIMIT=LIMITS[p.dtype], EXACT=p.exact, FINE=fine, BULK=bulk,
        PRECISION=p.precision, **c,
    )  # fmt: skip


@bound
def _invert(p: Plan) -> Launch:
    return invert.bind((p.chunks * p.H,), p.H, C=C, EXACT=p.exact, num_warps=4)


def room(p: Plan, like: Tensor, fine: bool, given: Mapping[str, Tensor]) -> Ready:
    """Memory for what :mod:`prepare` writes, some of it given."""
    found = {
        name: given[name] if name in given else empty(like, *shape, dtype=dtype)
        for name, (shape, dtype) in layout.ready(p).items()
    }
    if fine:
        scaled = p.delta and p.decay == "channel"
        found["AL"] = empty(like, *found["A"].shape, dtype=torch.float16 if scaled else p.dtype)
    return Ready(**found)


def prepared(p: Plan, q, k, decay, beta, scale: float, table, fine: bool, given) -> Ready:
    """What :mod:`prepare` writes."""
    out = room(p, q, fine, given)
    tiles, rest = (q, k, decay), (beta, table, out.FLAG, *out[:8])
    if p.bulk_prepare:
        BK = p.config("prepare")["BK"]
        n = 3 if p.decay == "channel" else 2
        tiles = *described(p, BK, *tiles[:n], width=BK), *tiles[n:]
    _prepare(p, scale, fine, False)(*tiles, *rest)
    if out.FLAG is not None:
        _prepare(p, scale, fine, True).where(out.FLAG, q, k, decay, *rest)
        if p.delta:
            _invert(p)(out.P, out.P)
    return out


def read(p: Plan, c: configs.Config, q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
    """Descriptors of what a pass over time reads by token: with a decay per channel v alone."""
    if p.decay == "channel":
        return [q, k, *described(p, c["BV"], v)]
    return described(p, c["BV"], q, k, v, width=c.get("BK", 0))


def blocks(BK: int, *tensors: Tensor | None) -> list[TensorDescriptor | None]:
    """Descriptors of what :mod:`prepare` wrote: a chunk's block of up to BK columns, or a row of
    float32."""
    found: list[TensorDescriptor | None] = []
    for t in tensors:
        f = None if t is None else t.view(-1, t.shape[-1])
        if f is not None:
            rows = 1 if f.dtype == torch.float32 else C
            f = TensorDescriptor(f, list(f.shape), list(f.stride()), [rows, min(BK, f.shape[1])])
        found.append(f)
    return found


def gate_rows(p: Plan, GS: Tensor | None) -> Tensor | None:
    """The rows of GS that the copy engine brings: of a decay per head."""
    return None if GS is None or p.decay != "head" else GS.view(-1, C)
