"""The products of pairs of tokens in a chunk under a forget gate, and their gradients.

    A[i,j] = sum_d r[i,d] k[j,d] exp(b[i,d] - b[j,d]),   j <= i,   b the sum of the log gates

The exponents must never be split into exp(b_i) and exp(-b_j): the second overflows. A chunk is
halved instead, and its halves are halved again. A row i of a right half meets a column j of the
left half across the middle m, and exp(b_i - b_j) = exp(b_i - b_m) exp(b_m - b_j): two products of
gates, both at most 1. Both are built by doubling, by multiplication, so nothing overflows, nothing
cancels (a gate of 0 is allowed), and each level is one batched matrix product.

Rows come in kinds, one below the other: the queries, which see j <= i, and for the delta rule the
keys times -beta, which see j < i.

Legend: X chunks times heads, c chunk length (a power of 2), r kinds of rows, K key dim, D gates a
token (1 a head, K a channel).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.recurrence.plan import Room


def blocks(A: Tensor, h: int) -> Tensor:
    """``[X,r,c,c]`` to the lower left ``h`` by ``h`` quarters of its diagonal blocks of 2h:
    a view ``[X,c/2h,r,h,h]``."""
    X, r, c, _ = A.shape
    view = A.view(X, r, c // (2 * h), 2 * h, c // (2 * h), 2 * h).diagonal(dim1=2, dim2=4)
    return view[:, :, h:, :h].permute(0, 4, 1, 2, 3)


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """``[X,c,D]`` to the left and right halves of its blocks of 2h: views ``[X,c/2h,h,D]``."""
    view = x.view(x.shape[0], -1, 2, h, x.shape[2])
    return view[:, :, 0], view[:, :, 1]


def levels(fore: Tensor, back: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Half lengths h = 1, 2, 4 ..., with the gates from the middle to a row of the right half and
    from a column of the left half to the middle; ``fore`` (the gates ``[X,c,D]``) and ``back``
    (ones) end as the gates from the chunk's start and to its end."""
    h = 1
    while h < fore.shape[1]:
        left, right = halves(fore, h)
        back_left, _ = halves(back, h)
        yield h, right, back_left
        back_left.mul_(right[:, :, -1:])
        right.mul_(left[:, :, -1:])
        h *= 2


