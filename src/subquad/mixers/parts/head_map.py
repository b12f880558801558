"""Learned feature maps with weights of their own for every head: phi(q) . phi(k) for exp(q . k).

Sources: Zhang et al., "The Hedgehog & the Porcupine", arXiv 2402.04347, section 4; the forms with
softmax and without bias: Zhang et al., "LoLCATs", arXiv 2410.10254, section 3.

Legend: B batch, T tokens, H heads, K head dim, F features before the halves are joined.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subquad.ops import checks

MAPS = ("softmax_dim", "exp_dim", "exp", "fla", "elu", "relu")
INITS = ("identity", "kaiming")
LEAST = 1e-12
# The maps' weights as the authors of LoLCATs name them, and as a mixer does.
AUTHORS = {f"feature_map_{n}.mlp.layer": f"feature_map_{n}.weight" for n in "qk"}


class HeadMap(nn.Module):
    """``phi(x)`` of ``y = x W_h (+ b_h)``, ``[B,T,H,K]`` to ``[B,T,H,width]``, in float32 at least.

    Args:
        heads: H; head_dim: K.
        features: F; K where None.
        kind: "softmax_dim" (``[softmax(y), softmax(-y)]``), "exp" (``[exp(y), exp(-y)]``),
            "exp_dim" (``[exp(y - max y), exp(min y - y)]``), "fla" (one softmax over
            ``[2y, -2y]``), all of width 2 F; "elu" (``elu(y) + 1``) and "relu", of width F, are
            the maps that Hedgehog is compared with.
        init: of W: "identity", or "kaiming" (uniform).
        bias: whether there is a b, zero at first.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        features: int | None = None,
        *,
        kind: str = "softmax_dim",
        init: str = "identity",
        bias: bool = False,
    ) -> None:
        super().__init__()
        checks.one_of("feature_map", kind, MAPS)
        checks.one_of("feature_init", init, INITS)
        features = head_dim if features is None else features
        checks.positive("features", features)
        self.kind = kind
        self.width = features if kind in ("elu", "relu") else 2 * features
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, features))
        self.bias = nn.Parameter(torch.zeros(heads, features)) if bias else None
        with torch.no_grad():
            if init == "identity":
                for weight in self.weight:
                    nn.init.eye_(weight)
            else:
                # As nn.init.kaiming_uniform_ reads [H,K,F]: the fan in is K times F.
                bound = math.sqrt(6 / (head_dim * features))
                self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            y = torch.einsum("bthk,hkf->bthf", x.to(wide), self.weight.to(wide))
            return feature(y if self.bias is None else y + self.bias.to(wide), self.kind)


class NormMap(nn.Module):
    """A map that learns directions and keeps norms: ``phi(x) = [softmax(n), softmax(-n)]``,
    ``n = |x| y / |y|``, ``y = W_h (x - 2 (x . u_h) u_h)``, u of norm 1; width 2 F.

    Source: Meng et al., "STILL", arXiv 2602.02180 (NP-Map).

    Args:
        heads: H; head_dim: K; features: F, K where None.
    """

    def __init__(self, heads: int, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        features = head_dim if features is None else features
        checks.positive("features", features)
        self.width = 2 * features
        bound = math.sqrt(6 / head_dim)  # the authors draw each head's W by itself
        self.weight = nn.Parameter(torch.empty(heads, head_dim, features).uniform_(-bound, bound))
        self.u = nn.Parameter(torch.randn(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return feature(self.directed(x), "softmax_dim")

    def directed(self, x: Tensor) -> Tensor:
        """n ``[B,T,H,F]`` of x ``[B,T,H,K]``."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        u = nn.functional.normalize(self.u.to(x.dtype), dim=-1)
        mirrored = x - 2 * (x * u).sum(-1, keepdim=True) * u
        y = torch.einsum("bthk,hkf->bthf", mirrored, self.weight.to(x.dtype))
        return x.norm(dim=-1, keepdim=True) * nn.functional.normalize(y, dim=-1, eps=LEAST)


def feature(y: Tensor, kind: str) -> Tensor:
    """phi of what the linear layer gives, positive: at least 1e-12."""
    if kind == "softmax_dim":
        phi = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
    elif kind == "fla":
        phi = torch.cat([2 * y, -2 * y], -1).softmax(-1)
    elif kind == "exp":
        phi = torch.cat([y.exp(), (-y).exp()], -1)
    elif kind == "exp_dim":
        top, low = y.amax(-1, keepdim=True), y.amin(-1, keepdim=True)
        phi = torch.cat([(y - top).exp(), (low - y).exp()], -1)
    elif kind == "elu":
        phi = nn.functional.elu(y) + 1
    else:
        phi = y.relu()
    return phi.clamp_min(LEAST)
