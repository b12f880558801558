"""A tensor that is a value: compared and hashed by what it holds."""

from __future__ import annotations

import ctypes
import hashlib
import os
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_PROCESS, _numbers = os.urandom(4).hex(), count()
_named: WeakValueDictionary[str, Table] = WeakValueDictionary()


class Table:
    """An int32 tensor, copied once (or with ``copy=False`` handed over) and never written again.

    The digest is computed on first use (on an accelerator this waits for the tensor), so a mask
    that is made on the device and used once is never read back.

    Attributes:
        name: by which compiled graphs of this process know it.
    """

    def __init__(self, tensor: Tensor, copy: bool = True) -> None:
        self.tensor = tensor.detach().to(torch.int32, copy=copy).contiguous()
        self._copies: dict[torch.device, Tensor] = {self.tensor.device: self.tensor}
        self._digest: bytes | None = None
        self.name = f"{_PROCESS}-{next(_numbers)}"
        _named[self.name] = self

    def __reduce__(self) -> Any:
        return Table, (self.tensor,)

    @staticmethod
    def named(name: str) -> Table:
        """The table of this name.

        Raises:
            RuntimeError: for a name from another process, or of a table that is no more.
        """
        found = _named.get(name)
        if found is None:
            raise RuntimeError(
                "this graph was made with a mask that holds data, which is not here: "
                "make the mask, and compile or export again"
            )
        return found

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def on(self, device: torch.device) -> Tensor:
        """The tensor on ``device``, moved once."""
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        return self._copies[device]

    def __getitem__(self, index: Any) -> Table:
        return Table(self.tensor[index])

    def digest(self) -> bytes:
        if self._digest is None:
            data = self.tensor.cpu()
            h = hashlib.blake2b(repr(tuple(data.shape)).encode(), digest_size=16)
            h.update(ctypes.string_at(data.data_ptr(), data.nbytes))
            self._digest = h.digest()
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"<{'x'.join(map(str, self.shape))}>"


def positive(name: str, value: Any, *, zero: bool = False) -> None:
    kind = "non-negative" if zero else "positive"
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if zero else 1):
        raise ValueError(f"{name} must be a {kind} int, got {value!r}")


def readable(t: Tensor) -> bool:
    """Whether a check may read values: not while compiling, nor where it would stop a stream."""
    if torch.compiler.is_compiling() or t.numel() == 0:
        return False
    return t.device.type == "cpu" or os.environ.get("SUBQUAD_CHECK") == "1"
