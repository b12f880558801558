"""Multi-head latent attention: the past is one short vector a token, for all heads together.

Sources: DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1; without rotation (NoPE) as in
Kimi Team, "Kimi Linear", arXiv 2510.26692.

Legend: B batch, T tokens, S keys, C dim, H heads, L latent width, N and R widths of a key's part of
its own and of the part that all heads share, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.past import Span
from subquad.mixers.parts.rotary import LAYOUTS, rope_frequencies, rotate
from subquad.ops import checks

FORMS = ("auto", "expanded", "absorbed")


class MLA(Mixer):
    """``[c, r] = Wa x``, ``c <- rms_norm(c)``, ``[kn, v] = Wb c`` per head, ``k = [kn, r]``;
    softmax attention of ``q = Wq x`` over k and v with scale ``(N + R)^-0.5``.

    The state holds ``[c, r]`` alone. Both forms give the same: "expanded" makes every head's k and
    v again from c; "absorbed" takes Wb into q and the output instead, so that all heads read c
    itself, which is less work for few queries.

    Args:
        dim: C, the model's width.
        heads: H.
        latent_dim: L.
        nope_dim: N, never rotated.
        rope_dim: R, shared by the heads; it is there also where nothing is rotated.
        value_dim: V.
        rope_theta: base of the rotary frequencies of the last R features of q and of r; None
            rotates nothing (NoPE).
        rope_layout: "interleaved" or "half".
        form: "auto" (whichever has fewer operations), "expanded" or "absorbed".
        norm_eps: of the latent's norm.
    """

    past = ("latent", "pad")
    repeats = True
    FOREIGN: ClassVar[Mapping[str, str]] = {
        "kv_a_proj_with_mqa.weight": "kv_a_proj.weight",
        "kv_a_layernorm.weight": "norm.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        latent_dim: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        rope_theta: float | None = None,
        rope_layout: str = "interleaved",
        form: str = "auto",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim=dim)
        sizes = {"heads": heads, "latent_dim": latent_dim, "nope_dim": nope_dim}
        for name, size in {**sizes, "rope_dim": rope_dim, "value_dim": value_dim}.items():
            checks.positive(name, size)
        if rope_theta is not None and rope_dim % 2:
            raise ValueError(f"rope_dim must be even to be rotated, got {rope_dim}")
        checks.one_of("rope_layout", rope_layout, LAYOUTS)
        checks.one_of("form", form, FORMS)
        self.heads, self.latent_dim, self.form = heads, latent_dim, form
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.rope_theta, self.rope_layout = rope_theta, rope_layout
        self.scale = (nope_dim + rope_dim) ** -0.5

        self.q_proj = nn.Linear(dim, heads * (nope_dim + rope_dim), bias=False)
        self.kv_a_proj = nn.Linear(dim, latent_dim + rope_dim, bias=False)
        self.norm = nn.RMSNorm(latent_dim, eps=norm_eps)
        self.kv_b_proj = nn.Linear(latent_dim, heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(heads * value_dim, dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        c, r = self.kv_a_proj(x).split([self.latent_dim, self.rope_dim], -1)
        c = self.norm(c)
        if self.rope_theta is not None:
            own, shared = q.split([self.nope_dim, self.rope_dim], -1)
            q = torch.cat([own, self._turn(shared, context)], -1)
            r = self._turn(r[:, :, None], context)[:, :, 0]
        span = Span(context, {"latent": torch.cat([c, r], -1)})
        q, latent = span.rows(q), span["latent"]
        attend = self._absorbed if self._absorbs(q.shape[1], latent.shape[1]) else self._expanded
        o = span.tokens(attend(q, latent, span))
        return self.o_proj(o.flatten(-2)), span.state()

    @property
    def splits(self) -> bool:
        return True

    def _turn(self, x: Tensor, context: Context) -> Tensor:
        assert self.rope_theta is not None
        wide = x.dtype == torch.float64
        frequencies = rope_frequencies(self.rope_dim, self.rope_theta, device=x.device, wide=wide)
        return rotate(x, context.positions, frequencies, layout=self.rope_layout)

    def _expanded(self, q: Tensor, latent: Tensor, span: Span) -> Tensor:
        c, r = latent.split([self.latent_dim, self.rope_dim], -1)
        heads = self.kv_b_proj(c).unflatten(-1, (self.heads, -1))
        own, v = heads.split([self.nope_dim, self.value_dim], -1)
        k = torch.cat([own, r[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return span.attention(q, k, v, span.mask(), self.scale)

    def _absorbed(self, q: Tensor, latent: Tensor, span: Span) -> Tensor:
        Wb = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        Wk, Wv = Wb.split([self.nope_dim, self.value_dim], 1)
        own, shared = q.split([self.nope_dim, self.rope_dim], -1)
        q = torch.cat([torch.einsum("bthn,hnl->bthl", own, Wk), shared], -1)
        k, v = latent[:, :, None], latent[:, :, None, : self.latent_dim]
        o = span.attention(q, k, v, span.mask(), self.scale)
        return torch.einsum("bthl,hvl->bthv", o, Wv)

    def _absorbs(self, T: int, S: int) -> bool:
        if self.form != "auto":
            return self.form == "absorbed"
        return self._work(T, S, absorbed=True) < self._work(T, S, absorbed=False)

    def _work(self, T: int, S: int, *, absorbed: bool) -> int:
        """Multiply-adds of one head: through Wb, and over all pairs."""
        L, N, R, V = self.latent_dim, self.nope_dim, self.rope_dim, self.value_dim
        through = L * (N + V)
        return T * through + T * S * (2 * L + R) if absorbed else S * through + T * S * (N + R + V)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return T * (self.latent_dim + self.rope_dim) * dtype.itemsize

    def flops(self, T: int) -> int:
        """Of the expanded form, which prefill takes."""
        weights = (self.q_proj, self.kv_a_proj, self.kv_b_proj, self.o_proj)
        pairs = T * (T + 1) // 2
        heads = self.heads * (self.nope_dim + self.rope_dim + self.value_dim)
        return 2 * T * sum(m.weight.numel() for m in weights) + 2 * pairs * heads
