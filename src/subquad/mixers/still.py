"""STILL: recent and salient tokens by softmax, all others through a norm-keeping feature map.

Source: Meng, Huo, Lou et al., "STILL: Selecting Tokens for Intra-Layer Hybrid Attention to
Linearize LLMs", arXiv 2602.02180.

Legend: N rows, T tokens, S tokens with those kept, H query heads, G key/value heads, K head dim,
l tokens in a chunk, M salient tokens of the past.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.head_map import NormMap
from subquad.mixers.parts.past import Span
from subquad.mixers.parts.recurrent import flops_of_weights
from subquad.mixers.parts.summary import extend
from subquad.mixers.softmax import Softmax, ramp
from subquad.ops import checks
from subquad.ops.kernel_attention import How, Near, cost, mixed_attention
from subquad.ops.kernel_attention.grid import Grid
from subquad.ops.kernel_attention.reference import mixed_weights
from subquad.ops.kernel_attention.saliency import KINDS, saliency
from subquad.ops.layout import repeat_heads


class STILL(Softmax):
    """``o = (sum_E exp(s - m) v + gate * S^T phi(q)) / (sum_E exp(s - m) + z . phi(q) + eps)``.

    E are the tokens of the own chunk and the one before, and of all older chunks those few that
    are salient: whose attention over the last chunk's length changes most when they may not see
    themselves. The older ones that are not are in S and z. The projections are those of the softmax
    layer it replaces, whose weights it loads by name.

    Args:
        chunk: l.
        ratio: the share of a chunk that is salient; ``int(l * ratio)`` tokens a head.
        features: F of the maps, which are 2 F wide; K where None.
        score: of salience, see :func:`~subquad.ops.kernel_attention.saliency.saliency`.
            "authors_chunk" also lets chunk 0 see a chunk of zeros before it, as the authors' code
            does; it takes whole texts only.
        eps: added to the denominator.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")

    def __init__(
        self,
        *,
        dim: int,
        chunk: int = 64,
        ratio: float = 1 / 16,
        features: int | None = None,
        score: str = "smooth",
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to chunk, got {sorted(options)}")
        super().__init__(dim=dim, **options)
        self.past = ()
        checks.positive("chunk", chunk)
        checks.one_of("score", score, KINDS)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must lie in 0..1, got {ratio}")
        self.near, self.salient, self.score, self.eps = (
            Near(chunk, "terraced"), int(chunk * ratio), score, eps,
        )  # fmt: skip
        self.feature_map_q = NormMap(self.heads, self.head_dim, features)
        self.feature_map_k = copy.deepcopy(self.feature_map_q)  # alike at first, as the authors'
        self.g_proj = nn.Linear(dim, self.heads * self.head_dim, bias=False)
        nn.init.ones_(self.g_proj.weight)

    @classmethod
    def translate(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' maps, a linear layer a head and the reflections, under our names."""
        out, heads = {}, dict[str, dict[int, Tensor]]()
        for name, t in weights.items():
            owner, _, rest = name.partition(".mlp.linears.")
            if rest:
                heads.setdefault(owner, {})[int(rest.partition(".")[0])] = t.mT
            elif name != "window_factors":  # a buffer of theirs that nothing reads
                out[name.replace(".hh.u", ".u")] = t
        return out | {f"{n}.weight": torch.stack([ts[h] for h in sorted(ts)])
                      for n, ts in heads.items()}  # fmt: skip

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.score == "authors_chunk":
            self.whole(context)
            if context.padding is not None:
                raise ValueError("score 'authors_chunk' takes no padding")
        q, k, v = self.qkv(x, context)
        wide = torch.promote_types(x.dtype, torch.float32)
        score = torch.zeros(*x.shape[:2], self.heads, dtype=wide, device=x.device)
        span = Span(context, {"k": k, "v": v, "score": score}, window=self.near.reach, rows=True)
        q, k, v = span.rows(q), span["k"], span["v"]
        gate = torch.sigmoid(span.rows(self.g_proj(x)).to(wide)).unflatten(-1, (self.heads, -1))
        choice = self._choose(q, k, span, context)
        phi_q = self.feature_map_q(q)
        phi_k = self.feature_map_k(repeat_heads(k, self.heads))
        given: dict[str, Any] = {"chosen": None if choice is None else choice.chosen}
        if context.state is not None:
            given |= {"state": (context.state["S"], context.state["z"]), "seen": context.seen}
            given["kept"] = self._kept(context) if choice is not None else None
        if self.score == "authors_chunk":
            k, v, phi_k = (self._after_zeros(t) for t in (k, v, phi_k))
            if choice is not None:
                given["chosen"] = F.pad(choice.chosen, (0, 0, self.near.window, 0))
        o, (S, z) = mixed_attention(
            q, k, v, phi_q, phi_k, near=self.near, scale=self.scale, gate=gate, eps=self.eps,
            per=self.salient, starts=span.starts, **given,
        )  # fmt: skip
        own = {"S": S, "z": z}
        if choice is not None:
            own |= self._salient(choice, span, context)
        return span.tokens(o), ChainMap(own, span.state())  # type: ignore[arg-type]

    def _after_zeros(self, t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, 0, self.near.window, 0))

    @torch.no_grad()
    def _choose(self, q: Tensor, k: Tensor, span: Span, context: Context) -> _Choice | None:
        """Score the new tokens, beside those scored before, and take the best of every chunk."""
        if not self.salient:
            return None
        T, S, w = q.shape[1], k.shape[1], self.near.window
        new = saliency(q, k, w, scale=self.scale, kind=self.score, starts=span.starts)
        fresh = torch.arange(T, device=q.device) >= T - (context.seen_after - context.seen)[:, None]
        if (context.padding is not None and context.state is None) or len(fresh) != len(q):
            fresh = torch.ones(1, T, dtype=torch.bool, device=q.device)
        score = span["score"]
        score[:, S - T :] = torch.where(fresh[..., None], new, score[:, S - T :])
        grid = Grid(S, w, span.starts, None, q.device)
        place = torch.arange(S, device=q.device)[None]
        place = place if span.starts is None else place - span.starts[:, None]
        absent = grid.lay(place.expand(len(score), -1), fill=-1) < 0
        laid = grid.lay(score).masked_fill(absent[..., None], -torch.inf).unflatten(1, (-1, w))
        index = laid.topk(self.salient, 2)[1].sort(2)[0]  # [N,n,per,H]
        taken = torch.zeros_like(laid, dtype=torch.bool).scatter_(2, index, True)
        chosen = grid.lift(taken.flatten(1, 2)) & (place >= 0)[..., None]
        return _Choice(chosen, index, grid)

    def _kept(self, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        assert context.state is not None
        k, v = context.state["salient_k"], context.state["salient_v"]
        held = self.near.flushed(context.seen) // self.near.window * self.salient
        return k, v, torch.arange(k.shape[1], device=k.device) < held[:, None]

    def _salient(self, choice: _Choice, span: Span, context: Context) -> dict[str, Tensor]:
        """The salient keys and values kept so far, those of the chunks that became old among
        them."""
        w, per, grid = self.near.window, self.salient, choice.grid
        old, now = (self.near.flushed(t) // w for t in (context.seen, context.seen_after))
        first = (
            old.new_zeros(1)
            if span.starts is None
            else (-span.starts).div(w, rounding_mode="floor")
        )
        chunk = first[:, None] + torch.arange(grid.blocks, device=old.device)  # [N or 1,n]
        leaves = (chunk >= old[:, None]) & (chunk < now[:, None])
        place = chunk[..., None] * per + torch.arange(per, device=old.device)
        place = torch.where(leaves[..., None], place, -1).flatten(1)
        length, state = int(now.max()) * per, {}
        for name in ("k", "v"):
            blocks = grid.lay(repeat_heads(span[name], self.heads)).unflatten(1, (-1, w))
            index = choice.places[..., None].expand(*choice.places.shape, blocks.shape[-1])
            new = blocks.gather(2, index).flatten(1, 2)
            past = context.past(f"salient_{name}")
            state[f"salient_{name}"] = extend(past, new, place.expand(len(new), -1), length)
        return state

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """The attention weights ``[B,H,T,T]`` without the gate: quadratic, for short texts.

        Raises:
            ValueError: for packed sequences and with a state.
        """
        self.whole(context)
        q, k, _ = self.qkv(x, context)
        score = torch.zeros(*x.shape[:2], self.heads, device=x.device, dtype=x.dtype)
        span = Span(context, {"k": k, "score": score}, window=self.near.reach)
        choice = self._choose(q, k, span, context)
        how = How(
            self.near, self.scale, chosen=None if choice is None else choice.chosen,
            starts=span.starts, eps=self.eps,
        )  # fmt: skip
        phi_k = self.feature_map_k(repeat_heads(k, self.heads))
        return mixed_weights(q, k, self.feature_map_q(q), phi_k, how)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        H, K, w = self.heads, self.head_dim, self.near.window
        raw = min(T, self.near.reach)
        old = max((T - 1) // w - 1, 0) * self.salient
        keys = (raw * self.kv_heads + old * H) * 2 * K * dtype.itemsize
        return keys + raw * H * 4 + cost.state_bytes(H=H, F=self.feature_map_k.width, V=K)

    def flops(self, T: int) -> int:
        """With the salience scores, which have no values: half a pair each."""
        H, K, w = self.heads, self.head_dim, self.near.window
        maps = self.feature_map_q.weight.numel() + self.feature_map_k.weight.numel()
        whole, rest = divmod(T, w)
        salient = self.salient * (
            w * max(whole - 1, 0) * (whole - 2) // 2 + rest * max(whole - 1, 0)
        )
        extra = 4 * salient + (2 * ramp(T, w) if self.salient else 0)
        mixing = cost.flops(T=T, H=H, K=K, V=K, F=self.feature_map_k.width, near=self.near)
        return flops_of_weights(self, T) + 2 * T * maps + mixing + extra * H * K


class _Choice(NamedTuple):
    """chosen: bool ``[N,S,H]``; places: where in each chunk, rising, ``[N,n,per,H]``."""

    chosen: Tensor
    places: Tensor
    grid: Grid
