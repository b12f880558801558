"""The products of pairs of tokens in a chunk under a forget gate, and their gradients.

    A[i,j] = sum_d r[i,d] k[j,d] exp(b[i,d] - b[j,d]),   j <= i,   b the sum of the log gates

The exponents must never be split into exp(b_i) and exp(-b_j): the second overflows. A chunk is
halved instead, and its halves are halved again. A row i of a right half meets a column j of the
left half across the middle m, and exp(b_i - b_j) = exp(b_i - b_m) exp(b_m - b_j): two products of
gates, both at most 1. Both are built by doubling, by multiplication, so nothing overflows, nothing
cancels (a gate of 0 is allowed), and each level is one batched matrix product.

Rows come in kinds, one below the other: the queries, which see j <= i, and for the delta rule the
keys times beta, which see j < i.

Legend: X chunks times heads, c chunk length (a power of 2), r kinds of rows, K key dim, D gates a
token (1 a head, K a channel).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


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


def unit_inverse(N: Tensor) -> Tensor:
    """``(I + N)^-1`` of strictly lower triangular ``N [X,c,c]``, by doubling: the inverse of a
    block of 2h has ``-B^-1 N A^-1`` below the inverses of its halves, A and B."""
    X, c, _ = N.shape
    N = N.unsqueeze(1)
    out = torch.zeros_like(N)
    out.diagonal(dim1=2, dim2=3).fill_(1)
    h = 1
    while h < c:
        corner = blocks(N, h).reshape(-1, h, h)
        if h > 1:
            n = c // h
            inner = out.view(X, n, h, n, h).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            inner = inner.reshape(-1, 2, h, h)
            corner = inner[:, 1] @ corner @ inner[:, 0]
        blocks(out, h).copy_(corner.view(X, -1, 1, h, h).neg_())
        h *= 2
    return out.squeeze(1)


class Plain:
    """No gate. ``rows [X,r c,K]``, ``k [X,c,K]``.

    Attributes:
        start, end: gates from the chunk's start to each token, and from each token to its end,
            ``[X,c,D]``; None without a gate.
        whole: the gates of the whole chunk, ``[X,D,1]``.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    whole: Tensor | None = None

    def __init__(self, rows: Tensor, k: Tensor) -> None:
        self.rows, self.k = rows, k
        self.c = k.shape[1]
        self.kinds = rows.shape[1] // self.c

    def pairs(self) -> Tensor:
        """``A [X,r c,c]``, zero where a row does not see."""
        return torch.bmm(self.rows, self.k.mT).mul_(self._seen())

    def gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of rows, k and b by way of the pairs; dA is spent."""
        dA.mul_(self._seen())
        return torch.bmm(dA, self.k), torch.bmm(dA.mT, self.rows), None

    def _seen(self) -> Tensor:
        ones = self.k.new_ones(self.c, self.c)
        return torch.cat([ones.tril(-kind) for kind in range(self.kinds)])


class Head(Plain):
    """One gate a head: ``decay [X,c,1]``."""

    def __init__(self, rows: Tensor, k: Tensor, decay: Tensor) -> None:
        super().__init__(rows, k)
        self.start, self.end = decay.exp(), torch.ones_like(decay)
        weights = decay.new_zeros(len(k), 1, self.c, self.c)
        weights.diagonal(dim1=2, dim2=3).fill_(1)
        for h, fore, back in levels(self.start, self.end):
            torch.mul(fore, back.mT, out=blocks(weights, h)[:, :, 0])
        self.weights = weights
        self.whole = self.start[:, -1:].mT

    def pairs(self) -> Tensor:
        A = torch.bmm(self.rows, self.k.mT)
        self._weigh(A)
        return A

    def gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # A pair's b_i - b_j gets dA A; on the diagonal it is 0, whatever the rounding.
        flow = A * dA
        flow[:, : self.c].diagonal(dim1=1, dim2=2).zero_()
        db = flow.sum(2).view(-1, self.kinds, self.c).sum(1).sub_(flow.sum(1))
        self._weigh(dA)
        return torch.bmm(dA, self.k), torch.bmm(dA.mT, self.rows), db[..., None]

    def _weigh(self, A: Tensor) -> None:
        A.view(-1, self.kinds, self.c, self.c).mul_(self.weights)
        A[:, self.c :].diagonal(dim1=1, dim2=2).zero_()


class Channel(Plain):
    """One gate a key channel: ``decay [X,c,K]``.

    Attributes:
        levels: for each half length h the rows of the right halves ``[X c/2h,r h,K]`` and the
            columns of the left halves ``[X c/2h,h,K]``, gated to the middle, and those gates.
    """

    def __init__(self, rows: Tensor, k: Tensor, decay: Tensor) -> None:
        super().__init__(rows, k)
        X, c, K = k.shape
        kinds = rows.view(X, self.kinds, c, K)
        self.start, self.end = decay.exp(), torch.ones_like(decay)
        self.levels = []
        for h, fore, back in levels(self.start, self.end):
            right = kinds.view(X, self.kinds, -1, 2, h, K)[:, :, :, 1].transpose(1, 2)
            row = torch.mul(right, fore.unsqueeze(2), out=right.new_empty(right.shape))
            column = (halves(k, h)[0] * back).view(-1, h, K)
            self.levels.append(
                (h, row.view(-1, self.kinds * h, K), column, fore.clone(), back.clone())
            )
        self.whole = self.start[:, -1:].mT

    def pairs(self) -> Tensor:
        X, c, _ = self.k.shape
        A = self.k.new_zeros(X, self.kinds, c, c)
        A[:, 0].diagonal(dim1=1, dim2=2).copy_((self.rows[:, :c] * self.k).sum(-1))
        for h, row, column, _, _ in self.levels:
            blocks(A, h).copy_(torch.bmm(row, column.mT).view(X, -1, self.kinds, h, h))
        return A.view(X, -1, c)

    def gradients(self, A: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        X, c, K = self.k.shape
        dA = dA.view(X, self.kinds, c, c)
        drows = self.rows.new_zeros(X, self.kinds, c, K)
        dk = torch.zeros_like(self.k)
        for h, row, column, fore, back in self.levels:
            corner = blocks(dA, h).reshape(-1, self.kinds * h, h)
            right = torch.bmm(corner, column).view(X, -1, self.kinds, h, K)
            at = drows.view(X, self.kinds, -1, 2, h, K)[:, :, :, 1].transpose(1, 2)
            at.addcmul_(right, fore.unsqueeze(2))
            left = torch.bmm(corner.mT, row).view(X, -1, h, K)
            halves(dk, h)[0].addcmul_(left, back)
        drows = drows.view(X, -1, K)
        # The diagonal has no gate: it must not enter b, where it would only add rounding.
        db = (self.rows * drows).view(X, self.kinds, c, K).sum(1).sub_(self.k * dk)
        diagonal = dA[:, 0].diagonal(dim1=1, dim2=2)[..., None]
        drows[:, :c].addcmul_(diagonal, self.k)
        dk.addcmul_(diagonal, self.rows[:, :c])
        return drows, dk, db


def gate_of(rows: Tensor, k: Tensor, decay: Tensor | None) -> Plain:
    if decay is None:
        return Plain(rows, k)
    return Head(rows, k, decay) if decay.shape[2] == 1 else Channel(rows, k, decay)
