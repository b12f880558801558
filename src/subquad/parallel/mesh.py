"""The sequence mesh: which processes share a sequence, and how operations work over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from subquad.ops import checks
from subquad.parallel import wire

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

ATTENTION = ("ring", "ulysses", "gather")
RECURRENCE = ("lasp2", "ulysses")
MESSAGE = 1024  # bytes of a description that ranks compare


@dataclass(frozen=True, eq=False)
class Split:
    """This process's place among those that share a sequence.

    Attributes:
        group: the processes.
        rank: this one's place, which is that of its tokens; size: W.
        attention: "ring", "ulysses" or "gather"; recurrence: "lasp2" or "ulysses".
        states: whether operations return the state after the whole sequence, everywhere.
        control: a group on the CPU, for what processes say to each other besides tensors.
    """

    group: ProcessGroup
    rank: int
    size: int
    attention: str = "ring"
    recurrence: str = "lasp2"
    states: bool = True
    control: ProcessGroup | None = None

    def agree(self, op: str, **facts: Any) -> None:
        """Make sure that all ranks call the same operation on the same shapes.

        Raises:
            ValueError: on every rank, with what each brought, if they do not.
            RuntimeError: if a rank has gone.
        """
        text = f"{op}: " + ", ".join(f"{name} {_described(x)}" for name, x in facts.items())
        mine = torch.zeros(MESSAGE, dtype=torch.uint8)
        raw = text.encode()[:MESSAGE]
        mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everyone = torch.empty(self.size * MESSAGE, dtype=torch.uint8)
        self.attempt(op, lambda: wire.all_gather(everyone, mine, group=self.control))
        said = everyone.view(self.size, MESSAGE)
        if bool((said != said[0]).any()):
            lines = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in said]
            table = "; ".join(f"rank {rank} has {line}" for rank, line in enumerate(lines))
            raise ValueError(f"all ranks of a sequence must bring the same shapes: {table}")

    def attempt(self, op: str, collective: Callable[[], Any]) -> Any:
        """Do a collective; a failure says which operation was cut off, and where."""
        try:
            return collective()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} was left alone in {op}: another process of its "
                f"sequence ended or failed ({str(error).splitlines()[0]})"
            ) from error


def _described(x: Any) -> str:
    if not isinstance(x, Tensor):
        return str(x)
    text = f"{list(x.shape)} {x.dtype}".replace("torch.", "")
    if x.dtype in (torch.int32, torch.int64) and x.device.type == "cpu" and x.numel() <= 4096:
        text += f" {hash(tuple(x.flatten().tolist())) & 0xFFFFFF:x}"
    return text


# One for the process, not for the thread: the autograd engine runs checkpointed layers again in
# threads of its own.
_current: Split | None = None
_controls: dict[Any, Any] = {}


def current() -> Split | None:
    """The sequence mesh that is set, None where none is or it has a single process."""
    return _current


@contextmanager
def sequence(
    mesh: DeviceMesh | ProcessGroup | None,
    *,
    attention: str = "ring",
    recurrence: str = "lasp2",
    states: bool = True,
) -> Iterator[Split | None]:
    """Mixers and operations inside the block work on sequences split over ``mesh``.

    Checkpointed layers run again in the backward pass, which then must lie inside the block too.

    Args:
        mesh: one-dimensional, or a process group; None, or one process, changes nothing.
        attention: how softmax attention is split: "ring" (keys travel; masks other than the causal
            one are gathered), "ulysses" (heads are dealt out) or "gather" (keys are gathered).
        recurrence: how linear recurrences are: "lasp2" (states are gathered) or "ulysses".
        states: whether mixers return the state after the whole sequence; without, training packed
            sequences says less, and the state that comes back is empty.

    Raises:
        ValueError: for unknown options or a mesh of several dimensions.
    """
    global _current
    checks.one_of("attention", attention, ATTENTION)
    checks.one_of("recurrence", recurrence, RECURRENCE)
    before = _current
    found = None if mesh is None else place(mesh)
    if found is not None:
        found = Split(
            found.group, found.rank, found.size, attention, recurrence, states, found.control
        )
        found = None if found.size == 1 else found
    _current = found
    try:
        yield found
    finally:
        _current = before


def place(mesh: Any) -> Split:
    """The :class:`Split` of a mesh, a process group, or None for the mesh that is set.

    Raises:
        ValueError: if there is none, or it has several dimensions.
    """
    if isinstance(mesh, Split):
        return mesh
    if mesh is None:
        if _current is None:
            raise ValueError("mesh must be given where no sequence mesh is set, got None")
        return _current
    group = mesh
    if hasattr(mesh, "get_group"):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: take one by its name")
        group = mesh.get_group()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("mesh must contain this process, got one that does not")
    return Split(group, rank, size, control=_control(group))


def _control(group: Any) -> Any:
    """``group`` itself on the CPU, or else a gloo group of its processes, made once."""
    if dist.get_backend(group) == "gloo":
        return group
    key = group.group_name
    if key not in _controls:
        ranks = dist.get_process_group_ranks(group)
        _controls[key] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _controls[key]
