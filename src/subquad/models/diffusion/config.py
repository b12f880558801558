"""The configuration of a diffusion transformer: blocks of one width, a mixer for each."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from subquad.models.config import check_mixers, expand_pattern
from subquad.ops import checks


class DiTConfig(PreTrainedConfig):
    """What a :class:`~subquad.models.diffusion.model.DiT` is made of; saved as config.json.

    Args:
        image_size: pixels on a side of the images that it makes; channels: of them.
        classes: that it can be asked for; 0 for none.
        patch: pixels, on a side, to a token.
        dim, depth, heads: width, blocks and heads.
        layers: the pattern of mixers, aliases with optional counts, repeated to the depth.
        mixers: the options of each alias, ``{alias: {"mixer": key, **options}}``; the key of the
            catalogue is the alias itself where ``"mixer"`` is left out. JSON values only. A mixer
            that may be causal is not, and rotates nothing, unless told so here.
        bias: whether projections of the mixers that may have one do.
        qk_norm: whether mixers that may norm their queries and keys do.
        mlp_ratio: inner width of the MLP in widths.
        norm_eps: of the layer norms. init_std: deviation of linear weights.

    Raises:
        ValueError: for values out of range and unknown mixers.
    """

    model_type = "subquad_dit"
    attribute_map = {"hidden_size": "dim", "num_hidden_layers": "depth"}

    image_size: int = 32
    channels: int = 1
    classes: int = 10
    patch: int = 2
    dim: int = 192
    depth: int = 6
    heads: int = 6
    layers: str | list[str] = "softmax"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    bias: bool = True
    qk_norm: bool = True
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if not name.startswith("_") and not hasattr(PreTrainedConfig, name):
                said = "an argument of DiTConfig (a mixer's options go into mixers[alias])"
                known = [*DiTConfig.__annotations__, *PreTrainedConfig.__annotations__]
                checks.one_of(said, name, known)
        for name in ("image_size", "channels", "patch", "dim", "depth", "heads"):
            checks.positive(name, getattr(self, name))
        checks.positive("classes", self.classes, zero=True)
        checks.divides("patch", self.patch, "image_size", self.image_size)
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {self.dim}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        check_mixers(self.pattern, self.mixers)
        super().__post_init__(**kwargs)

    @property
    def pattern(self) -> tuple[str, ...]:
        """The alias of every block."""
        return expand_pattern(self.layers, self.depth)

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch) ** 2

    def mixer(self, alias: str) -> tuple[str, dict[str, Any]]:
        """The key in the catalogue and the options of an alias."""
        options = dict(self.mixers.get(alias, {}))
        return options.pop("mixer", alias), options
