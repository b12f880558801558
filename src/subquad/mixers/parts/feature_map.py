"""Feature maps of linear attention: phi(q) . phi(k) stands for exp(q . k).

Each is a module from ``[..., K]`` to ``[..., width]``; ``width`` tells the size of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import checks
from subquad.ops.layer.activation import ACTIVATIONS


class FeatureMap(nn.Module):
    """A map of the last axis, K features to ``width``."""

    def __init__(self, head_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.width = head_dim if width is None else width


class Pointwise(FeatureMap):
    """An activation by its name; "elu" is ``elu(x) + 1 > 0``, arXiv 2006.16236, equation 7."""

    def __init__(self, head_dim: int, activation: str) -> None:
        super().__init__(head_dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)


class ElementwiseProduct(FeatureMap):
    """``(W1 x + b1) * (W2 x + b2)``. Not positive: for attention without a denominator."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


class T2R(FeatureMap):
    """``relu(W x)``: Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2103.13076."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.layer = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class Hedgehog(FeatureMap):
    """``softmax([2y, -2y])``, y = W x + b, W the identity at first, width 2 K.

    The form with one softmax over both halves, after Zhang et al., arXiv 2402.04347.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, 2 * head_dim)
        self.layer = nn.Linear(head_dim, head_dim)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * self.layer(x)
        return torch.cat([y, -y], -1).softmax(-1)


class DPFP(FeatureMap):
    """Deterministic parameter-free projection, width 2 K nu.

    With r = relu([x, -x]): the products ``r_i r_(i-s)``, s = 1 .. nu, indices taken modulo 2 K.
    Schlag, Irie, Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers",
    arXiv 2102.11174, section 5.3.
    """

    def __init__(self, head_dim: int, nu: int = 4) -> None:
        checks.positive("nu", nu)
        super().__init__(head_dim, 2 * head_dim * nu)
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(torch.cat([x, -x], -1))
        return torch.cat([r * r.roll(s, -1) for s in range(1, self.nu + 1)], -1)


class Taylor(FeatureMap):
    """The exponential's second-order expansion: phi(q) . phi(k) = 1 + s + s^2/2, s = q.k / sqrt(K).

    ``[1, x / K^(1/4), vec(x x^T) / sqrt(2 K)]``, width 1 + K + K^2; where ``compressed``, the
    square's diagonal over sqrt(2 K) and its upper triangle over sqrt(K), width
    1 + K + K (K + 1) / 2, with the same inner products. At least 1/2, whatever q and k.
    Arora et al., arXiv 2402.18668, section 3.
    """

    def __init__(self, head_dim: int, compressed: bool = False) -> None:
        pairs = head_dim * (head_dim + 1) // 2 if compressed else head_dim**2
        super().__init__(head_dim, 1 + head_dim + pairs)
        self.compressed = compressed

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.head_dim**-0.25
        one = torch.ones_like(x[..., :1])
        if not self.compressed:
            square = (x[..., :, None] * x[..., None, :]).flatten(-2)
            return torch.cat([one, x, square * 0.5**0.5], -1)
        i, j = torch.triu_indices(self.head_dim, self.head_dim, offset=1, device=x.device)
        return torch.cat([one, x, x.square() * 0.5**0.5, x[..., i] * x[..., j]], -1)


FEATURE_MAPS: Mapping[str, Callable[..., FeatureMap]] = {
    "elu": partial(Pointwise, activation="elu"),
    "relu": partial(Pointwise, activation="relu"),
    "identity": partial(Pointwise, activation="identity"),
    "elementwise_product": ElementwiseProduct,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "dpfp": DPFP,
    "taylor": Taylor,
}


def create_feature_map(name: str, head_dim: int, **options: Any) -> FeatureMap:
    """Build a feature map by its name, e.g. ``create_feature_map("dpfp", 16, nu=2)``.

    Raises:
        ValueError: for an unknown name or unknown options.
    """
    checks.one_of("feature_map", name, FEATURE_MAPS)
    checks.positive("head_dim", head_dim)
    try:
        return FEATURE_MAPS[name](head_dim, **options)
    except TypeError as error:
        raise ValueError(f"options of feature_map {name!r}: {error}") from None
