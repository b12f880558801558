"""Sizes of grids and tiles. Triton's own functions of these names, which kernels may call too, take
some microseconds each on the host."""

from functools import cache

import torch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 elsewhere, for kernels that are interpreted."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
