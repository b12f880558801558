"""A vision model of stages around mixers, as a transformers model: classes, or maps of features.

Legend: B batch, H and W pixels, C channels of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from subquad.models.vision.blocks import Block, Stage, stem
from subquad.models.vision.config import VisionConfig
from subquad.ops import checks


class FeatureInfo(list):
    """Of each map that the model returns: ``num_chs``, ``reduction`` (pixels a side), ``module``
    and ``index``, with the accessors that timm has."""

    @property
    def out_indices(self) -> list[int]:
        return [level["index"] for level in self]

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        return [{key: level[key] for key in keys or level} for level in self]

    def channels(self) -> list[int]:
        return [level["num_chs"] for level in self]

    def reduction(self) -> list[int]:
        return [level["reduction"] for level in self]

    def module_name(self) -> list[str]:
        return [level["module"] for level in self]


class VisionModel(PreTrainedModel):
    """Classify images, or return a pyramid of features.

    ``save_pretrained`` and ``from_pretrained`` (safetensors), gradient checkpointing and
    ``torch.compile`` work as for every model of transformers; ``features_only``, ``out_indices``,
    ``feature_info``, ``forward_features``, ``forward_head`` and ``reset_classifier`` as in timm.
    """

    config: VisionConfig
    config_class = VisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.stem = stem(config)
        blocks = sum(config.depths)
        drops = [config.drop_path * i / max(1, blocks - 1) for i in range(blocks)]
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            self.stages.append(Stage(config, i, drops[:depth]))
            drops = drops[depth:]
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None
        if not config.features_only:
            self._make_head(config.classes)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutput | list[Tensor]:
        """Classify, or with ``features_only`` return the maps of ``out_indices``.

        Args:
            pixel_values: floating point ``[B,channels,H,W]``.
            labels: int64 ``[B]``; then there is a loss.

        Returns:
            ``logits [B,classes]`` (pooled features where ``classes`` is 0); or a list of maps
            ``[B,C,H/r,W/r]``, r as ``feature_info`` says.

        Raises:
            ValueError: for an input of other channels, or too small for the patches, and for labels
                that do not fit.
        """
        if labels is not None:
            checks.shape("labels", labels, (len(pixel_values),))
            if labels.dtype != torch.int64 or self.config.features_only:
                raise ValueError(
                    f"labels must be int64, and None with features_only, got {labels.dtype}"
                )
        if self.config.features_only:
            levels = self._levels(pixel_values)
            return [levels[i] for i in self._indices()]
        logits = self.forward_head(self.forward_features(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """The last map, ``[B,C,height,width]``, normed where the head norms."""
        x = self._levels(pixel_values)[-1]
        return x if self.norm is None else self.norm(x.movedim(1, -1)).movedim(-1, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of ``forward_features``; the pooled features where ``pre_logits``."""
        if isinstance(self.head, nn.Sequential):
            x = self.head[:-1](x)
        x = x.mean((2, 3))
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        return x if pre_logits or last is None else last(x)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for other classes; 0 takes it away.

        Raises:
            ValueError: for a negative number, or where the model has features only.
        """
        checks.positive("num_classes", num_classes, zero=True)
        if self.config.features_only:
            raise ValueError("num_classes must not be set where features_only is True")
        self.config.classes = num_classes
        self._make_head(num_classes)
        for module in (self.norm, self.head):
            if module is not None:
                module.to(self.device, self.dtype).apply(self._init_weights)

    @property
    def feature_info(self) -> FeatureInfo:
        """Of the maps that ``features_only`` returns."""
        config, info = self.config, FeatureInfo()
        for level in self._indices():
            stage = 0 if len(config.dims) == 1 else level
            name = f"stages.0.blocks.{level}" if len(config.dims) == 1 else f"stages.{level}"
            reduction = config.patch * 2**stage
            found = {"num_chs": config.dims[stage], "reduction": reduction, "module": name}
            info.append({**found, "index": level})
        return info

    def state_bytes(self, T: int, dtype: torch.dtype | None = None) -> int:
        """0: an image is read at once."""
        return 0

    def flops(self, image_size: int) -> int:
        """Of the blocks' mixers and MLPs for a square image."""
        total, config = 0, self.config
        for i, stage in enumerate(self.stages):
            T = (image_size // config.patch // 2**i) ** 2
            mlp = 4 * T * config.dims[i] * config.inner_dim(i)
            for block in stage.blocks:  # type: ignore[union-attr]
                assert isinstance(block, Block)
                total += block.mixer.flops(T) + mlp
        return total

    def _levels(self, x: Tensor) -> list[Tensor]:
        config = self.config
        if x.dim() != 4 or x.shape[1] != config.channels:
            raise ValueError(f"pixel_values must be [B,{config.channels},H,W], got {list(x.shape)}")
        if not x.is_floating_point() or 0 in x.shape:
            raise ValueError(
                f"pixel_values must be floating point and not empty, got {x.dtype} {list(x.shape)}"
            )
        if config.stem == "patch" and (x.shape[2] % config.patch or x.shape[3] % config.patch):
            raise ValueError(
                f"pixel_values must have sides that patch={config.patch} divides, "
                f"got {list(x.shape)}"
            )
        x = self.stem(x)
        levels: list[Tensor] = []
        for stage in self.stages:
            within = stage(x)
            x = within[-1]
            levels += within if len(config.dims) == 1 else [x]
        return levels

    def _indices(self) -> list[int]:
        given: Sequence[int] | None = self.config.out_indices
        levels = self.config.levels
        return [i % levels for i in given] if given is not None else list(range(levels))

    def _make_head(self, classes: int) -> None:
        """Pool and classify: behind a 1x1 convolution, or behind a norm where blocks have theirs
        in front."""
        config, dim = self.config, self.config.dims[-1]
        wide = config.head_width
        self.norm = None
        if wide is None:
            if config.norm == "pre":
                self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
            self.head = nn.Linear(dim, classes) if classes else None
            return
        last = nn.Linear(wide, classes) if classes else nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(dim, wide, 1), nn.BatchNorm2d(wide), nn.SiLU(), last)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        fresh_weights(module, self.config.init_std)


def fresh_weights(module: nn.Module, std: float) -> None:
    """Truncated normal for what torch drew; what a mixer drew by its own rule stays."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fresh = nn.Linear(1, 1, device=module.weight.device)
        if module.weight._version == fresh.weight._version:
            init.trunc_normal_(module.weight, std=std)
        if module.bias is not None and module.bias._version == fresh.bias._version:
            init.zeros_(module.bias)
