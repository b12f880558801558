"""From tensors to launches of the kernels for Hopper."""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from subquad.ops.attention.triton.configs import config
from subquad.ops.attention.triton.hopper.forward import hopper_forward
from subquad.ops.attention.triton.hopper.grad_kv import hopper_grad_kv
from subquad.ops.attention.triton.hopper.grad_q import hopper_grad_q
from subquad.ops.attention.triton.index import arguments
from subquad.ops.sizes import processors
from subquad.ops.tape import zeros


def forward(launch, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> None:
    """o ``[B,T,H,D]`` and lse ``[B,T,H]``, filled."""
    found = config("hopper_forward", 128, launch.K, q.dtype.itemsize)
    grid, tiles = _tiled(launch, launch.T, launch.H)
    index, taken = launch.index, zeros(q, 1, dtype=torch.int32)
    tensors = (
        _tiles(q, 64), _tiles(k, found["step"]), _tiles(v, found["step"]), o, lse, taken,
        *arguments(index.lists), index.table, index.plane,
    )  # fmt: skip
    hopper_forward.launch(
        grid, tensors, scale, tiles, *_sizes(launch, index.rows),
        D=launch.K, BN=found["step"], KIND=index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def grad_q(
    launch, q, k, v, do, lse2: Tensor, delta: Tensor, taken: Tensor, dq: Tensor, scale: float
) -> None:
    """dq ``[B,T,H,D]``, filled; ``taken`` is 0."""
    found = config("hopper_grad_q", 128, launch.K, q.dtype.itemsize)
    grid, tiles = _tiled(launch, launch.T, launch.H)
    index = launch.index
    tensors = (
        _tiles(q, 64), _tiles(do, 64), _tiles(k, found["step"]), _tiles(v, found["step"]),
        lse2, delta, dq, taken, *arguments(index.lists), index.table, index.plane,
    )  # fmt: skip
    hopper_grad_q.launch(
        grid, tensors, scale, tiles, *_sizes(launch, index.rows),
        D=launch.K, BN=found["step"], KIND=index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def grad_kv(
    launch, turned, q, k, v, do, lse2: Tensor, delta: Tensor, taken: Tensor, dk: Tensor,
    dv: Tensor, scale: float,
) -> None:  # fmt: skip
    """dk and dv ``[B,S,G,D]``, filled; ``turned`` are the lists by blocks of keys."""
    found = config("hopper_grad_kv", 128, launch.K, q.dtype.itemsize)
    step, index = found["step"], launch.index
    grid, tiles = _tiled(launch, launch.S, launch.G)
    tensors = (
        _tiles(q, step), _tiles(do, step), _tiles(k, 64), _tiles(v, 64),
        _lines(lse2, step), _lines(delta, step), dk, dv, taken,
        *arguments(turned), index.table, index.plane,
    )  # fmt: skip
    hopper_grad_kv.launch(
        grid, tensors, scale, tiles, *_sizes(launch),
        D=launch.K, BM=step, KIND=index.kind, STAGES=found["num_stages"], num_warps=4,
    )  # fmt: skip


def _tiled(launch, tokens: int, heads: int) -> tuple[tuple[int], int]:
    """The grid, a program to a multiprocessor, and how many tiles it takes."""
    tiles = triton.cdiv(tokens, 128) * heads * launch.B
    return (min(tiles, processors(launch.index.plane.device)),), tiles


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """x as ``[B * tokens, heads * D]`` in tiles of one head, for the copy engine."""
    flat = x.view(-1, x.shape[2] * x.shape[3])
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, x.shape[3]], kind)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, x.shape[3]], layout)


def _lines(x: Tensor, step: int) -> TensorDescriptor:
    """``step`` tokens of a row of x ``[B,H,tokens]``, for the copy engine."""
    flat = x.view(-1, x.shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, step], layout)


def _sizes(launch, *rows: int) -> tuple[int, ...]:
    """The arguments from T to high."""
    index = launch.index
    return (
        launch.T, launch.S, launch.offset, *rows, launch.H, launch.G, *index.shape, *index.bounds
    )  # fmt: skip
