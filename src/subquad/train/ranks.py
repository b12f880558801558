"""One process or many: who this one is, and what must be said to the others."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subquad import parallel
from subquad.tasks.base import Batch
from subquad.train.config import TrainConfig


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and the device that it trains on.

    Attributes:
        mesh: ``("data", "sequence")`` where processes share sequences; None where they do not.
    """

    rank: int
    size: int
    device: torch.device
    mesh: Any = None

    @classmethod
    def join(cls, model: nn.Module, sequence: int = 1) -> Ranks:
        """The process group, started where ``torchrun`` asks for one (NCCL on GPUs, else gloo);
        without one, this process alone on the device that the model is on.

        Args:
            sequence: processes that share a sequence.

        Raises:
            ValueError: if it does not divide the processes.
        """
        ranks = cls._join(model)
        if ranks.size % sequence:
            raise ValueError(f"sequence must divide the {ranks.size} processes, got {sequence}")
        if sequence == 1:
            return ranks
        from torch.distributed.device_mesh import init_device_mesh

        shape = (ranks.size // sequence, sequence)
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("data", "sequence"))
        return replace(ranks, mesh=mesh)

    @classmethod
    def _join(cls, model: nn.Module) -> Ranks:
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls(0, 1, next(model.parameters()).device)
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(_leave)
        device = torch.device("cpu")
        if dist.get_backend() == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())))
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def shard(self, model: nn.Module) -> None:
        """Give the model rank 0's weights everywhere and shard them, block by block (FSDP2)."""
        if self.size == 1:
            return
        # A second's import, for those who shard alone.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(model, FSDPModule):
            return
        model.to(self.device)
        for t in [*model.parameters(), *model.buffers()]:
            dist.broadcast(t.data, 0)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def share(self, rows: int) -> slice:
        """This rank's rows of a batch.

        Raises:
            ValueError: if the ranks do not divide them.
        """
        sharing = 1 if self.mesh is None else self.mesh["sequence"].size()
        takers = self.size // sharing
        if rows % takers:
            each = "processes" if sharing == 1 else f"groups of {sharing} processes"
            raise ValueError(f"batch must be a multiple of the {takers} {each}, got {rows}")
        each_rows, mine = rows // takers, self.rank // sharing
        return slice(mine * each_rows, (mine + 1) * each_rows)

    def rows(self, batch: Batch) -> Batch:
        """This rank's part of a batch."""
        share = self.share(len(batch.inputs))
        return batch.rows(share.start, share.stop)

    def sequence(self, config: TrainConfig) -> AbstractContextManager[Any]:
        """A block in which the model's sequences are split over the processes that share them."""
        if self.mesh is None:
            return nullcontext()
        return parallel.sequence(
            self.mesh["sequence"],
            attention=config.sequence_attention,
            recurrence=config.sequence_recurrence,
            states=False,
        )

    def sum(self, t: Tensor) -> Tensor:
        """The sum of the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: the layers."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
