"""Where pictures come from: scikit-learn's digits, a folder of images, or one safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Pictures(Protocol):
    """A set of labelled pictures: ``labels`` int64 ``[count]`` in 0..len(classes)-1."""

    labels: Tensor
    classes: tuple[str, ...]

    def take(self, which: Sequence[int], size: int, channels: int) -> Tensor:
        """Those pictures as float32 ``[n,channels,size,size]``, 0 black and 1 white."""
        ...

    def digest(self) -> str:
        """Tells one set from another, wherever either lies."""
        ...


class Stacked:
    """Pictures of one size, held in memory.

    Args:
        images: ``[count,1 or 3,H,W]``, uint8 (0..255) or floating point (0..1).
        labels: integers ``[count]``.
        classes: names of the labels; their numbers where None.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: tuple[str, ...] | None = None
    ) -> None:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [n,1 or 3,H,W], got {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers [{len(images)}], got {labels.dtype} {list(labels.shape)}"
            )
        self.images = images.float() / (1 if images.is_floating_point() else 255)
        self.labels = labels.to(torch.int64)
        most = int(labels.max()) + 1 if len(labels) else 0
        self.classes = classes or tuple(map(str, range(most)))
        if most > len(self.classes) or (len(labels) and int(labels.min()) < 0):
            raise ValueError(f"labels must lie in 0..{len(self.classes) - 1}, got {most - 1}")

    def take(self, which: Sequence[int], size: int, channels: int) -> Tensor:
        x = self.images[torch.as_tensor(which, dtype=torch.int64)]
        if x.shape[1] == 1:
            x = x.expand(-1, channels, -1, -1)
        elif channels == 1:
            x = x.mean(1, keepdim=True)
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return x.clamp(0, 1)

    def digest(self) -> str:
        """Of the pixels and labels."""
        found = hashlib.sha256(self.images.numpy().tobytes())
        found.update(self.labels.numpy().tobytes())
        return found.hexdigest()[:16]


class Folder:
    """Image files, one folder a class; files in ``root`` itself, without such folders, are one
    class. A picture is read when it is asked for, its middle square scaled to the size."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        folders = [path for path in inside if path.is_dir()]
        found = [(folder, _files(folder.rglob("*"))) for folder in folders]
        groups = [(folder.name, files) for folder, files in found if files]
        groups = groups or [(root.name, _files(inside))]
        self.files = [file for _, files in groups for file in files]
        self.classes = tuple(name for name, _ in groups)
        self.labels = torch.tensor(
            [label for label, (_, files) in enumerate(groups) for _ in files], dtype=torch.int64
        )

    def take(self, which: Sequence[int], size: int, channels: int) -> Tensor:
        return torch.stack([_read(self.files[i], size, channels) for i in which])

    def digest(self) -> str:
        """Of the files' names and sizes."""
        inside = [f"{f.relative_to(self.root).as_posix()} {f.stat().st_size}" for f in self.files]
        return hashlib.sha256("\n".join(inside).encode()).hexdigest()[:16]


def open_pictures(path: str | os.PathLike[str] | None) -> Pictures:
    """The digits where ``path`` is None, else a folder or a ``.safetensors`` file.

    Raises:
        ValueError: for a path that is neither, or holds no pictures.
        ImportError: naming what to install, where scikit-learn (digits) or Pillow (folders) misses.
    """
    if path is None:
        return _digits()
    root = Path(path).expanduser()
    if root.is_dir():
        pictures = Folder(root)
        if not pictures.files:
            raise ValueError(f"path must hold images ({', '.join(SUFFIXES)}), {root} has none")
        _pillow()
        return pictures
    if root.is_file() and root.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(root)
        if not {"images", "labels"} <= set(tensors):
            raise ValueError(f"path must hold images and labels, {root} has {sorted(tensors)}")
        return Stacked(tensors["images"], tensors["labels"])
    raise ValueError(f"path must be a folder of images or a .safetensors file, got {str(root)!r}")


def _digits() -> Stacked:
    """1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak, 1998), in scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the digits need scikit-learn (pip install 'subquad[vision]'); or pass path="
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images.astype(np.float32) / 16)[:, None]
    return Stacked(images, torch.from_numpy(found.target.astype(np.int64)))


def _files(paths) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file())


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("image folders need Pillow: pip install 'subquad[vision]'") from None
    return Image


def _read(file: Path, size: int, channels: int) -> Tensor:
    image = _pillow()
    try:
        with image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    square = square.resize((size, size), image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32) / 255)
    return pixels.view(size, size, channels).movedim(-1, 0)
