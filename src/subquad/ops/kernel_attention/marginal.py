"""Linear attention of blocks of queries, each over key blocks of its own, by states of the blocks.

    h_n = sum_(j in block n) phi(k_j) v_j^T,   z_n = sum_(j in block n) phi(k_j)
    S_m = sum_(n read by m) h_n,               Z_m likewise
    o_i = S_m^T phi(q_i) / (phi(q_i) . Z_m + eps)   for the queries i of block m

No query meets a key: the work is linear in T, but for the product of the map ``[M,N]`` of blocks
with the states. That product costs the same over the blocks that are read as over those that are
not, so the first are added rather than the second taken from the sum of all, which would cancel
where a row reads little.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim,
M blocks of queries, N of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import uses_kernels, without_autocast

PHI: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),  # over the features of a head
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


def marginal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    size: int,
    *,
    rows: int | None = None,
    phi: str = "softmax",
    eps: float = 1e-5,
) -> Tensor:
    """Divided linear attention over the key blocks that ``read`` names.

    On GPUs by kernels that make phi and its gradient in place; elsewhere by matrix products.

    Args:
        q: ``[B,T,H,K]``; k: ``[B,S,G,K]``; v: ``[B,S,G,V]``, float, one dtype; the last blocks may
            be short.
        read: bool ``[B,H,M,N]``, whether a block of queries reads a block of keys.
        size: keys in a block; rows: queries in a block, ``size`` where None.
        phi: the feature map, one of ``PHI``.
        eps: added to the sum of the weights.

    Returns:
        ``o [B,T,H,V]``, 0 where nothing is read: float32 (float64 for float64 inputs).
        Differentiable in q, k and v.

    Raises:
        ValueError: for shapes, head counts and dtypes that do not fit, and an unknown phi.
    """
    rows = size if rows is None else rows
    checks.positive("size", size)
    checks.positive("rows", rows)
    checks.one_of("phi", phi, PHI)
    sizes = checks.shapes(
        {"q": (q, "B T H K"), "k": (k, "B S G K"), "v": (v, "B S G V"), "read": (read, "B H M N")}
    )
    checks.same_dtype({"q": q, "k": k, "v": v})
    B, T, S, H, G = (sizes[name] for name in "BTSHG")
    checks.divides("heads of k", G, "heads of q", H)
    checks.shape("read", read, (B, H, -(-T // rows), -(-S // size)))
    with without_autocast(q.device.type):
        if uses_kernels(q):
            from subquad.ops.kernel_attention.triton import marginal_op as kernels

            if kernels.fits(v, sizes["K"]):
                return kernels.marginal(q, k, v, read, size, rows, phi, eps)
        wide = torch.promote_types(v.dtype, torch.float32)
        f_q, f_k = (PHI[phi](t.to(wide)) for t in (q, k))
        h, z = states(f_k, v.to(wide), size)
        map_ = read.to(wide).unflatten(1, (G, -1)).flatten(2, 3)  # [B,G,r*M,N]
        S_m = (map_ @ h.flatten(3)).view(B * H, -1, *h.shape[3:])
        Z_m = (map_ @ z).view(B * H, -1, z.shape[-1])
        short = read.shape[2] * rows - T
        own = F.pad(f_q, (0, 0, 0, 0, 0, short)).transpose(1, 2)
        own = own.reshape(B * H, -1, rows, own.shape[3])
        o = (own @ S_m) / (own @ Z_m[..., None] + eps)
        return o.view(B, H, -1, o.shape[-1])[:, :, :T].transpose(1, 2)


def states(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """h ``[B,G,N,K,V]`` and z ``[B,G,N,K]`` of the blocks of features ``k [B,S,G,K]`` and values
    ``v [B,S,G,V]``."""
    short = -k.shape[1] % size
    k, v = (
        F.pad(t, (0, 0, 0, 0, 0, short)).transpose(1, 2).unflatten(2, (-1, size)) for t in (k, v)
    )
    return k.mT @ v, k.sum(3)
