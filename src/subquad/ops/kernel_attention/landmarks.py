"""Gaussian-kernel attention through landmarks (Nyström), without a softmax.

    P = G(q, L),  A = G(L, L),  G(a, b) = exp(-|a - b|^2 / 2)
    o = P M P^T v,   M = (A + 0.01 I)^-1                      SOFT
                     M = D^-1/2 A^-1 D^-1/2,  D = diag(A 1)   SOFT++

The inverse is found by Newton-Raphson steps, products of matrices only, and its gradient by
``dA = -V^T dV V^T``. Source: Lu et al., "Softmax-free Linear Transformers", arXiv 2207.03341,
sections 3.2 to 3.4; the released SOFT++ takes its first step from the largest row sum of a whole
batch, here each matrix has its own, so that a result does not depend on what else is in the batch.

Legend: B batch, N tokens, M landmarks, H heads, K head dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import without_autocast

RIDGE = 0.01  # of SOFT
HALVINGS = 10  # of SOFT++'s first step, at most


def landmark_attention(
    q: Tensor, landmarks: Tensor, v: Tensor, *, normalize: bool = True, iterations: int = 20
) -> Tensor:
    """Every token over every token, through M landmarks: time and memory linear in N.

    Args:
        q: ``[B,N,H,K]``, queries and keys in one.
        landmarks: ``[B,M,H,K]``.
        v: ``[B,N,H,V]``.
        normalize: True is SOFT++, whose spectral norm does not grow with M; False is SOFT.
        iterations: Newton steps.

    Returns:
        ``o [B,N,H,V]`` in the dtype of v, computed in float32 at least.

    Raises:
        ValueError: for shapes that do not fit.
    """
    axes = {"q": (q, "B N H K"), "landmarks": (landmarks, "B M H K"), "v": (v, "B N H V")}
    checks.shapes(axes)
    checks.positive("iterations", iterations)
    with without_autocast(q.device.type):
        wide = torch.promote_types(v.dtype, torch.float32)
        queries, marks, values = (t.to(wide).transpose(1, 2) for t in (q, landmarks, v))
        P = gaussian(queries, marks)
        M = middle(gaussian(marks, marks), normalize=normalize, iterations=iterations)
        o = P @ (M @ (P.mT @ values))
        return o.transpose(1, 2).to(v.dtype)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """``exp(-|a_i - b_j|^2 / 2)``, ``[...,n,K]`` and ``[...,m,K]`` to ``[...,n,m]``."""
    square = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (-0.5 * (square - 2 * a @ b.mT).clamp_min(0)).exp()


def middle(A: Tensor, *, normalize: bool, iterations: int = 20) -> Tensor:
    """M of the landmarks' kernel ``A [...,M,M]``."""
    if not normalize:
        return newton_inverse(A, ridge=RIDGE, iterations=iterations)
    root = A.sum(-1, keepdim=True).rsqrt()
    return root * newton_inverse(A, iterations=iterations) * root.mT


def newton_inverse(A: Tensor, *, ridge: float = 0.0, iterations: int = 20) -> Tensor:
    """The inverse of ``A + ridge I``, ``[...,M,M]`` symmetric and positive semidefinite with
    entries that are not negative; where it is singular, what the steps reach of the
    pseudo-inverse."""
    most = A.detach().sum(-1).amax(-1)[..., None, None]
    if ridge:
        first = 1.8 / most.square()
    else:
        first = _halved(A.detach(), 2 / most.square())
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    inverse: Any = _Newton.apply
    return inverse(A + ridge * eye, first, iterations)


def _halved(A: Tensor, first: Tensor) -> Tensor:
    """The first step, halved until no column of ``|I - first A^2|`` sums to more than 1.01."""
    square = A @ A
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(HALVINGS):
        sums = (eye - first * square).abs().sum(-2).amax(-1)[..., None, None]
        first = torch.where(sums > 1.01, first / 2, first)
    return first


class _Newton(torch.autograd.Function):
    """``V <- 2 V - V A V`` from ``V = first A``; the gradient is that of the exact inverse."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, first: Tensor, iterations: int) -> Tensor:
        V = first * A
        for _ in range(iterations):
            V = 2 * V - V @ A @ V
        ctx.save_for_backward(V)
        return V

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (V,) = ctx.saved_tensors
        return -V.mT @ grad @ V.mT, None, None
