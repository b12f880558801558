"""The memory network and its gradient by hand, so that autograd goes through the inner steps.

    h = gelu(... gelu(z W_1) ...) W_L
    M(z) = h,  or with a gain  M(z) = z + layer_norm(h) (1 + g)

Legend: N sequences, H heads, w tokens, d width, e inner width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, erf, exp

EPS = 1e-5  # of the layer norm


class Sources(NamedTuple):
    """What the gradients of the layers are made of: that of layer l is ``inputs[l]^T deltas[l]``.

    Attributes:
        inputs: a layer's inputs ``[N,H,w,d_l]``.
        deltas: the loss's gradient at its outputs ``[N,H,w,d_{l+1}]``.
        gain: the gradient of the norm's gain, token by token ``[N,H,w,d]``; None without a norm.
    """

    inputs: list[Tensor]
    deltas: list[Tensor]
    gain: Tensor | None


def split(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """The layers ``[...,d_l,d_{l+1}]`` and the norm's gain ``[...,d]``, the last if there is one.

    A gain has an axis less than a layer.
    """
    layers = [w for w in weights if w.dim() == weights[0].dim()]
    return layers, weights[-1] if len(layers) < len(weights) else None


def read(weights: Sequence[Tensor], z: Tensor) -> Tensor:
    """``M(z)`` for z ``[...,w,d]`` and weights ``[...,d_l,d_{l+1}]``."""
    layers, gain = split(weights)
    h = z
    for i, W in enumerate(layers):
        h = (F.gelu(h) if i else h) @ W
    if gain is None:
        return h
    return z + F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + gain[..., None, :])


def sources(weights: Sequence[Tensor], k: Tensor, v: Tensor) -> Sources:
    """The gradient of ``|M(k_t) - v_t|^2`` for every token t, in factors."""
    layers, gain = split(weights)
    inputs, before = [], []
    h = k
    for i, W in enumerate(layers):
        if i:
            before.append(h)
            h = F.gelu(h)
        inputs.append(h)
        h = h @ W
    of_gain = None
    if gain is None:
        delta = 2 * (h - v)
    else:
        centred = h - h.mean(-1, keepdim=True)
        rate = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed, scaled = centred * rate, 1 + gain[..., None, :]
        out = 2 * (k + normed * scaled - v)
        of_gain, dn = out * normed, out * scaled
        mean = dn.mean(-1, keepdim=True)
        delta = rate * (dn - mean - normed * (dn * normed).mean(-1, keepdim=True))
    deltas = [delta]
    for W, z in zip(layers[:0:-1], before[::-1], strict=True):
        deltas.append((deltas[-1] @ W.mT) * _slope(z))
    return Sources(inputs, deltas[::-1], of_gain)


def _slope(z: Tensor) -> Tensor:
    """The derivative of gelu."""
    normal = exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + erf(z / math.sqrt(2))) + z * normal
