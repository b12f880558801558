"""Local linear attention's probe vector, by conjugate gradients on the probe itself.

    (C_i + penalty_i I) r_i = kbar_i - q_i,       penalty_i = ridge max_j p_ij

C_i is the covariance of the keys under query i's softmax and kbar_i their mean. The probe with the
keys as values is ``kbar_i - C_i x``, so a product with every C_i is one pass of it and no K x K
matrix is made. ``ridge`` refers to weights whose largest is 1, hence the factor (LLA, arXiv
2510.01450; p is the softmax, and ``max_j p_ij = exp(max score - lse)``).

The gradient goes through the solution, not through the iterations: one more solve with the same
matrices, for the gradient of r, and the probe's own backward pass.

Legend: B batch, T queries, S keys, H query heads, G key heads, K key dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.ops.operation import operation
from subquad.ops.probe import node


@dataclass(frozen=True)
class Setting:
    """What all passes of one call share."""

    lo: Tensor
    hi: Tensor
    scale: float
    steps: int
    home: str

    def probe(self, q: Tensor, k: Tensor, r: Tensor, *, saves: bool = False, peak: bool = False):
        return node.run(q, k, k, r, self.lo, self.hi, self.scale, saves, peak, self.home)


def slope(q: Tensor, k: Tensor, ridge: Tensor, setting: Setting) -> Tensor:
    """r ``[B,T,H,K]``; q ``[B,T,H,K]``, k ``[B,S,G,K]``, ridge ``[H]`` in float32 at least.

    Differentiable in q, k and ridge.
    """
    with torch.no_grad():
        mean, _, lse, _, top = setting.probe(q, k, torch.zeros_like(q), peak=True)
        fixed = penalty(q, k, ridge, lse, top, setting.scale)
        r = _solve(mean - q, mean, q, k, fixed, *_rest(setting))
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, k, ridge)):
        return r
    pulled, _, lse, _, _ = setting.probe(q, k, r, saves=True)
    own = penalty(q, k, ridge, lse, top, setting.scale)[..., None]
    residual = pulled - q - own * r
    return _solution(residual, r, mean, q.detach(), k.detach(), fixed, *_rest(setting))


def _rest(s: Setting) -> tuple[Tensor, Tensor, float, int, str]:
    return s.lo, s.hi, s.scale, s.steps, s.home


def penalty(q: Tensor, k: Tensor, ridge: Tensor, lse: Tensor, top: Tensor, scale: float) -> Tensor:
    """``ridge max_j p_ij`` ``[B,T,H]``; ridge itself where a query sees nothing."""
    B, T, H, K = q.shape
    G = k.shape[2]
    index = top.long().unflatten(2, (G, -1)).permute(0, 2, 1, 3).reshape(B, G, -1, 1)
    best = k.transpose(1, 2).gather(2, index.expand(-1, -1, -1, K))
    best = best.reshape(B, G, T, H // G, K).permute(0, 2, 1, 3, 4).reshape(B, T, H, K)
    unseen = lse == -torch.inf
    score = scale * (q * best).sum(-1) - lse.masked_fill(unseen, 0)
    return ridge * score.masked_fill(unseen, 0).exp()


def conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with ``apply(x) = b``, every row ``b [...,K]`` for itself, in at most ``steps`` products.

    A row whose residual has fallen to rounding stays as it is.
    """
    x, residual, way = torch.zeros_like(b), b, b
    square = b.square().sum(-1, keepdim=True)
    floor = square * torch.finfo(b.dtype).eps ** 2
    for _ in range(steps):
        live = square > floor
        if b.device.type == "cpu" and not bool(live.any()):
            break
        image = apply(way)
        along = (way * image).sum(-1, keepdim=True)
        live = live & (along > 0)
        alpha = torch.where(live, square / torch.where(live, along, 1.0), 0.0)
        x = x + alpha * way
        residual = residual - alpha * image
        next_square = residual.square().sum(-1, keepdim=True)
        beta = torch.where(live, next_square / torch.where(live, square, 1.0), 0.0)
        way = residual + beta * way
        square = torch.where(live, next_square, 0.0)
    return x


@operation("probe_solve")
def _solve(
    b: Tensor, mean: Tensor, q: Tensor, k: Tensor, penalty: Tensor, lo: Tensor, hi: Tensor,
    scale: float, steps: int, home: str,
) -> Tensor:  # fmt: skip
    """``(C + penalty I)^-1 b``; ``mean`` is that of the keys. For no gradients."""
    setting = Setting(lo, hi, scale, steps, home)

    def apply(x: Tensor) -> Tensor:
        # The probe weighs the keys by 1 + tbar - t: an x as small as gradients are would be lost
        # beside the 1.
        size = x.norm(dim=-1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        unit = x / size
        return (mean - setting.probe(q, k, unit)[0] + penalty[..., None] * unit) * size

    return conjugate_gradients(apply, b, steps)


@_solve.fake
def _(b, mean, q, k, penalty, lo, hi, scale, steps, home):
    return torch.empty_like(b)


@operation("probe_solution")
def _solution(
    residual: Tensor, r: Tensor, mean: Tensor, q: Tensor, k: Tensor, penalty: Tensor, lo: Tensor,
    hi: Tensor, scale: float, steps: int, home: str,
) -> Tensor:  # fmt: skip
    """r, whose gradient reaches what it solves through ``residual``, the equation's two sides."""
    return r.clone()


@_solution.fake
def _(residual, r, *_):
    return torch.empty_like(r)


def _save(ctx, inputs, output):
    _, _, *tensors, ctx.scale, ctx.steps, ctx.home = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dr):
    mean, q, k, penalty, lo, hi = ctx.saved_tensors
    rest = lo, hi, ctx.scale, ctx.steps, ctx.home
    return _solve(dr.contiguous(), mean, q, k, penalty, *rest), *[None] * 10


_solution.differentiable(_differentiate, _save)
_solve.without_derivative()
