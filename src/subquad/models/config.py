"""The configuration of a :class:`~subquad.models.causal_lm.CausalLM`: its layer pattern as data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from itertools import cycle, islice
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig

from subquad import catalogue
from subquad.ops import checks

_TOKEN = re.compile(r"([^\s*]+)(?:\*([1-9][0-9]*))?")


def expand_pattern(layers: str | Sequence[str], depth: int) -> tuple[str, ...]:
    """The alias of each of ``depth`` layers: ``"a*2 b"`` to depth 5 is ``a a b a a``.

    Raises:
        ValueError: for an empty pattern, a token that is no ``alias`` or ``alias*count``, or a
            pattern that names more layers than there are.
    """
    tokens = layers.split() if isinstance(layers, str) else list(layers)
    group: list[str] = []
    for token in tokens:
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(
                "layers must be aliases with an optional count, such as 'gla*3 softmax', "
                f"got {token!r} in {layers!r}"
            )
        group += [match[1]] * int(match[2] or 1)
    if not 1 <= len(group) <= depth:
        raise ValueError(f"layers must name 1..depth={depth} layers, got {len(group)}: {layers!r}")
    return tuple(islice(cycle(group), depth))


def check_mixers(pattern: Iterable[str], mixers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where a pattern's aliases and their options are not those of known mixers."""
    used = dict.fromkeys(pattern)
    keys = [card.key for card in catalogue.systems(kind="mixer")]
    for alias in mixers:
        checks.one_of("alias in mixers", alias, used)
    for alias in used:
        options = mixers.get(alias, {})
        if alias in mixers:
            checks.one_of(f"mixer of {alias!r}", options.get("mixer", alias), keys)
        else:
            checks.one_of("layers", alias, [*keys, *mixers])
        if "dim" in options:
            raise ValueError(f"mixers[{alias!r}] must leave out dim, the model sets it")
        try:
            json.dumps(options)
        except TypeError as error:
            raise ValueError(f"mixers[{alias!r}] must hold JSON values: {error}") from None


def _known_to_transformers(name: str) -> bool:
    """Whether every transformers config takes the argument."""
    loading = ("attn_implementation", "experts_implementation", "quantization_config")
    return (
        name.startswith("_")
        or name in loading
        or name in CausalLMConfig.attribute_map
        or name in GenerationConfig._get_default_generation_params()
        or hasattr(PreTrainedConfig, name)
    )


class CausalLMConfig(PreTrainedConfig):
    """What a :class:`~subquad.models.causal_lm.CausalLM` is made of; saved as ``config.json``.

    Args:
        vocab_size: number of tokens.
        dim: C, the model's width.
        depth: number of layers.
        layers: the pattern of mixers, aliases with optional counts, repeated to ``depth``, e.g.
            ``"gated_deltanet*3 softmax"``; a list of aliases means the same.
        mixers: the options of each alias, ``{alias: {"mixer": key, **options}}``; the key of the
            catalogue is the alias itself where ``"mixer"`` is left out. JSON values only.
        mlp_dim: inner width of the SwiGLU; None is 8/3 C rounded up to a multiple of 64, 0 leaves
            the MLP out.
        norm_eps: of the blocks' norms and the final norm.
        tie_embeddings: whether the head shares the embedding's weight.
        max_positions: number of learned position embeddings; None for none.
        init_std: standard deviation of linear weights and embeddings.
        scale_residual_init: divide the deviation of the projections that write to the residual
            stream by ``sqrt(2 depth)``.
        residual_float32: keep the residual stream in float32 whatever the weights' dtype.
        use_cache: whether a forward pass outside training returns a cache.

    Raises:
        ValueError: for values out of range, a broken pattern, and unknown mixers (naming the
            nearest ones).
    """

    model_type = "subquad"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 256
    dim: int = 256
    depth: int = 4
    layers: str | list[str] = "gated_deltanet"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp_dim: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int | None = None
    init_std: float = 0.02
    scale_residual_init: bool = False
    residual_float32: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if not _known_to_transformers(name):
                said = "an argument of CausalLMConfig (a mixer's options go into mixers[alias])"
                checks.one_of(said, name, CausalLMConfig.__annotations__)
        for name in ("vocab_size", "dim", "depth"):
            checks.positive(name, getattr(self, name))
        if self.mlp_dim is not None:
            checks.positive("mlp_dim", self.mlp_dim, zero=True)
        if self.max_positions is not None:
            checks.positive("max_positions", self.max_positions)
        check_mixers(self.pattern, self.mixers)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r}, the config has {found!r}")
        return super().from_dict(config_dict, **kwargs)

    @property
    def pattern(self) -> tuple[str, ...]:
        """The alias of every layer."""
        return expand_pattern(self.layers, self.depth)

    @property
    def inner_dim(self) -> int:
        """Inner width of the MLP, 0 where there is none."""
        return -(-8 * self.dim // (3 * 64)) * 64 if self.mlp_dim is None else self.mlp_dim

    def mixer(self, alias: str) -> tuple[str, dict[str, Any]]:
        """The key in the catalogue and the options of an alias."""
        options = dict(self.mixers.get(alias, {}))
        return options.pop("mixer", alias), options
