"""Look at, and change, the attention of single heads in any decoder of transformers.

The model's attention function is replaced by one of ours while a ``with`` block lasts; nothing is
patched. Prompts go through SDPA; rows of attention are kept for single tokens only, so that a long
prompt costs no map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subquad.ops import checks
from subquad.ops.layout import repeat_heads
from subquad.policies.parts.decoder import attention_modules

NAME = "subquad-analysis"
MODES = ("uniform", "zero")
PHASES = ("decode", "all")
Head = tuple[int, int]
_watched: WeakKeyDictionary[nn.Module, tuple[Watch, int]] = WeakKeyDictionary()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q ``[B,H,T,K]``, o ``[B,T,H,V]``."""
    watch, layer = _watched[module]
    if watch.enter is not None:
        watch.enter(query, key, value)
    single = query.shape[2] == 1
    heads = watch.ablated.get(layer, []) if single or watch.phase == "all" else []
    if heads and watch.mode == "uniform":
        query = query.index_fill(1, query.new_tensor(heads, dtype=torch.int64), 0)
    if single and watch.keeps_rows:
        watch.rows[layer] = row(query, key, attention_mask, scaling)
    o = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )[0]
    if heads and watch.mode == "zero":
        o = o.index_fill(2, query.new_tensor(heads, dtype=torch.int64), 0)
    return o, None


def row(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The attention of one query a head, ``q [B,H,1,K]`` over ``k [B,G,S,K]``: ``[B,H,S]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = repeat_heads(k.transpose(1, 2), q.shape[1]).float()
    scores = torch.einsum("bhk,bshk->bhs", q[:, :, 0].float(), keys) * scale
    if mask is not None:
        seen = mask[:, :, 0, : k.shape[2]]
        scores = (
            scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        )
    return scores.softmax(-1)


class Watch:
    """A context manager in which single-token steps leave their attention rows, and chosen heads
    are put out of action.

    Args:
        model: any decoder of transformers that uses its ``AttentionInterface``.
        rows: whether the rows are kept.
        heads: (layer, head) pairs of query heads to ablate.
        mode: "uniform": the head attends to all visible keys alike (its query is zero, so it
            returns their mean value), as the authors of the retrieval heads do; "zero": it returns
            nothing.
        phase: "decode" ablates in single-token steps only; "all" in prompts too.

    Attributes:
        rows: by layer, ``[B,H,S]`` of the last single-token step, in float32.
        enter: called with q, k and v ``[B,H,T,K]`` of every layer in turn, where it is set.

    Raises:
        ValueError: for a model that cannot be reached, and for heads that it does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: bool = False,
        heads: Iterable[Head] = (),
        mode: str = "uniform",
        phase: str = "decode",
    ) -> None:
        checks.one_of("mode", mode, MODES)
        checks.one_of("phase", phase, PHASES)
        self.modules = attention_modules(model)
        self.config = model.config.get_text_config(decoder=True)
        self.keeps_rows, self.mode, self.phase = rows, mode, phase
        self.rows: dict[int, Tensor] = {}
        self.enter: Callable[[Tensor, Tensor, Tensor], Any] | None = None
        self.ablated: dict[int, list[int]] = {}
        for layer, head in sorted(set(heads)):
            L, H = len(self.modules), self.config.num_attention_heads
            if not (0 <= layer < L and 0 <= head < H):
                raise ValueError(
                    f"heads must be (layer, head) of {L} layers and {H} heads, got {(layer, head)}"
                )
            self.ablated.setdefault(layer, []).append(head)

    def __enter__(self) -> Watch:
        if self.modules[0] in _watched:
            raise ValueError("model is being watched already; leave that block first")
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self._before = self.config._attn_implementation
        self.config._attn_implementation = NAME
        for layer, module in enumerate(self.modules):
            _watched[module] = (self, layer)
        return self

    def __exit__(self, *exception: object) -> None:
        self.config._attn_implementation = self._before
        for module in self.modules:
            _watched.pop(module, None)