def unit_inverse(N: Tensor, base: int = 16) -> Tensor:
    """``(I - N)^-1`` of strictly lower triangular ``N [X,c,c]``: by substitution in the diagonal
    blocks of ``base``, then by doubling; a block of 2h has ``B^-1 N A^-1`` below the inverses of
    its halves, A and B. (Wider substitution is slower, the more so on several threads.)"""
    X, c, _ = N.shape

    def diagonal(x: Tensor, h: int) -> Tensor:
        """The view ``[X,c/h,h,h]``."""
        return x.view(X, c // h, h, c // h, h).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    N = N.reshape(X, c, c)
    out = torch.zeros_like(N)
    own = diagonal(N, base).neg()
    one = torch.eye(base, dtype=N.dtype, device=N.device).expand_as(own)
    diagonal(out, base).copy_(
        torch.linalg.solve_triangular(own, one, upper=False, left=False, unitriangular=True)
    )
    h = base
    while h < c:
        A, B = diagonal(out, h).reshape(-1, 2, h, h).unbind(1)
        corner = blocks(N[:, None], h)
        product = torch.bmm(torch.bmm(B, corner.reshape(-1, h, h)), A)
        blocks(out[:, None], h).copy_(product.view_as(corner))
        h *= 2
    return out


class Plain:
    """No gate. ``rows [X,r c,K]``, ``k [X,c,K]``.

    Attributes:
        reads: the rows gated from the chunk's start: what they read from the state before it.
        writes: the keys gated to the chunk's end: where they write to the state after it.
        whole: the gates of the whole chunk, ``[X,D,1]``; None without a gate.
    """

    whole: Tensor | None = None

    def __init__(self, rows: Tensor, k: Tensor, room: Room) -> None:
        self.room = room
        self.rows = self.reads = rows
        self.k = self.writes = k
        self.c = k.shape[1]
        self.kinds = rows.shape[1] // self.c

    def pairs(self) -> Tensor:
        """``A [X,r c,c]``, zero where a row does not see."""
        return self.room.bmm("pairs", self.rows, self.k.mT).mul_(self._seen())

    def gradients(
        self, A: Tensor, dA: Tensor, dreads: Tensor, dwrites: Tensor, S: Tensor, dS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of rows, k and the decay; S is the state before the chunk, dS the gradient of
        the one after it. All that starts with d is spent."""
        dA.mul_(self._seen())
        return dreads.baddbmm_(dA, self.k), dwrites.baddbmm_(dA.mT, self.rows), None

    def _seen(self) -> Tensor:
        ones = self.k.new_ones(self.c, self.c)
        return torch.cat([ones.tril(-kind) for kind in range(self.kinds)])


class Gated(Plain):
    """What the gates a head and a channel share; ``decay [X,c,D]``."""

    def __init__(self, rows: Tensor, k: Tensor, decay: Tensor, room: Room) -> None:
        super().__init__(rows, k, room)
        self.start, self.end = decay.exp(), torch.ones_like(decay)
        self._build()
        self.reads = room("reads", rows, *rows.shape)
        torch.mul(self._apart(rows), self.start[:, None], out=self._apart(self.reads))
        self.writes = torch.mul(k, self.end, out=room("writes", k, *k.shape))
        self.whole: Tensor = self.start[:, -1:].mT

    def gradients(self, A, dA, dreads, dwrites, S, dS):
        drows, dk, db = self._pair_gradients(A, dA)
        # b_i gates what i reads from S, exp(b_c - b_i) what it writes, exp(b_c) S itself.
        self._apart(drows).addcmul_(self._apart(dreads), self.start[:, None])
        dk.addcmul_(dwrites, self.end)
        db.add_(self._apart(self._shared(dreads.mul_(self.reads))).sum(1))
        writes = self._shared(dwrites.mul_(self.writes))
        whole = self._shared(dS.mul_(S).sum(2)[:, None]) * self.whole.mT
        db.sub_(writes)[:, -1:].add_(writes.sum(1, keepdim=True)).add_(whole)
        return drows, dk, db.flip(1).cumsum(1).flip(1)

    def _apart(self, rows: Tensor) -> Tensor:
        """``[X,r c,K]`` as ``[X,r,c,K]``."""
        return rows.view(-1, self.kinds, self.c, rows.shape[2])

    def _shared(self, t: Tensor) -> Tensor:
        """The sum over the channels that share a gate, ``[X,.,K]`` to ``[X,.,D]``."""
        return t.sum(2, keepdim=True) if self.start.shape[2] == 1 else t

    def _build(self) -> None:
        """Make the start and the end of the whole chunk by doubling."""
        raise NotImplementedError

    def _pair_gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows, k and b by way of the pairs."""
        raise NotImplementedError


class Head(Gated):
    """One gate a head, ``decay [X,c,1]``: the pairs are weighed, after their product."""

    def _build(self) -> None:
        weights = self.room("weights", self.k, len(self.k), 1, self.c, self.c).zero_()
        weights.diagonal(dim1=2, dim2=3).fill_(1)
        for h, fore, back in levels(self.start, self.end):
            torch.mul(fore, back.mT, out=blocks(weights, h)[:, :, 0])
        self.weights = weights

    def pairs(self) -> Tensor:
        return self._weigh(self.room.bmm("pairs", self.rows, self.k.mT))

    def _pair_gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A pair's b_i - b_j gets dA A; on the diagonal it is 0, whatever the rounding.
        flow = torch.mul(A, dA, out=self.room("flow", A, *A.shape))
        flow[:, : self.c].diagonal(dim1=1, dim2=2).zero_()
        db = flow.sum(2).view(-1, self.kinds, self.c).sum(1).sub_(flow.sum(1))[..., None]
        self._weigh(dA)
        return self.room.bmm("drows", dA, self.k), self.room.bmm("dk", dA.mT, self.rows), db

    def _weigh(self, A: Tensor) -> Tensor:
        self._apart(A).mul_(self.weights)
        A[:, self.c :].diagonal(dim1=1, dim2=2).zero_()
        return A


class Channel(Gated):
    """One gate a key channel, ``decay [X,c,K]``: rows and keys are gated before their product."""

    def _build(self) -> None:
        """Keep for each half length h the rows of the right halves ``[X c/2h,r h,K]`` and the
        keys of the left halves ``[X c/2h,h,K]``, gated to the middle, and those gates."""
        K = self.k.shape[2]
        self.levels = []
        for h, fore, back in levels(self.start, self.end):
            right = self._rights(self.rows, h)
            row = torch.mul(right, fore.unsqueeze(2), out=right.new_empty(right.shape))
            key = (halves(self.k, h)[0] * back).view(-1, h, K)
            kept = (row.view(-1, self.kinds * h, K), key, fore.clone(), back.clone())
            self.levels.append((h, *kept))

    def _rights(self, rows: Tensor, h: int) -> Tensor:
        """The right halves of blocks of 2h: a view ``[X,c/2h,r,h,K]``."""
        K = self.k.shape[2]
        return rows.view(-1, self.kinds, self.c // (2 * h), 2, h, K)[:, :, :, 1].transpose(1, 2)

    def pairs(self) -> Tensor:
        A = self.k.new_zeros(len(self.k), self.kinds, self.c, self.c)
        A[:, 0].diagonal(dim1=1, dim2=2).copy_((self.rows[:, : self.c] * self.k).sum(-1))
        for h, row, key, _, _ in self.levels:
            corner = blocks(A, h)
            corner.copy_(torch.bmm(row, key.mT).view(corner.shape))
        return A.view(-1, self.kinds * self.c, self.c)

    def _pair_gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dA = self._apart(dA)
        drows = self.room("drows", self.rows, *self.rows.shape).zero_()
        dk = self.room("dk", self.k, *self.k.shape).zero_()
        for h, row, key, fore, back in self.levels:
            corner = blocks(dA, h).reshape(-1, self.kinds * h, h)
            right, left = self._rights(drows, h), halves(dk, h)[0]
            right.addcmul_(torch.bmm(corner, key).view(right.shape), fore.unsqueeze(2))
            left.addcmul_(torch.bmm(corner.mT, row).view(left.shape), back)
        # The diagonal has no gate: it must not enter b, where it would only add rounding.
        db = self._apart(self.rows * drows).sum(1).sub_(self.k * dk)
        diagonal = dA[:, 0].diagonal(dim1=1, dim2=2)[..., None]
        drows[:, : self.c].addcmul_(diagonal, self.k)
        return drows, dk.addcmul_(diagonal, self.rows[:, : self.c]), db


def gate_of(rows: Tensor, k: Tensor, decay: Tensor | None, room: Room) -> Plain:
    """The gate that fits ``decay [X,c,D]``; what it makes lies in ``room``."""
    if decay is None:
        return Plain(rows, k, room)
    kind = Head if decay.shape[2] == 1 else Channel
    return kind(rows, k, decay, room)
