"""The configuration of a vision model: stages of blocks, a mixer for each."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from subquad.models.config import check_mixers, expand_pattern
from subquad.ops import checks

STEMS = ("conv", "patch")
POSITIONS = ("conv", "learned", "none")
NORMS = ("pre", "post")


class VisionConfig(PreTrainedConfig):
    """What a :class:`~subquad.models.vision.model.VisionModel` is made of; saved as config.json.

    One stage makes an isotropic model, several a pyramid: each halves the grid.

    Args:
        channels: of the images. classes: of the logits; 0 for no head, pooled features instead.
        dims, depths, heads: width, blocks and heads of each stage.
        layers: the pattern of each stage's mixers, or one for all: aliases with optional counts,
            repeated to the stage's depth, e.g. ``"neighborhood*3 softmax"``.
        mixers: the options of each alias, ``{alias: {"mixer": key, **options}}``; the key of the
            catalogue is the alias itself where ``"mixer"`` is left out. JSON values only. A mixer
            that may be causal is not, and softmax has no rotary positions, unless told so here.
        patch: pixels of the image, on a side, to a token of the first stage.
        stem: "patch", one convolution without overlap, or "conv", 3x3 convolutions with batch norm
            (patch 4).
        position: "conv", a depth-wise 3x3 convolution before every block; "learned", an embedding
            a stage of the grid of ``image_size``, resized to others; or "none".
        image_size: pixels on a side that the learned positions are made for.
        mlp_ratio: inner width of the MLP in widths; mlp_dim: inner width, goes before.
        mlp_conv: whether the MLP has a depth-wise 3x3 convolution inside.
        norm: "pre" (a norm before mixer and MLP) or "post" (after each sum).
        layer_scale: the first value of a learned scale a channel of what a block adds, one or one
            a stage; None for none.
        drop_path: of the last block, growing linearly from 0, in training.
        head_width: channels of a 1x1 convolution before the classifier; None for none.
        norm_eps: of the layer norms. init_std: deviation of linear and convolution weights.
        features_only: return maps of features instead of logits; no head is made.
        out_indices: which levels to return then (negative from the last): a level is a stage, or a
            block where there is one stage. None for all.

    Raises:
        ValueError: for values out of range, lists of unequal length and unknown mixers.
    """

    model_type = "subquad_vision"

    channels: int = 3
    classes: int = 1000
    dims: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])
    heads: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    layers: str | list[str] = "mala"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    patch: int = 4
    stem: str = "conv"
    position: str = "conv"
    image_size: int = 224
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None
    mlp_conv: bool = True
    norm: str = "pre"
    layer_scale: float | list[float] | None = None
    drop_path: float = 0.0
    head_width: int | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    features_only: bool = False
    out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.dims, self.depths = list(self.dims), list(self.depths)
        self.heads = list(self.heads)
        if self.out_indices is not None:
            self.out_indices = list(self.out_indices)
        for name in kwargs:
            if not name.startswith("_") and not hasattr(PreTrainedConfig, name):
                said = "an argument of VisionConfig (a mixer's options go into mixers[alias])"
                known = [*VisionConfig.__annotations__, *PreTrainedConfig.__annotations__]
                checks.one_of(said, name, known)
        for name in ("channels", "patch", "image_size"):
            checks.positive(name, getattr(self, name))
        checks.positive("classes", self.classes, zero=True)
        for name, allowed in (("stem", STEMS), ("position", POSITIONS), ("norm", NORMS)):
            checks.one_of(name, getattr(self, name), allowed)
        if self.stem == "conv" and self.patch != 4:
            raise ValueError(f"patch must be 4 where stem is 'conv', got {self.patch}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in 0..1, 1 excluded, got {self.drop_path!r}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        self._check_stages()
        super().__post_init__(**kwargs)

    def _check_stages(self) -> None:
        stages = len(self.dims)
        if not stages:
            raise ValueError("dims must name at least one stage, got none")
        for name in ("depths", "heads"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have {stages} stages as dims has, got {name}="
                                 f"{getattr(self, name)}")  # fmt: skip
            for value in getattr(self, name):
                checks.positive(name, value)
        if not isinstance(self.layers, str) and len(self.layers) != stages:
            raise ValueError(f"layers must be one pattern or {stages}, got {self.layers}")
        if isinstance(self.layer_scale, list) and len(self.layer_scale) != stages:
            raise ValueError(f"layer_scale must be one or {stages} values, got {self.layer_scale}")
        if self.out_indices is not None and (not self.out_indices or not self.features_only):
            raise ValueError(
                f"out_indices must name a map, and takes features_only=True, got {self.out_indices}"
            )
        for index in self.out_indices or ():
            if type(index) is not int or not -self.levels <= index < self.levels:
                raise ValueError(
                    f"out_indices must lie in {-self.levels}..{self.levels - 1}, got {index!r}"
                )
        check_mixers([alias for stage in self.patterns for alias in stage], self.mixers)

    @property
    def patterns(self) -> list[tuple[str, ...]]:
        """The alias of every block, stage by stage."""
        one = isinstance(self.layers, str)
        stages = [self.layers] * len(self.dims) if one else self.layers
        return [expand_pattern(p, depth) for p, depth in zip(stages, self.depths, strict=True)]

    @property
    def levels(self) -> int:
        """Maps of features that the model can return."""
        return self.depths[0] if len(self.dims) == 1 else len(self.dims)

    def mixer(self, alias: str) -> tuple[str, dict[str, Any]]:
        """The key in the catalogue and the options of an alias."""
        options = dict(self.mixers.get(alias, {}))
        return options.pop("mixer", alias), options

    def inner_dim(self, stage: int) -> int:
        """Inner width of a stage's MLP."""
        return self.mlp_dim or round(self.mlp_ratio * self.dims[stage])
