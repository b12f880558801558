"""Element-wise activations by the names that options use; "elu" is ``elu(x) + 1 > 0``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": _elu_plus_one,
}
