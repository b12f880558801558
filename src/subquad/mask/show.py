"""Pictures of masks: text for a terminal, or an image on matplotlib axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from subquad.mask.algebra import Mask

WIDTH = 64  # cells of a picture, at most, on its longer side
SHADES = " ░▒▓█"


def shares(mask: Mask, T: int, S: int, offset: int | None = None, width: int = WIDTH) -> Tensor:
    """The share of pairs kept in each cell of the picture, float ``[rows, columns]``, averaged
    over batch rows and heads. Cells are tiles of the mask, so no dense tensor is made."""
    block = max(1, -(-max(T, S) // width))
    tiles = mask.tiles(T, S, block, offset)
    kept = torch.cat([tiles.patterns.flatten(1).sum(1), torch.tensor([block * block])])
    planes = len(tiles.ptr[:: max(tiles.rows, 1)]) - 1
    count = torch.zeros(planes, max(tiles.rows, 1), tiles.columns)
    place = torch.arange(planes * tiles.rows).repeat_interleave(tiles.ptr.diff().long())
    count.view(-1, tiles.columns)[place, tiles.column.long()] = kept[tiles.pattern].float()
    count = count[tiles.plane.flatten().long()].mean(0)
    high = (T - torch.arange(tiles.rows) * block).clamp_max(block)
    wide = (S - torch.arange(tiles.columns) * block).clamp_max(block)
    return count / (high[:, None] * wide)


def text(mask: Mask, T: int, S: int, offset: int | None = None, width: int = WIDTH) -> str:
    """One character a cell: blank for nothing kept, a full block for everything."""
    cells = shares(mask, T, S, offset, width)
    # Neither an edge nor a hole may vanish: only empty is blank, only full is full.
    level = (cells * (len(SHADES) - 1)).round().clamp(1, len(SHADES) - 2)
    level = torch.where(cells == 0, 0, torch.where(cells >= 1, len(SHADES) - 1, level)).int()
    return "\n".join("".join(SHADES[x] for x in row) for row in level.tolist())


def draw(mask: Mask, T: int, S: int, offset: int | None, ax: Any) -> Any:
    """The picture on matplotlib axes, keys from left to right, queries downwards."""
    cells = shares(mask, T, S, offset, 4 * WIDTH)
    ax.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, S, T, 0), aspect="auto")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax
