"""Attention by a product of features over whole sequences (images), with a normalizer to choose.

With scores ``s_ij = (scale / S) q_i . k_j`` and ``z_i = sum_j s_ij``, a normalizer is a map from z
to a factor a and an offset b::

    w_ij = a(z_i) s_ij + b(z_i) / S,        o_i = sum_j w_ij v_j

The weights of a row sum to ``a z + b``, which is 1 for all of these:

    divide     a = 1/z,     b = 0        linear attention, Katharopoulos et al., arXiv 2006.16236
    subtract   a = 1,       b = 1 - z    InLine, Han et al., arXiv 2412.06590, equation 4
    magnitude  a = 1 + 1/z, b = -z       MALA, Fan et al., arXiv 2507.00698, equation 6

o needs only ``M = sum_j k_j v_j^T / S`` and the means of k and v: linear time in T and S.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K feature dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import without_autocast

Normalizer = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def divide(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return 1 / (z + eps), torch.zeros_like(z)


def subtract(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(z), 1 - z


def magnitude(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return 1 + 1 / (z + eps), -z


NORMALIZERS: dict[str, Normalizer] = {
    "divide": divide,
    "subtract": subtract,
    "magnitude": magnitude,
}


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str | Normalizer,
    *,
    scale: float | None = None,
    turned: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Every query over every key, in linear time.

    Args:
        q: ``[B,T,H,K]``, features of the queries.
        k: ``[B,S,G,K]``, features of the keys, G a divisor of H.
        v: ``[B,S,G,V]``.
        normalizer: one of ``NORMALIZERS``, or a function ``(z, eps) -> (a, b)``.
        scale: of the scores; ``K^-0.5`` where None.
        turned: q and k with their positions in them, for the scores alone: z stays the one of the
            plain q and k, so that rows no longer sum to 1.
        valid: bool ``[B,S]``, False at keys that are not there; S becomes their number.
        eps: beside z where it divides.

    Returns:
        ``o [B,T,H,V]`` in the dtype of v; sums are in float32 at least.

    Raises:
        ValueError: for shapes that do not fit, or an unknown normalizer.
    """
    normalize, scale = prepare(q, k, v, normalizer, scale, turned, valid)
    with without_autocast(q.device.type):
        wide = torch.promote_types(v.dtype, torch.float32)
        plain, keys, values = q.to(wide), k.to(wide), v.to(wide)
        facing, faced = (t.to(wide) for t in turned) if turned is not None else (plain, keys)
        count: Tensor | int = k.shape[1]
        if valid is not None:
            there = valid[:, :, None, None]
            keys, values, faced = (t.masked_fill(~there, 0) for t in (keys, values, faced))
            count = valid.sum(1).clamp_min(1).to(wide)[:, None, None]
        k_mean, v_mean = keys.sum(1) / count, values.sum(1) / count
        each = count[..., None] if isinstance(count, Tensor) else count
        M = torch.einsum("bsgk,bsgv->bgkv", faced / k.shape[1], values) * (k.shape[1] / each)
        z = scale * torch.einsum("btgrk,bgk->btgr", _grouped(plain, k.shape[2]), k_mean)
        a, b = normalize(z, eps)
        o = torch.einsum("btgrk,bgkv->btgrv", _grouped(facing, k.shape[2]), M)
        o = (scale * a)[..., None] * o + b[..., None] * v_mean[:, None, :, None]
        return o.flatten(2, 3).to(v.dtype)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: str | Normalizer,
    scale: float | None,
    turned: tuple[Tensor, Tensor] | None,
    valid: Tensor | None,
) -> tuple[Normalizer, float]:
    """The normalizer and the scale, all arguments checked."""
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B S G K"), "v": (v, "B S G V")})
    checks.divides("heads of k", k.shape[2], "heads of q", q.shape[2])
    if turned is not None:
        checks.shape("turned[0]", turned[0], tuple(q.shape))
        checks.shape("turned[1]", turned[1], tuple(k.shape))
    if valid is not None:
        checks.shape("valid", valid, tuple(k.shape[:2]))
        if valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool, got {valid.dtype}")
    if isinstance(normalizer, str):
        checks.one_of("normalizer", normalizer, NORMALIZERS)
        normalizer = NORMALIZERS[normalizer]
    return normalizer, q.shape[-1] ** -0.5 if scale is None else scale


def _grouped(q: Tensor, groups: int) -> Tensor:
    """``[B,T,H,K]`` as ``[B,T,G,H/G,K]``."""
    return q.unflatten(2, (groups, -1))
