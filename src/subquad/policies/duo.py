"""DuoAttention: a few heads keep the whole text, the others its first and its last tokens.

Xiao et al. 2025, DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming
Heads, arXiv 2410.10819.

Legend: B batch, T new tokens, S held entries, H query heads, G key heads, K head dim, L layers,
s sinks, w window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad import mask
from subquad.caches.ring import RingLayer
from subquad.caches.split import SplitLayer, taken
from subquad.ops import checks
from subquad.ops.attention import attention
from subquad.ops.attention.token import token
from subquad.policies.base import Call, Policy, Site
from subquad.policies.calibration import load_calibration, save_calibration
from subquad.policies.parts.identify import Identification, identify, tokenizer_of

Gates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Duo(Policy):
    """Retrieval heads attend to everything; streaming heads to the first ``sinks`` and the last
    ``window`` tokens, all they keep. The first piece of a prompt is read by full attention.

    Attributes:
        gates: how much each key head needs the whole text, ``[L][G]``, as :meth:`calibrate` finds
            it; None to load the calibration of the model it is applied to.
        sparsity: the share of the heads that stream.
        sinks: s; window: w, besides the new tokens themselves.
        chunk: cut a prompt into pieces of so many tokens for the streaming heads; None for one.
        path: a calibration's folder; None for the place that goes by the model's name.
    """

    gates: Sequence[Sequence[float]] | None = None
    sparsity: float = 0.5
    sinks: int = 64
    window: int = 256
    chunk: int | None = None
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must lie in 0..1, got {self.sparsity}")
        checks.positive("sinks", self.sinks, zero=True)
        checks.positive("window", self.window)
        if self.chunk is not None:
            checks.positive("chunk", self.chunk)
        if self.gates is not None:
            rows = tuple(tuple(float(gate) for gate in row) for row in self.gates)
            if not rows or len({len(row) for row in rows}) > 1 or not rows[0]:
                raise ValueError(f"gates must be [L][G], one for each key head, got {rows}")
            object.__setattr__(self, "gates", rows)

    def prepare(self, model: Any) -> Duo:
        if self.gates is not None:
            return self
        found = load_calibration("duo", model, self.path)
        return dataclasses.replace(self, gates=found.tensors["gates"].tolist())

    def check(self, sites: list[Site]) -> None:
        found = len(self._gates), len(self._gates[0])
        wanted = len(sites), sites[0].kv_heads
        if found != wanted:
            raise ValueError(
                f"gates must be [L][G]={list(wanted)} of this model, got {list(found)}"
            )

    @property
    def _gates(self) -> Gates:
        if self.gates is None:
            raise ValueError("gates must be given, or loaded for a model: see Duo.calibrate")
        return tuple(tuple(row) for row in self.gates)

    @cached_property
    def streaming(self) -> Tensor:
        """Which key heads stream, bool ``[L,G]``: those whose gate lies below the quantile."""
        gates = torch.tensor(self._gates, dtype=torch.float64)
        # Equal gates are told apart by chance, the same at every call.
        noise = torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
        gates = gates + 1e-6 * noise
        return gates < gates.flatten().quantile(self.sparsity)

    def layer(self, site: Site) -> SplitLayer:
        return SplitLayer(self._streams(site), self.sinks, self.window, site.window)

    def _streams(self, site: Site) -> Tensor:
        """Which of a layer's key heads stream, bool ``[G]``: none where the model itself sees no
        further, and was trained without sinks."""
        own = self.streaming[site.index]
        far = site.window is None or site.window > self.window
        return own if far else torch.zeros_like(own)

    def prefill(self, call: Call) -> Tensor:
        return call.unpadded(self._attend)

    def decode(self, call: Call) -> Tensor:
        o = call.unpadded(self._attend)
        self.settle(call)
        return o

    def repeats(self, site: Site) -> bool:
        return True

    def settle(self, call: Call) -> None:
        assert isinstance(call.layer, SplitLayer)
        call.layer.settle()

    def _attend(self, call: Call) -> Tensor:
        layer, share = call.layer, call.site.heads // call.site.kv_heads
        assert isinstance(layer, SplitLayer)
        streaming = self._streams(call.site)
        found: dict[int, Tensor] = {}
        for heads, part in layer.parts:
            q = taken(call.q, heads, share)
            if q.shape[1] == 1 and (isinstance(part, RingLayer) or part.clock is not None):
                # A ring holds nothing that its token does not see.
                held = part.held()
                call.count(held.keys.shape[1] * q.shape[2] * q.shape[0])
                window = None if isinstance(part, RingLayer) else call.site.window
                o = token(q, *held, scale=call.scale, window=window)
            else:
                read = self._stream if streaming[heads[0]] else self._whole
                o = read(call, q, part.keys, part.values)
            found |= zip(heads, o.split(share, 2), strict=True)
        return torch.cat([found[head] for head in sorted(found)], 2)

    def _whole(self, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: int = 0) -> Tensor:
        """Causal attention of ``q`` to all of ``k``, of which it is the last, as the model does it
        (its own window does not hide the sinks)."""
        m = mask.causal()
        if call.site.window is not None:
            near = mask.window(call.site.window - 1)
            m = m & (near | mask.sinks(sinks) if sinks else near)
        if call.tally is not None:
            call.count(m.area(q.shape[1], k.shape[1]) * q.shape[2] * q.shape[0])
        return attention(q, k, v, m, scale=call.scale)

    def _stream(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Piece by piece to the sinks, the window before the piece, and the piece. In ``k`` and
        ``v`` what the layer held stands before the new tokens."""
        T, held, s = q.shape[1], k.shape[1] - q.shape[1], self.sinks
        outs = []
        for a in range(0, T, self.chunk or T):
            b = min(a + (self.chunk or T), T)
            if a == 0 and call.first:
                outs.append(self._whole(call, q[:, :b], k[:, :b], v[:, :b]))
                continue
            near = max(held + a - self.window, s)
            keys, values = (
                torch.cat([x[:, :s], x[:, near : held + b]], 1) if near > s else x[:, : held + b]
                for x in (k, v)
            )
            outs.append(self._whole(call, q[:, a:b], keys, values, s))
        return torch.cat(outs, 1)

    def calibrate(
        self,
        model: Any,
        texts: Iterable[str],
        *,
        tokenizer: Any = None,
        out: str | Path | None = None,
        progress: Callable[[dict[str, float]], None] | None = None,
        **options: Any,
    ) -> Duo:
        """Find the gates on synthetic passkeys hidden in ``texts``; the model does not change.

        Args:
            model: to calibrate for; tokenizer: its own, by its name, where None.
            out: the folder to save to; None for the place that goes by the model's name.
            progress: called at every step with "step", "loss", "distill" and "mean".
            options: of :class:`~subquad.policies.parts.identify.Identification`.

        Returns:
            This policy with its gates.

        Raises:
            ValueError: for options out of range, or too little text.
        """
        settings = Identification(**options)
        gates = identify(model, tokenizer_of(model, tokenizer), texts, settings, progress)
        plain = dataclasses.asdict(settings)
        save_calibration("duo", model, {"gates": gates}, plain, out)
        return dataclasses.replace(self, gates=gates.tolist())
