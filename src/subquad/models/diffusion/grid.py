"""Images as one picture on disk."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from subquad.ops import checks


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    gap: int = 2,
    zoom: int = 1,
) -> Path:
    """Write images side by side as a PNG, whole or not at all.

    Args:
        images: ``[n,1 or 3,H,W]`` in -1..1, what lies outside is cut.
        path: of the file; its folder is made.
        columns: images in a row; a square where None.
        gap: black pixels between them.
        zoom: pixels on a side to each of theirs.

    Returns:
        The path.

    Raises:
        ValueError: for other shapes.
        ImportError: naming what to install, where Pillow misses.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [n,1 or 3,H,W], got {list(images.shape)}")
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("pictures need Pillow: pip install 'subquad[vision]'") from None
    columns = columns or math.ceil(math.sqrt(len(images)))
    for name, value, zero in (("columns", columns, 0), ("gap", gap, 1), ("zoom", zoom, 0)):
        checks.positive(name, value, zero=bool(zero))
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, channels, H, W = pixels.shape
    rows = math.ceil(n / columns)
    sheet = torch.zeros(channels, rows * (H + gap) - gap, columns * (W + gap) - gap).byte()
    for i, image in enumerate(pixels):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[:, top : top + H, left : left + W] = image
    array = sheet.movedim(0, -1).numpy()
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        Image.fromarray(array[..., 0] if channels == 1 else array).save(aside, format="PNG")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
