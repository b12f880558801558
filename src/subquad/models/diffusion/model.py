"""A transformer over the tokens of a noisy image, as a transformers model: which way to the image.

Legend: B batch, H and W pixels, T tokens, C dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.parts.grid import to_tokens
from subquad.models.checkpoint import Checkpoints
from subquad.models.diffusion.blocks import Block, Condition, Modulation, places
from subquad.models.diffusion.config import DiTConfig
from subquad.models.vision.model import fresh_weights


class DiT(Checkpoints):
    """The velocity of flow matching, ``image - noise``, from ``x = (1 - t) noise + t image``.

    ``save_pretrained``, ``from_pretrained`` (safetensors) and gradient checkpointing work as for
    every model of transformers. Source of the model: arXiv 2212.09748; of the flow: Lipman et al.,
    "Flow Matching for Generative Modeling", arXiv 2210.02747, with straight paths.
    """

    config: DiTConfig
    config_class = DiTConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        dim, pixels = config.dim, config.channels * config.patch**2
        self.stem = nn.Conv2d(config.channels, dim, config.patch, config.patch)
        nn.init.normal_(self.stem.weight, std=pixels**-0.5)  # as large as the places beside it
        self.condition = Condition(config)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.depth)])
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.modulation = Modulation(dim, 2)
        self.head = nn.Linear(dim, pixels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.post_init()

    def forward(self, pixel_values: Tensor, time: Tensor, classes: Tensor | None = None) -> Tensor:
        """The velocity at ``pixel_values``.

        Args:
            pixel_values: ``[B,channels,H,W]``, sides that the patch divides.
            time: ``[B]``, 0 at noise and 1 at the image.
            classes: int64 ``[B]`` in 0..classes, the last one for no class in particular; None
                for that everywhere.

        Returns:
            ``[B,channels,H,W]``.

        Raises:
            ValueError: for shapes that do not fit.
        """
        config, shape = self.config, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != config.channels or shape[2] % config.patch or (
            shape[3] % config.patch
        ):  # fmt: skip
            raise ValueError(
                f"pixel_values must be [B,{config.channels},H,W], patch={config.patch} dividing H "
                f"and W, got {list(shape)}"
            )
        for name, t in (("time", time), ("classes", classes)):
            if t is not None and tuple(t.shape) != shape[:1]:
                raise ValueError(f"{name} must be [B]={[shape[0]]}, got {list(t.shape)}")
        if classes is not None and not config.classes:
            raise ValueError("classes must be None: the model has none")
        x = self.stem(pixel_values)
        grid = (x.shape[2], x.shape[3])
        h = to_tokens(x)
        h = h + places(grid, config.dim, h)
        c = self.condition(time, classes)
        for block in self.blocks:
            h = block(h, c, grid)
        shift, scale = self.modulation(c)
        return self._image(self.head(self.norm(h) * (1 + scale) + shift), grid)

    def _image(self, h: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of ``channels * patch^2`` features as pixels."""
        return F.pixel_shuffle(h.mT.unflatten(2, grid), self.config.patch)

    def flops(self, image_size: int | None = None) -> int:
        """Of the blocks' mixers and MLPs for a square image."""
        side = (image_size or self.config.image_size) // self.config.patch
        T, total = side**2, 0
        for block in self.blocks:
            assert isinstance(block, Block)
            total += block.mixer.flops(T) + 4 * T * self.config.dim * block.fc1.out_features
        return total

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        fresh_weights(module, self.config.init_std)
