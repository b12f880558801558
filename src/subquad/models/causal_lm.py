"""A language model of pre-norm blocks around mixers, as a transformers model.

    h += mixer(norm(h));  h += SwiGLU(norm(h))        then a final norm and the head

Legend: B batch, T tokens, C dim, N packed sequences.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from subquad.caches.states import StateCache
from subquad.caches.steps import ROOM, Steps, on_one_gpu
from subquad.mixers.base import Context
from subquad.mixers.parts.norm import GatedRMSNorm as RMSNorm
from subquad.models.blocks import Block, lower_bounds, normed
from subquad.models.checkpoint import Checkpoints
from subquad.models.config import CausalLMConfig
from subquad.models.loss import count_labels, cross_entropy, shift_labels
from subquad.models.padding import left_padding, unstarted
from subquad.ops import checks
from subquad.parallel import current


class CausalLM(Checkpoints, PreTrainedModel, GenerationMixin):
    """A causal language model whose mixers are named, layer by layer, by its config.

    Everything that transformers offers a causal model works: ``generate`` (greedy, sampling, beam
    search, left padding, chunked prefill, a cache kept over several turns), ``save_pretrained`` and
    ``from_pretrained``, ``AutoModelForCausalLM``, gradient checkpointing, ``torch.compile``.
    """

    config: CausalLMConfig
    config_class = CausalLMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _is_stateful = True  # a recurrence cannot take back tokens that speculation got wrong

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        if config.max_positions is not None:
            self.embed_positions = nn.Embedding(config.max_positions, config.dim)
        self.lower_bounds = lower_bounds(config)
        self.layers = nn.ModuleList(
            [Block(config, layer, self.lower_bounds) for layer in range(config.depth)]
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: ``[B,T]``.
            attention_mask: ``[B,T]``, or ``[B,past+T]`` with a cache; 0 at padding, which lies on
                the left. A causal model needs no mask for padding on the right: there it is ignored
                and no cache is returned.
            labels: ``[B,T]`` as the inputs (they are shifted here); -100 does not count. The loss
                is over all of T, whatever ``logits_to_keep`` says.
            past_key_values: the cache that an earlier call returned; it is continued in place.
            use_cache: whether to return a cache; where None, as the config says outside training.
            cu_seqlens: int32 ``[N+1]``: the inputs ``[1,T]`` pack N sequences.
            positions: ``[B,T]``, the tokens' places; counted from the start where None.
            inputs_embeds: ``[B,T,C]`` in place of ``input_ids``.
            logits_to_keep: only the last so many logits (0 for all), or those of these places.
            output_hidden_states: whether to return the stream before each block and after the
                final norm.
            num_items_in_batch: divides the summed loss in place of the labels' own count.

        Under :func:`subquad.parallel.sequence` the inputs and labels are this process's tokens,
        ``cu_seqlens`` is of all, and the losses of the processes add up to the loss.

        Raises:
            ValueError: for inputs that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        cache, keep = self._cache(past_key_values, use_cache)
        x = cache.with_pending(x)
        padding, right = left_padding(attention_mask, x, cache)
        if right and (use_cache or cache.states):
            raise ValueError("attention_mask must pad on the left where a cache is used")
        places = {"padding": padding, "cu_seqlens": cu_seqlens, "positions": positions}
        h = self._stream(x, cache, places)
        stream, states = [], []
        for i, block in enumerate(self.layers):
            stream.append(h)
            h, state = block(h, state=cache.states[i] if cache.states else None, **places)
            states.append(state)
        h = normed(self.norm, h)
        keep = keep and not right
        if keep:
            seen = T if (here := current()) is None else T * here.size
            cache.take(states, seen, pending=x if unstarted(padding) else None)

        h = h[:, -T:]
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, last])
        loss = None
        if labels is not None:
            targets, count = shift_labels(labels, cu_seqlens), num_items_in_batch
            if count is None and current() is not None:
                count = count_labels(targets)
            loss = self._loss(h, logits, targets, count)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if keep else None,
            hidden_states=(*(s[:, -T:] for s in stream), h) if output_hidden_states else None,
        )

    def _cache(self, given: StateCache | None, use_cache: bool | None) -> tuple[StateCache, bool]:
        """The cache to start from, and whether to keep it."""
        if given is not None and not isinstance(given, StateCache):
            raise ValueError(f"past_key_values must be a StateCache, got {type(given).__name__}")
        if given is not None and len(given) not in (0, len(self.layers)):
            raise ValueError(f"past_key_values must hold {len(self.layers)} layers: {given}")
        checkpointed = self.training and any(b.gradient_checkpointing for b in self.blocks)
        if checkpointed and (use_cache or given is not None):
            raise ValueError("gradient checkpointing runs layers twice, so it takes no cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return StateCache() if given is None else given, use_cache or given is not None

    def _stream(self, x: Tensor, cache: StateCache, places: dict[str, Any]) -> Tensor:
        """The residual stream at its start: embeddings, with positions where they are learned."""
        if self.config.max_positions is not None:
            cu = places["cu_seqlens"]
            rows = x.shape[0] if cu is None else cu.numel() - 1
            seen = cache.states[0].seen if cache.states else x.new_zeros(rows, dtype=torch.int64)
            context = Context(
                None, places["padding"], cu, seen, places["positions"], None, x.shape[1], current()
            )
            at = context.positions
            if checks.readable(at) and int(at.max()) >= self.config.max_positions:
                raise ValueError(
                    f"positions must lie below max_positions={self.config.max_positions}, "
                    f"got {int(at.max())}"
                )
            x = x + self.embed_positions(at)
        if self.config.residual_float32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x

    def _loss(
        self, h: Tensor, logits: Tensor, targets: Tensor, count: Tensor | int | None
    ) -> Tensor:
        """From the logits where all of them are there, else from the hidden states."""
        checks.shape("labels", targets, tuple(h.shape[:2]))
        whole = logits.shape[1] == h.shape[1]
        return cross_entropy(
            logits if whole else h,
            targets,
            vocab_size=self.lm_head.out_features,
            head=None if whole else self.lm_head,
            count=count,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, init_std) for what torch drew; what a mixer drew by its own rule stays."""
        std = self.config.init_std
        if self.config.scale_residual_init and hasattr(module, "writes_residual"):
            std /= math.sqrt(2 * self.config.depth)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            fresh = nn.Linear(1, 1, device=module.weight.device)
            if module.weight._version == fresh.weight._version:
                init.normal_(module.weight, std=std)
            if module.bias is not None and module.bias._version == fresh.bias._version:
                init.zeros_(module.bias)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None (a StateCache), got {asked!r}")
        if model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args
            )
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache()

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    @property
    def repeats(self) -> bool:
        """Whether a token's launches may be recorded: all mixers' can (``Mixer.repeats``)."""
        return all(b.mixer.repeats for b in self.blocks) and self.config.max_positions is None

    def steps(self, cache: StateCache, room: int = ROOM) -> Steps:
        """Decode from ``cache``, token after token; on a GPU the launches are recorded and repeated
        where they may be. See :class:`~subquad.caches.steps.Steps`."""

        def run(ids: Tensor, places: Tensor | None) -> Tensor:
            return self(input_ids=ids, past_key_values=cache).logits

        return Steps(run, cache, repeats=self.repeats and on_one_gpu(self), room=room)

    def state_bytes(self, T: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the cache of one sequence after T tokens; dtype is the activations'."""
        return sum(b.mixer.state_bytes(T, dtype or self.dtype) for b in self.blocks)

    def flops(self, T: int) -> int:
        """Floating-point operations of the forward pass over one sequence of T tokens."""
        mlp = 6 * T * self.config.dim * self.config.inner_dim
        head = 2 * T * self.config.dim * self.config.vocab_size
        return head + sum(b.mixer.flops(T) + mlp for b in self.blocks)
