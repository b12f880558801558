"""The gates of a chunk as matrices, which say how its tokens' gradients reach its weights.

With c_t = 1 where a step ends (its gates act there, the others are 1), A the gradients pending:

    W_t = beta_t W_0 + f_t S_0 - h_t A_0 - sum_{j<=t} G_tj theta_j u_j
    S_t =              m_t S_0 - p_t A_0 - sum_{j<=t} P_tj theta_j u_j

P_tj is the product of the momenta after the step that j belongs to, D_ti that of the decays after
i, and G = D diag(c) P. Nothing is divided, so gates of exactly 0 are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Coefficients, ``[...,w]`` of the state and ``[...,w,w]`` of the tokens; see above."""

    beta: Tensor
    f: Tensor
    h: Tensor | None
    G: Tensor
    m: Tensor
    p: Tensor | None
    P: Tensor
    theta: Tensor
    open: Tensor | None  # whether no step has ended yet before the end of the chunk, [...,w]

    def slab(self, n: int) -> Gates:
        """The n-th of several chunks, which stand on axis 2."""
        parts = {k: None if t is None else t[:, :, n] for k, t in self._asdict().items()}
        return Gates(**parts)  # type: ignore[arg-type]


def gates(
    lr: Tensor, momentum: Tensor, decay: Tensor, real: Tensor, tokens: Tensor, *, step: int
) -> Gates:
    """All chunks' gates.

    Args:
        lr, momentum, decay: ``[N,H,n,w]``, the last two logs.
        real: bool ``[N,n,w]``, the others are no tokens.
        tokens: int64 ``[N,n,w]``, tokens read, the present one included.
    """
    ends = (real & (tokens % step == 0))[:, None]
    momentum, decay = momentum.masked_fill(~ends, 0), decay.masked_fill(~ends, 0)
    theta = lr * real[:, None]
    D, P = products(decay), products(momentum)
    beta, m = decay.cumsum(-1).exp(), momentum.cumsum(-1).exp()
    c = ends.to(lr.dtype)
    h = p = is_open = None
    if step > 1:
        before = c.cumsum(-1) - c  # steps ended before each token
        enters = c[..., :, None] * (before[..., :, None] == before[..., None, :])
        P, is_open = P @ enters.tril(), c.sum(-1, keepdim=True) == before
        p = (products(momentum) @ (c * (before == 0))[..., None])[..., 0]
        h = (D @ (c * p)[..., None])[..., 0]
    f = (D @ (c * m)[..., None])[..., 0]
    G = D @ (c[..., None] * P)
    return Gates(beta, f, h, G, m, p, P, theta, is_open)


def products(log: Tensor) -> Tensor:
    """``exp(sum_{k=j+1..i} log_k)`` at ``[...,i,j]``, 0 above the diagonal.

    The sums are made row by row, not as differences, in which a log of -inf would be lost.
    """
    w = log.shape[-1]
    lower = torch.ones(w, w, dtype=torch.bool, device=log.device).tril()
    steps = log[..., :, None].expand(*log.shape, w).masked_fill(~lower.tril(-1), 0)
    return steps.cumsum(-2).exp().masked_fill(~lower, 0)
