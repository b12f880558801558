"""What a run of tokens does to the state of a linear recurrence, and how such maps join.

Legend: H heads, K key dim, V value dim, b rows of the state that crosses a border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.parallel import wire
from subquad.parallel.cut import Cut
from subquad.parallel.mesh import Split


@dataclass(frozen=True)
class Affine:
    """``S -> P S + M``, what a run of tokens does to a state: every linear recurrence's monoid.

    Attributes:
        M: ``[b,H,K,V]``.
        P: None (nothing is forgotten), log gates ``[b,H]`` or ``[b,H,K]``, or matrices
            ``[b,H,K,K]``.
    """

    M: Tensor
    P: Tensor | None = None

    def __call__(self, S: Tensor) -> Tensor:
        return self._times(S) + self.M

    def after(self, first: Affine) -> Affine:
        """The map of the tokens of ``first`` and then these."""
        M = self(first.M)
        if self.P is None or first.P is None:
            return Affine(M, first.P if self.P is None else self.P)
        return Affine(M, self.P @ first.P if self.P.dim() == 4 else self.P + first.P)

    def _times(self, S: Tensor) -> Tensor:
        if self.P is None:
            return S
        if self.P.dim() == 4:
            return self.P @ S
        gate = self.P.exp()
        return S * (gate[..., None] if gate.dim() == 3 else gate[..., None, None])

    def pack(self) -> Tensor:
        """One flat tensor to send."""
        parts = [self.M] if self.P is None else [self.M, self.P]
        return torch.cat([t.reshape(-1) for t in parts])

    def unpack(self, flat: Tensor) -> Affine:
        """Another map of the same shapes, from what its rank packed."""
        M = flat[: self.M.numel()].view_as(self.M)
        return Affine(M, None if self.P is None else flat[self.M.numel() :].view_as(self.P))


def fold(maps: Sequence[Affine], cut: Cut, rank: int) -> Tensor:
    """The state before the tokens of ``rank``, from the maps of the ranks before it.

    What came before a sequence's start is no concern of its: such a rank's M is all there is.
    """
    S = torch.zeros_like(maps[0].M)
    for done, piece in zip(maps[:rank], cut.pieces):
        S = done(S) if piece.whole else done.M
    return S


def repeated(t: Tensor, heads: int) -> Tensor:
    """``t [b,h,...]`` with so many heads; consecutive ones share."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def handed_on(own: Affine, here: Split, whole: bool) -> Tensor:
    """The state before a rank's tokens, which waits for that of the rank before and hands its own
    to the next; gradients take the way back.

    Args:
        whole: whether the state passes through (else a sequence begins here).
    """
    return _HandedOn.apply(own.M, own.P, here, whole)


class _HandedOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, M, P, here, whole):
        S = _from(here.rank - 1, torch.zeros_like(M), here)
        _to(here.rank + 1, Affine(M, P)(S) if whole else M, here)
        ctx.save_for_backward(M, P, S)
        ctx.rest = here, whole
        return S

    @staticmethod
    def backward(ctx, dS):
        here, whole = ctx.rest
        M, P, S = ctx.saved_tensors
        D = _from(here.rank + 1, torch.zeros_like(M), here)
        dP = None if P is None else torch.zeros_like(P)
        if whole:
            with torch.enable_grad():
                parts = [t.detach().requires_grad_() for t in (S, P) if t is not None]
                after = Affine(M, *parts[1:])(parts[0])
            through, *rest = torch.autograd.grad(after, parts, D)
            dS, dP = dS + through, rest[0] if rest else None
        _to(here.rank - 1, dS, here)
        return D, dP, None, None


def _from(rank: int, into: Tensor, here: Split) -> Tensor:
    """The tensor of the neighbour, ``into`` as it is beyond the ends."""
    if 0 <= rank < here.size:
        here.attempt("lasp", lambda: wire.receive(into, group=here.group, group_src=rank))
    return into


def _to(rank: int, t: Tensor, here: Split) -> None:
    if 0 <= rank < here.size:
        here.attempt("lasp", lambda: wire.send(t.contiguous(), group=here.group, group_dst=rank))
