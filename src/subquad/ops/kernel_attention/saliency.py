"""How much a token's attention to its recent past changes when it may not look at itself.

    a = softmax over the last w tokens of scale q_t . k_j,   a' = the same without j = t
    "paper":  sum_j a_j log((a_j + eps) / (a'_j + eps))
    "smooth": a <- (a + eps) / (1 + w eps),  a' <- (a' + eps) / (1 + w eps + 1/w), the own entry of
              a' set to 1/w + eps,  then sum_j a_j log(a_j / (a'_j + eps))

Source: Meng et al., "STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs",
arXiv 2602.02180, and its code.

Legend: B rows, T queries, S keys, H query heads, G key heads, K key dim, n blocks of w queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.kernel_attention.near import How, Near, places
from subquad.ops.layout import repeat_heads

KINDS = ("smooth", "paper", "authors_chunk")
SCORES = 1 << 21  # scores held at once


@torch.no_grad()
def saliency(
    q: Tensor, k: Tensor, window: int, *, scale: float, kind: str = "smooth",
    starts: Tensor | None = None, eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """The scores of the queries, the last T of the S tokens.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``.
        window: w.
        kind: "smooth", "paper", or "authors_chunk": "smooth" with 1/w + eps not at the own entry
            but in the last column of the authors' layout, the token ``t % w + 1`` before (the own
            one at the end of a chunk).
        starts: int ``[B]`` or ``[1]``, the column of each row's token 0; 0 where None.

    Returns:
        ``[B,T,H]``, float32 (float64 for float64); inf for a first token, which sees none but
        itself, -inf at padding. No gradient.

    Raises:
        ValueError: for shapes and kinds that do not fit.
    """
    checks.shapes({"q": (q, "B T H K"), "k": (k, "B S G K")})
    checks.one_of("kind", kind, KINDS)
    checks.positive("window", window)
    dtype, (B, T, H, _), S, w = (
        torch.promote_types(q.dtype, torch.float32),
        q.shape,
        k.shape[1],
        window,
    )
    at = places(T, S, How(Near(w), scale, starts=starts), q.device)
    short, left = -T % w, w - (S - T)
    q = F.pad(q.to(dtype), (0, 0, 0, 0, 0, short)).unflatten(1, (-1, w))
    k = F.pad(repeat_heads(k, H).to(dtype)[:, max(-left, 0) :], (0, 0, 0, 0, max(left, 0), short))
    there = F.pad(at.place[:, max(-left, 0) :] >= 0, (max(left, 0), short), value=False)
    place = F.pad(at.place[:, S - T :], (0, short), value=0).unflatten(1, (-1, w))
    distance = torch.arange(w, device=q.device)[:, None] + w - torch.arange(2 * w, device=q.device)
    found, step = [], max(1, SCORES // (B * H * 2 * w * w))
    for n in range(0, q.shape[1], step):
        own = q[:, n : n + step]
        columns = slice(n * w, (n + own.shape[1] + 1) * w)
        keys = k[:, columns].unfold(1, 2 * w, w)  # [B,n,H,K,2w]
        keep = there[:, columns].unfold(1, 2 * w, w)[:, :, None, None]
        keep = keep & (distance >= 0) & (distance < w)
        scores = scale * own.transpose(2, 3) @ keys
        found.append(_divergence(scores, keep, distance, place[:, n : n + step], w, kind, eps))
    score = torch.cat(found, 1).transpose(2, 3).flatten(1, 2)[:, :T]
    return score.masked_fill((at.place[:, S - T :] < 0)[..., None], -torch.inf)


def _divergence(scores, keep, distance, place, w: int, kind: str, eps: float) -> Tensor:
    """``[B,n,H,w]`` of scores ``[B,n,H,w,2w]``."""
    scores = scores.masked_fill(~keep, -torch.inf)
    own = distance == 0
    a = scores.softmax(-1)
    without = scores.masked_fill(own, -torch.inf)
    alone = (without == -torch.inf).all(-1)
    b = without.softmax(-1)
    if kind == "paper":
        terms = a * ((a + eps) / (b + eps)).log()
    else:
        a = (a + eps) / (1 + w * eps)
        b = (b + eps) / (1 + w * eps + 1 / w)
        floor = own
        if kind == "authors_chunk":
            floor = distance == ((place + 1) % w)[:, :, None, :, None]
        b = b.masked_fill(floor, 1 / w + eps)
        terms = a * (a / (b + eps)).log()
    return terms.masked_fill(~keep, 0).sum(-1).masked_fill(alone, torch.inf)
