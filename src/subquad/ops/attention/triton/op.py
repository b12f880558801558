"""From tensors to launches: attention's forward and backward pass over its kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from subquad import mask as masks
from subquad.mask import Mask
from subquad.ops import kernel
from subquad.ops.attention.combine import merge
from subquad.ops.attention.node import run
from subquad.ops.attention.triton import backward as grads
from subquad.ops.attention.triton.configs import config, forcing
from subquad.ops.attention.triton.forward import attention_forward
from subquad.ops.attention.triton.index import BAND, Index, arguments, of_choice, of_mask
from subquad.ops.kernel import on_device
from subquad.ops.sizes import processors
from subquad.ops.tape import Repeat, empty

TILE, SMALL_TILE = 128, 64
WELL_FILLED = 0.4  # smaller tiles are taken where less than this share of the large ones is kept
MOST_ROWS = 128  # of a program
_known: dict[Hashable, Repeat | None] = {}  # calls that were recorded
HOPPER = {"forward", "grad_q", "grad_kv"}  # those that have a kernel for such GPUs


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    return run(__name__, q, k, v, mask or masks.full(), scale, offset)


@dataclass(frozen=True)
class Launch:
    """One call's sizes: BQ queries of HG heads that share a list make a program of BM rows."""

    index: Index
    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    V: int
    offset: int
    dtype: torch.dtype
    BQ: int
    HG: int

    @property
    def BM(self) -> int:
        return max(16, triton.next_power_of_2(self.BQ * self.HG))

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides which kernels a call compiles, but for strides and lengths out of step."""
        index = self.index
        return (
            self.K, self.V, self.dtype, self.BQ, self.HG, index.kind, index.size, index.unit,
            index.per_row, index.columns is None, index.shift == 0, self.T <= MOST_ROWS,
            index.plane.device,
        )  # fmt: skip

    @property
    def first(self) -> int:
        return self.index.shift // self.BQ

    @property
    def programs(self) -> tuple[int, int]:
        rows = triton.cdiv(self.T + self.index.shift, self.BQ) - self.first
        return rows, self.B * (self.H // self.HG)

    def lists(self) -> tuple[Any, ...]:
        """The kernels' arguments from LO to PLANE."""
        index, columns = self.index, self.index.columns
        single = (columns.lo, columns.hi, columns.entry) if columns else (None, None, None)
        return *arguments(index.lists), index.table, *single, index.plane

    def sizes(self) -> tuple[int, ...]:
        """The arguments from T to NB NH."""
        index = self.index
        return (
            self.T, self.S, self.offset, self.first, index.shift, index.rows, self.H, self.G,
            *index.shape, *index.bounds,
        )  # fmt: skip

    def dims(self) -> dict[str, Any]:
        return {
            "K": self.K, "V": self.V, "BK": max(16, triton.next_power_of_2(self.K)),
            "BV": max(16, triton.next_power_of_2(self.V)), "HG": self.HG,
            "PER_ROW": self.index.per_row, "SIZE": self.index.size, "KIND": self.index.kind,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def constants(self) -> list[Tensor]:
        """The tensors among all kernels' arguments that are the mask's."""
        turned = self.index.turned
        found = *self.lists(), *(arguments(turned) if turned else ())
        return [t for t in found if t is not None]

    def key_tiles(
        self, k: Tensor, v: Tensor, step: int
    ) -> tuple[list[TensorDescriptor | None], bool]:
        """Descriptors for blocks of ``step`` keys."""
        index = self.index
        return self.tiles((k, v), step, index.size, index.unit == index.size and self.S % step == 0)

    def tiles(
        self, tensors: tuple[Tensor, ...], step: int, rows: int, whole: bool
    ) -> tuple[list[TensorDescriptor | None], bool]:
        """Descriptors of tiles of ``step`` rows for the copy engine, and whether there are any.

        They see a tensor as ``[B * tokens, heads * dim]``, so dims must fill their tiles and, with
        several batch rows, no tile may reach into the next (``whole``).
        """
        ready = (
            _has_copy_engine(tensors[0].device)
            and (whole or self.B == 1)
            and rows % step == 0
            and all(
                x.is_contiguous() and x.shape[3] in (32, 64, 128, 256) and x.data_ptr() % 16 == 0
                for x in tensors
            )
        )
        if not ready:
            return [None] * len(tensors), False
        flat = [x.view(-1, x.shape[2] * x.shape[3]) for x in tensors]
        return [
            TensorDescriptor(f, list(f.shape), list(f.stride()), [step, x.shape[3]])
            for f, x in zip(flat, tensors, strict=True)
        ], True

    def rows(self) -> dict[str, Any]:
        return {
            "BQ": self.BQ, "BM": self.BM, "UNIT": self.index.unit,
            "COLUMNS": self.index.columns is not None,
        }  # fmt: skip

    def config(self, name: str, rows: int | None = None) -> tuple[int, dict[str, int]]:
        """The step and the launch options."""
        width = triton.next_power_of_2(max(self.K, self.V))
        found = config(name, rows or self.BM, width, self.dtype.itemsize)
        return found.pop("step"), found

    def divides_warps(self, name: str, *tensors: Tensor) -> bool:
        """Whether the kernel ``name`` written for Hopper takes these tensors."""
        index = self.index
        return (
            name in HOPPER
            and _is_hopper(tensors[0].device)
            and tensors[0].dtype.itemsize == 2
            and self.BQ == 128
            and self.K == self.V
            and self.K in (64, 128)
            and index.columns is None
            and index.unit == index.size == index.per_row == 128
            and index.shift == 0
            and (self.B == 1 or (self.T % 128 == 0 and self.S % 128 == 0))
            and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
        )

    def narrowed(self, most: int) -> Launch:
        """The same with at most ``most`` queries a program."""
        return replace(self, BQ=most) if most < self.BQ and self.BQ % most == 0 else self


def prepare(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> Launch:
    (B, T, H, K), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
    chosen = masks.choice(mask)
    # Programs of float32 hold fewer rows: a tile's operands must fit in shared memory.
    most = MOST_ROWS if q.dtype.itemsize == 2 else SMALL_TILE
    if chosen is None:
        block = _tile(mask, T, S, offset) if most == MOST_ROWS else SMALL_TILE
        index = of_mask(mask, T, S, block, offset, q.device)
    else:
        index = of_choice(*chosen, S, offset, q.device)
    BQ, HG = _shape(index, H, G, most)
    return Launch(index, B, T, S, H, G, K, V, offset, q.dtype, BQ, HG)


def _tile(mask: Mask, T: int, S: int, offset: int) -> int:
    if max(T, S) <= SMALL_TILE:
        return SMALL_TILE
    if isinstance(mask, masks.Band):
        thin = mask.lo is not None and mask.hi is not None and mask.hi - mask.lo < SMALL_TILE
        return SMALL_TILE if thin else TILE
    tiles = mask.tiles(T, S, TILE, offset)
    computed = int(tiles.ptr[:: max(tiles.rows, 1)].diff()[tiles.plane.long()].sum())
    return TILE if tiles.area >= WELL_FILLED * computed * TILE**2 else SMALL_TILE


def _shape(index: Index, H: int, G: int, most: int) -> tuple[int, int]:
    """Queries and heads of a program: heads of a group join where they share lists of few rows."""
    BQ = next(n for n in range(min(index.per_row, most), 0, -1) if index.per_row % n == 0)
    share, HG = H // G, 1
    if G % index.shape[1] == 0 and BQ < SMALL_TILE:
        HG = next(n for n in range(share, 0, -1) if share % n == 0 and n * BQ <= most)
    return BQ, HG


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, offset: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (_dense_last(x) for x in (q, k, v))
    if scale < 0:
        q, scale = -q, -scale
    trains = q.requires_grad or k.requires_grad or v.requires_grad
    key = _key(mask, (q, k, v), "forward", scale, offset, trains)
    if found := _known.get(key):
        with on_device(q):
            return tuple(found(q, k, v))
    launch = prepare(q, k, v, mask, offset)
    if trains and not kernel.met(launch.form):

        def rehearsal() -> None:
            o, lse = forward(q, k, v, mask, scale, offset)
            backward(o, lse, q, k, v, o, lse, mask, scale, offset)

        kernel.rehearse(rehearsal)
    with on_device(q):
        return _repeated(key, partial(_forward, launch, scale), launch, q, k, v)


def _forward(
    launch: Launch, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    rows, heads = launch.programs
    parts = _parts(launch, rows * heads)
    lead = (parts,) if parts > 1 else ()
    dtype = torch.float32 if parts > 1 else v.dtype
    o = empty(v, *lead, *q.shape[:3], launch.V, dtype=dtype)
    lse = empty(q, *lead, *q.shape[:3], dtype=torch.float32)
    if parts == 1 and launch.divides_warps("forward", q, k, v):
        from subquad.ops.attention.triton.hopper import launch as hopper

        hopper.forward(launch, q, k, v, o, lse, scale)
        return o, lse
    step, options = launch.config("forward")
    tiles, bulk = launch.key_tiles(k, v, step)
    attention_forward.launch(
        (rows * parts, heads), (q, k, v, *tiles, o, lse, *launch.lists()),
        scale, *launch.sizes(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], lse.numel() // parts,
        **launch.dims(), **launch.rows(), BN=step, PARTS=parts, BULK=bulk, **options,
    )  # fmt: skip
    if parts == 1:
        return o, lse
    o_whole, lse_whole = merge(list(zip(o, lse, strict=True)))
    return o_whole.to(v.dtype), lse_whole


def _key(mask: Mask, tensors: tuple[Tensor, ...], *rest: Any) -> Hashable:
    """What decides a call's launches, None where they change from call to call: for choices made on
    the device, tensors that start anywhere and forced configurations; and in a rehearsal."""
    if (
        kernel.rehearsing()
        or forcing()
        or masks.choice(mask) is not None
        or any(t.data_ptr() % 16 for t in tensors)
    ):
        return None
    return (mask, *rest, *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def _repeated(key: Hashable, run: Callable[..., Any], launch: Launch, *tensors: Any) -> Any:
    if key is None:
        return run(*tensors)
    return kernel.repeated(_known, key, run, *tensors, constants=launch.constants)


def _parts(launch: Launch, programs: int) -> int:
    """Into how many parts each list is cut: few queries alone would leave the GPU idle."""
    width = launch.index.width(launch.S)
    if launch.T > MOST_ROWS or width < 512:
        return 1
    wanted = triton.cdiv(2 * processors(launch.index.plane.device), programs)
    most = triton.cdiv(width, 256)
    return min(triton.next_power_of_2(max(1, min(wanted, most))), 64)


def backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: Mask, scale: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = (_dense_last(x) for x in (q, k, v, do))
    inputs = (do, dlse.contiguous(), q, k, v, o, lse)
    key = _key(mask, inputs, "backward", scale, offset)
    if found := _known.get(key):
        with on_device(q):
            return tuple(found(*inputs))
    launch = prepare(q, k, v, mask, offset)
    with on_device(q):
        return _repeated(key, partial(_backward, launch, scale), launch, *inputs)


def _backward(
    launch: Launch, scale: float, do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    offset = launch.offset
    index, (B, T, H) = launch.index, q.shape[:3]
    delta, lse2 = empty(lse, 2, B, H, triton.cdiv(T, TILE) * TILE)
    taken = empty(index.plane, 2, 4)  # a counter each for two kernels, where one may begin
    dims, lists = launch.dims(), launch.lists()
    grads.attention_delta.launch(
        (triton.cdiv(T, TILE), B * H),
        (o, do, lse, dlse, delta, lse2, taken), T, H,
        o.stride(1), o.stride(2), o.stride(0), do.stride(1), do.stride(2), do.stride(0),
        V=launch.V, BV=dims["BV"], BM=TILE, num_warps=8,
    )  # fmt: skip
    turned = index.by_keys(triton.cdiv(launch.S, index.size)) if index.size % 64 == 0 else None
    strides = [s for x in (q, k, v, do) for s in x.stride()[:3]]
    dq = empty(q, *q.shape)
    if launch.divides_warps("grad_q", q, k, v, do):
        from subquad.ops.attention.triton.hopper import launch as hopper

        hopper.grad_q(launch, q, k, v, do, lse2, delta, taken[0], dq, scale)
    else:
        step, options = launch.config("grad_q")
        own = launch.narrowed(options.pop("queries", MOST_ROWS))
        tiles, bulk = own.key_tiles(k, v, step)
        grads.attention_grad_q.launch(
            own.programs, (q, k, v, *tiles, do, lse2, delta, dq, *lists),
            scale, *own.sizes(), *strides,
            **dims, **own.rows(), BN=step, BULK=bulk, **options,
        )  # fmt: skip
    if turned is None and index.kind != BAND:
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
        step, options = launch.config("scatter_kv")
        walked = (lists[0], *lists[2:4], *lists[6:])
        grads.attention_scatter_kv.launch(
            launch.programs, (q, k, v, do, lse2, delta, dk, dv, *walked),
            scale, *launch.sizes(), *strides,
            **dims, **launch.rows(), BN=step, **options,
        )  # fmt: skip
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    dk, dv = (empty(x, *x.shape) for x in (k, v))
    if launch.divides_warps("grad_kv", q, k, v, do):
        from subquad.ops.attention.triton.hopper import launch as hopper

        hopper.grad_kv(launch, turned, q, k, v, do, lse2, delta, taken[1], dk, dv, scale)
        return dq, dk, dv
    step, options = launch.config("grad_kv", index.per_row * launch.HG)
    keys, upright = options.pop("keys"), bool(options.pop("upright", 0))
    BN = keys if index.size % keys == 0 else 64
    blocks = triton.cdiv(launch.S, index.size)
    aligned = T % index.per_row == 0 and index.shift == 0
    tiles, bulk = launch.tiles((q, do), step, index.per_row, aligned and launch.HG == 1)
    bulk = bulk and launch.HG == 1
    tensors = (
        q, k, v, do, *tiles, lse2, delta, dk, dv, *arguments(turned), index.table, index.plane,
    )  # fmt: skip
    grads.attention_grad_kv.launch(
        (blocks * (index.size // BN), B * launch.G), tensors,
        scale, T, launch.S, offset, index.shift, blocks, H, launch.G, *index.shape,
        *index.bounds, *strides, **dims,
        BM=step, BN=BN, BULK=bulk, UPRIGHT=upright, **options,
    )  # fmt: skip
    return dq, dk, dv


@lru_cache(maxsize=8)
def _has_copy_engine(device: torch.device) -> bool:
    # The interpreter has one too.
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    # Gluon's names change from version to version; this one was checked.
    known = triton.__version__.startswith("3.6.")
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
