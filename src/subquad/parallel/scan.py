"""The element-wise scan over a split sequence, by LASP-2's gather of states.

Legend: B batch, C tokens of a rank, D channels, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import without_autocast
from subquad.ops.scan import scan
from subquad.parallel.collectives import gather, tie
from subquad.parallel.cut import Cut
from subquad.parallel.mesh import place


def lasp2_scan(
    x: Tensor,
    decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    mesh: Any = None,
) -> tuple[Tensor, Tensor]:
    """The element-wise scan over a split sequence: a state of one number a channel.

    Args:
        x, decay: ``[B,C,D]``, this rank's tokens, as in :func:`subquad.ops.scan.scan`.
        state: ``[N,D]`` before the whole sequences; cu_seqlens: int32 ``[N+1]`` of all tokens.
        mesh: one-dimensional mesh or process group; the one that is set where None.

    Returns:
        ``h [B,C,D]``, and ``[N,D]`` after the whole sequences, on every rank.

    Raises:
        ValueError: for arguments that do not fit, or that differ in shape between ranks.
        RuntimeError: if another rank has gone.
    """
    here = place(mesh)
    checks.shapes({"x": (x, "B T D"), "decay": (decay, "B T D")})
    B, C, D = x.shape
    checks.cu_seqlens(cu_seqlens, B=B, T=C * here.size)
    here.agree("lasp2_scan", x=x, decay=decay, state=state, cu_seqlens=cu_seqlens)
    cut = Cut(cu_seqlens, C, here)
    if state is not None:
        checks.shape("state", state, (B if cu_seqlens is None else len(cut.bounds) - 1, D))
    with without_autocast(x.device.type):
        zero = x.new_zeros(B, D, dtype=torch.promote_types(x.dtype, torch.float32))
        h, last = scan(x, decay, state=cut.initial(state, zero, zero), cu_seqlens=cut.cu)
        gates = decay[:, : cut.head].to(zero.dtype).cumsum(1)
        flat = torch.cat([last[-B:].reshape(-1), gates[:, -1].reshape(-1)])
        real = torch.view_as_real(flat) if flat.is_complex() else flat
        everyone = gather(real, here, "lasp2_scan")
        flats = torch.view_as_complex(everyone) if flat.is_complex() else everyone
        maps = [f.view(2, B, D) for f in flats]

        def before(rank: int) -> Tensor:
            S = torch.zeros_like(zero)
            for (M, P), piece in zip(maps[:rank], cut.pieces):
                S = P.exp() * S + M if piece.whole else M
            return S

        S = before(here.rank)
        if cut.mine.continues:
            n = cut.head
            first = h[:, :n] + (gates.exp() * S[:, None]).to(h.dtype)
            h = torch.cat([first, h[:, n:]], 1)
            last = torch.cat([last[:B] + gates[:, -1].exp() * S, last[B:]])
        h = tie(h, everyone)
        if not here.states:
            return h, last[:0]
        return h, cut.final(last, state) if cut.packed else before(here.size)
