"""Collectives that gradients pass through.

Legend: W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subquad.parallel import wire
from subquad.parallel.mesh import Split, place


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, here, op):
        ctx.rest = here, op
        out = x.new_empty(here.size * x.numel())
        flat = x.contiguous().view(-1)
        here.attempt(op, lambda: wire.all_gather(out, flat, group=here.group))
        return out.view(here.size, *x.shape)

    @staticmethod
    def backward(ctx, grad):
        here, op = ctx.rest
        out = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        flat = grad.contiguous().view(-1)
        here.attempt(
            f"{op} (backward)",
            lambda: wire.reduce_scatter(out.view(-1), flat, group=here.group),
        )
        return out, None, None


def gather(x: Tensor, here: Split, op: str) -> Tensor:
    """``[W, *x.shape]``, every rank's tensor; gradients come back summed to their owners."""
    return _Gather.apply(x, here, op)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, here):
        ctx.here = here
        return _summed(x, here)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.here), None


def _summed(x: Tensor, here: Split) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    here.attempt("a sum over the ranks", lambda: wire.all_reduce(out, group=here.group))
    return out


def total(x: Tensor, mesh: Any = None) -> Tensor:
    """The sum of the ranks' tensors on every rank, and of their gradients.

    Args:
        x: of the same shape on every rank.
        mesh: one-dimensional mesh or process group; the one that is set where None.
    """
    return _Total.apply(x, place(mesh))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, here, op, sent, got):
        ctx.rest = here, op, sent, got
        return _exchanged(x, here, op, sent, got)

    @staticmethod
    def backward(ctx, grad):
        here, op, sent, got = ctx.rest
        return _exchanged(grad, here, f"{op} (backward)", got, sent), None, None, None, None


def _exchanged(x: Tensor, here: Split, op: str, sent, got) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(len(x) if got is None else sum(got), *x.shape[1:])
    here.attempt(op, lambda: wire.all_to_all(out, x, got, sent, group=here.group))
    return out


def exchange(
    x: Tensor,
    here: Split,
    op: str,
    sent: list[int] | None = None,
    got: list[int] | None = None,
) -> Tensor:
    """``x [n,...]``, pieces for the ranks in order, into what the ranks had for this one.

    Args:
        sent: how many pieces go to each rank, got: how many come from each; n / W where None.

    The adjoint is the exchange the other way round."""
    return _Exchange.apply(x, here, op, sent, got)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, other):
        ctx.like = other.shape, other.dtype, other.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def tie(x: Tensor, other: Tensor) -> Tensor:
    """``x``, whose backward pass also goes through ``other``.

    A rank that needs nothing of a collective must all the same take part in its backward pass."""
    return _Tie.apply(x, other)


class Hop:
    """A step around the ring under way: tensors go to the next rank, others come from the last."""

    def __init__(self, tensors: list[Tensor], here: Split, op: str) -> None:
        self._here, self._op = here, op
        self._sent = [t.contiguous() for t in tensors]
        self._got = [torch.empty_like(t) for t in self._sent]
        ring = dist.get_process_group_ranks(here.group)
        after, before = ring[(here.rank + 1) % here.size], ring[(here.rank - 1) % here.size]
        calls = [
            dist.P2POp(call, t, peer, group=here.group)
            for sent, got in zip(self._sent, self._got, strict=True)
            for call, t, peer in ((dist.isend, sent, after), (dist.irecv, got, before))
        ]
        self._requests = here.attempt(op, lambda: wire.send_and_receive(calls))

    def wait(self) -> list[Tensor]:
        """The tensors of the rank before."""
        self._here.attempt(self._op, lambda: [request.wait() for request in self._requests])
        return self._got
