"""Compiled kernels, launched by CUDA's driver itself.

Triton launches through C that it writes for every signature: a quarter of a second of a C compiler,
and at each launch a question to the driver about every tensor. Where a kernel's parameters are but
addresses, numbers and tensor maps, whose types are read from its PTX, they are handed over as such.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct, pack
from typing import Any

import torch
import triton

SIZES = {"u64": 8, "u32": 4, "f32": 4, "map": 128}  # of parameters, by the types of PTX
FORMATS = {"u64": "q", "u32": "i", "f32": "f"}
TYPES = {int: ("u32", "u64"), float: ("f32",)}
PARAMETER = re.compile(r"\s*\.param\s+(?:\.(u64|u32|f32)\s[^[]*|\.align 64 \.b8 \w+\[128\]\s*)$")
ALIGNED = 64  # bytes, of a tensor map
SPARE = 2  # pointers that Triton appends, to scratch memory for kernels that use it
L2_128B = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
DATA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
NO_CONTEXT = 201  # in a thread of autograd's, until PyTorch has worked there

Submit = Callable[[Sequence[int], int], None]  # addresses, stream
Encode = Callable[[int, int], None]  # where to write a tensor map, the tensor's address


class Binary:
    """A compiled kernel on the current device.

    Attributes:
        compiled: Triton's.
        types: of its parameters; None where Triton must launch it.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.types = compiled, _parameters(compiled)
        if self.types is None:
            _ = compiled.run  # makes its launcher, and brings it to the device
            return
        about, active = compiled.metadata, triton.runtime.driver.active
        self._module, self._function, *_ = active.utils.load_binary(
            about.name, compiled.kernel, about.shared, active.get_current_device()
        )

    def submit(
        self, grid: tuple[int, ...], tensors: Sequence[Any], numbers: Sequence[float]
    ) -> Submit | None:
        """A launch with such tensors (or descriptors, as large) before these numbers; None where
        Triton must do it."""
        if self.types is None:
            return None
        values: list[float] = []  # of all parameters; 0 where a launch gives an address
        maps: dict[int, Encode] = {}
        places, about = [], self.compiled.metadata
        for t in tensors:
            places.append(len(values))
            values.append(0)
            if not isinstance(t, torch.Tensor):
                maps[places[-1]] = _encoder(t, about.tensordesc_meta[len(maps)])
                values += [*t.shape, *t.strides]
        last = len(values)
        values += numbers
        fits = len(self.types) == len(values) + SPARE and all(
            t == ("map" if n in maps else "u64") if n in places or n >= last + len(numbers)
            else t in TYPES.get(type(values[n]), ())
            for n, t in enumerate(self.types)
        )  # fmt: skip
        if not fits:
            return None
        if 0 in grid:
            return lambda *_: None
        block, offsets = _block(self.types, [*values, 0, 0])
        shape = (*grid, 32 * about.num_warps, 1, 1, about.shared)
        spots = [(offsets[n], maps.get(n)) for n in places]
        return _submission(self._function, shape, bytes(block), offsets, spots)


def _parameters(compiled: Any) -> tuple[str, ...] | None:
    """The types of a kernel's parameters; None where it asks for more than a plain launch, or where
    Triton is of a version that does not say so."""
    about, ptx = compiled.metadata, compiled.asm.get("ptx")
    known = {"swizzle", "elem_size", "elem_type", "block_size", "fp4_padded"}
    try:
        plain = (
            ptx is not None
            and _driver() is not None
            and about.num_ctas == 1
            and not (about.launch_cooperative_grid or about.launch_pdl)
            and about.global_scratch_size == about.profile_scratch_size == 0
            and about.shared <= _shared_memory(triton.runtime.driver.active.get_current_device())
            and all(m and {*m} == known and not m["fp4_padded"] for m in _maps(about))
        )
    except AttributeError:
        return None
    if not plain:
        return None
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    found = [PARAMETER.match(one) for one in entry[1].split(",")] if entry else [None]
    return tuple(m[1] or "map" for m in found if m) if all(found) else None


