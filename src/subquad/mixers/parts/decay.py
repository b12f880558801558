"""Forget gates in log space, at least float32, and their initialisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import checks


def widen(x: Tensor) -> Tensor:
    """``x`` in at least float32: a gate near 1 rounds to 1 in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softplus_step(x: Tensor, dt_bias: Tensor) -> Tensor:
    """The step ``softplus(x + dt_bias)`` of Mamba-2, Gated DeltaNet and KDA."""
    return F.softplus(widen(x) + widen(dt_bias))


def bounded_gate(r: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """The forget gate ``f = bound + (1 - bound) sigmoid(r)`` of HGRN as ``(log f, 1 - f)``.

    Each of the two has its own form, so neither loses digits where f is near 0 or 1.

    Args:
        r: ``[...,C]``, logits.
        bound: ``[C]`` in [0, 1), the least f; None is 0.
    """
    r = widen(r)
    if bound is None:
        return F.logsigmoid(r), torch.sigmoid(-r)
    bound = bound.to(r.dtype)
    log = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(r))
    return log, (1 - bound) * torch.sigmoid(-r)


class LowerBounds(nn.Module):
    """The least forget gates of a stack of HGRN or HGRN2 layers, rising with the depth.

    ``bound_l = sum_{0 < i <= l} softmax(weight)_i``, the softmax over the layers, so that the first
    layer's bound is 0 and every other is below 1 (HGRN, arXiv 2311.04823). The parameter couples
    all layers and so belongs to the model: one per model, indexed by the global layer number.

    Args:
        layers: L; layers of other kinds in between have a row that goes unused.
        width: C, gates a layer.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        checks.positive("layers", layers)
        self.weight = nn.Parameter(torch.zeros(layers, width))

    def forward(self, layer: int) -> Tensor:
        """The bound ``[C]`` of one layer, in at least float32."""
        return widen(self.weight).softmax(0)[1 : layer + 1].sum(0)


class LayerBound(nn.Module):
    """The least forget gate of one layer.

    Args:
        width: C, gates of the layer.
        layer: its global number, from 0; layers: of the model.
        bounds: the model's :class:`LowerBounds`, which stays the model's (it is used here, not
            registered); or a ``[C]`` tensor, this layer's bound for good; None gives a layer that
            is not the first :class:`LowerBounds` of its own.
    """

    fixed: Tensor | None
    shared: LowerBounds | None

    def __init__(
        self, width: int, *, layer: int, layers: int, bounds: LowerBounds | Tensor | None
    ) -> None:
        super().__init__()
        if not 0 <= layer < layers:
            raise ValueError(f"layer must lie in 0..{layers - 1} (layers={layers}), got {layer}")
        self.layer = layer
        fixed, shared, own = None, None, None
        if isinstance(bounds, Tensor):
            checks.shape("bounds", bounds, (width,))
            fixed = bounds
        elif isinstance(bounds, LowerBounds):
            checks.shape("bounds", bounds.weight, (layers, width))
            shared = bounds if layer else None
        elif bounds is not None:
            raise ValueError(f"bounds must be LowerBounds, a Tensor or None, got {bounds!r}")
        elif layer:
            own = LowerBounds(layers, width)
        self.register_buffer("fixed", fixed, persistent=False)
        object.__setattr__(self, "shared", shared)
        self.own = own

    def forward(self) -> Tensor | None:
        """The bound ``[C]``; None for 0, as in the first layer."""
        if self.fixed is not None:
            return self.fixed
        bounds = self.shared if self.own is None else self.own
        return None if bounds is None else bounds(self.layer)


def A_log_parameter(heads: int, low: float, high: float) -> nn.Parameter:
    """``log A``, A uniform in ``(low, high)`` and at least 1e-4; exempt from weight decay."""
    return exempt(torch.empty(heads).uniform_(low, high).clamp_min_(1e-4).log_())


def dt_bias_parameter(width: int, low: float = 1e-3, high: float = 0.1) -> nn.Parameter:
    """The inverse softplus of a step log-uniform in ``[low, high]``, at least 1e-4."""
    dt = torch.empty(width).uniform_(math.log(low), math.log(high)).exp_().clamp_min_(1e-4)
    return exempt(dt + torch.log(-torch.expm1(-dt)))


def exempt(values: Tensor) -> nn.Parameter:
    """A parameter that the trainer leaves out of weight decay."""
    parameter = nn.Parameter(values)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