@cache
def _shared_memory(device: int) -> int:
    """Bytes that a program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def _maps(about: Any) -> Sequence[Any]:
    return getattr(about, "tensordesc_meta", None) or ()


def _block(types: Sequence[str], values: Sequence[float]) -> tuple[bytearray, list[int]]:
    """The parameters as bytes, each aligned, and where each begins."""
    block, offsets = bytearray(), []
    for kind, value in zip(types, values, strict=True):
        size = SIZES[kind]
        block += bytes(-len(block) % min(size, ALIGNED))
        offsets.append(len(block))
        block += bytes(size) if kind == "map" else pack("=" + FORMATS[kind], value)
    return block, offsets


def _encoder(descriptor: Any, about: Any) -> Encode:
    """What describes a tensor like the descriptor's to the copy engine."""
    shape, box, rank = descriptor.shape, about["block_size"], len(descriptor.shape)
    strides = [about["elem_size"] * n for n in descriptor.strides[:-1]]
    rest = (
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*reversed(strides)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(0), ctypes.c_int(about["swizzle"]), ctypes.c_int(L2_128B),
        ctypes.c_int(descriptor.padding == "nan"),
    )  # fmt: skip
    write = _driver().cuTensorMapEncodeTiled
    kind = ctypes.c_int(DATA_TYPES[descriptor.base.dtype])

    def encode(at: int, address: int) -> None:
        _call(write, ctypes.c_void_p(at), kind, rank, ctypes.c_void_p(address), *rest)

    return encode


class _Frame:
    """The arguments of one launch at a time. (Given one by one: where the driver puts them depends
    on the GPU, for tensor maps lie at a multiple of 64 bytes of its memory, not of theirs.)"""

    def __init__(
        self, function: int, shape: tuple[int, ...], block: bytes, offsets: Sequence[int]
    ) -> None:
        self._memory = ctypes.create_string_buffer(len(block) + ALIGNED)
        start = ctypes.addressof(self._memory)
        self.at = start + -start % ALIGNED
        ctypes.memmove(self.at, block, len(block))
        self.block = (ctypes.c_char * len(block)).from_address(self.at)
        each = (ctypes.c_void_p * len(offsets))(*[self.at + n for n in offsets])
        self.stream = ctypes.c_void_p()
        self.given = (
            ctypes.c_void_p(function), *map(ctypes.c_uint, shape), self.stream, each, None,
        )  # fmt: skip


def _submission(
    function: int,
    shape: tuple[int, ...],
    block: bytes,
    offsets: Sequence[int],
    spots: Sequence[tuple[int, Encode | None]],
) -> Submit:
    launch = _driver().cuLaunchKernel
    idle: list[_Frame] = []  # as many as threads launched at once
    plain = not any(encode for _, encode in spots)  # then addresses alone stand first
    one, all_ = Struct("=Q").pack_into, Struct(f"={len(spots)}Q").pack_into

    def submit(pointers: Sequence[int], stream: int) -> None:
        try:
            frame = idle.pop()
        except IndexError:
            frame = _Frame(function, shape, block, offsets)
        if plain:
            all_(frame.block, 0, *pointers)
        else:
            for (start, encode), pointer in zip(spots, pointers, strict=True):
                if encode:
                    encode(frame.at + start, pointer)
                else:
                    one(frame.block, start, pointer)
        frame.stream.value = stream
        _call(launch, *frame.given)
        idle.append(frame)

    return submit


def _call(function: Any, *given: Any) -> None:
    """Ask the driver."""
    error = function(*given)
    if error == NO_CONTEXT:
        torch.zeros(1, device="cuda")
        error = function(*given)
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {error} of a launch: {(text.value or b'').decode()}")


@cache
def _driver() -> Any:
    """libcuda, which Triton has loaded; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
