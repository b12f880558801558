"""Launches recorded and repeated, and the driver's arguments, without a GPU."""

import struct
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from subquad import mask  # noqa: E402
from subquad.ops import driver, kernel, tape  # noqa: E402
from subquad.ops.backend import interpreted  # noqa: E402

needs_compiler = pytest.mark.skipif(interpreted(), reason="the interpreter has no launches")

PTX = """.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .f32 kernel_param_3,
	.param .u64 kernel_param_4
)
"""


@pytest.fixture
def stream(monkeypatch):
    """A GPU of which only the stream is asked for."""
    gpu = SimpleNamespace(get_current_stream=lambda _: 7, get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)


def _function(submit, mask):
    """Two launches: x and a mask to a scratch, part of it to the output."""

    def run(x, nothing):
        scratch = tape.empty(x, 4, 3)
        counter = tape.zeros(x, 1, dtype=torch.int32)
        out = tape.empty(x, 2, dtype=torch.float64)
        tape.recording.tape.launches.append((submit, (x, nothing, mask, scratch, counter)))
        tape.recording.tape.launches.append((submit, (scratch[1:], out)))
        return out, nothing

    return run


def test_a_recorded_call_is_repeated_with_other_tensors(stream):
    asked = []
    mask = torch.zeros(5)
    run = _function(lambda pointers, stream: asked.append((pointers, stream)), mask)
    x, y = torch.zeros(6), torch.zeros(6)
    found, did = tape.record(lambda: run(x, None))
    assert not asked
    repeat = tape.repeatable(did, (x, None), found, [mask])
    assert repeat is not None
    out, nothing = repeat(y, None)
    assert nothing is None
    assert out.shape == (2,)
    assert out.dtype == torch.float64
    (first, one), (second, other) = asked
    assert first[:2] == (y.data_ptr(), mask.data_ptr())
    assert second == (first[2] + 12, out.data_ptr())
    assert one == other == 7


@pytest.mark.parametrize("why", ["Triton's launch", "an address from elsewhere", "one input twice"])
def test_what_cannot_be_repeated(why, stream):
    x, mask = torch.zeros(6), torch.zeros(5)
    run = _function(None if why == "Triton's launch" else print, mask)
    found, did = tape.record(lambda: run(x, None))
    inputs = (x, x) if why == "one input twice" else (x, None)
    constants = [] if why == "an address from elsewhere" else [mask]
    assert tape.repeatable(did, inputs, found, constants) is None


def test_pieces_of_a_block():
    shapes = {"a": ((3, 2), torch.bfloat16), "b": ((5,), torch.float32)}
    block = torch.zeros(tape.size(shapes), dtype=torch.uint8)
    found = tape.pieces(block, shapes)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == shapes
    found["b"].fill_(1)
    assert not found["a"].any()


def test_parameters_lie_as_the_ptx_says(monkeypatch):
    about = SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
        profile_scratch_size=0, shared=0, tensordesc_meta=None,
    )  # fmt: skip
    monkeypatch.setattr(driver, "_driver", object)
    monkeypatch.setattr(driver, "_shared_memory", lambda _: 100_000)
    gpu = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    compiled = SimpleNamespace(metadata=about, asm={"ptx": PTX})
    types = driver._parameters(compiled)
    assert types == ("u64", "map", "u32", "f32", "u64")
    block, offsets = driver._block(types, [1, 0, -2, 0.5, 3])
    assert offsets == [0, 64, 192, 196, 200]
    assert struct.unpack_from("<q", block, 0) == (1,)
    assert struct.unpack_from("<ifq", block, 192) == (-2, 0.5, 3)
    about.global_scratch_size = 8
    assert driver._parameters(compiled) is None
    del about.global_scratch_size  # as a Triton of another version might call it otherwise
    assert driver._parameters(compiled) is None
    about.global_scratch_size, compiled.asm = 0, {"ptx": PTX.replace(".f32", ".b16")}
    assert driver._parameters(compiled) is None


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, the second, of which nothing but the number is asked."""
    found = SimpleNamespace(get_current_stream=lambda _: 7, get_current_device=lambda: 1)
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(kernel, "_beginning", SimpleNamespace(is_alive=lambda: False))


def copy(X, Y, n, BN: tl.constexpr):
    """Never compiled."""


@needs_compiler
def test_descriptors_are_told_apart_by_dtype_and_tile(gpu):
    launch = kernel.Kernel(copy).bind((1,), 5, BN=16)
    wanted = kernel._rehearsal.wanted = {}
    try:
        for dtype, rows in ((torch.bfloat16, 4), (torch.float16, 4), (torch.float16, 8)):
            for size in (16, 32):  # one kernel serves tensors of all sizes
                x = torch.zeros(size, 64, dtype=dtype)
                launch(TensorDescriptor.from_tensor(x, [rows, 64]), torch.zeros(4))
    finally:
        kernel._rehearsal.wanted = None
    assert len(wanted) == 3


@needs_compiler
def test_a_rehearsal_compiles_on_the_launches_own_device(gpu, monkeypatch):
    launch, where = kernel.Kernel(copy).bind((1,), 5, BN=16), []

    def current(device):
        where.append(device)
        return nullcontext()

    def rehearsed():
        launch(torch.zeros(4), torch.zeros(4))
        raise torch.OutOfMemoryError  # the backward pass may not fit, and may never come

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(kernel.Launch, "compile", lambda *_: None)
    kernel.rehearse(rehearsed)
    assert where == [1]
    assert not kernel.rehearsing()


@needs_compiler
def test_a_launch_by_triton_is_not_repeated(gpu, monkeypatch):
    """A tensor that starts anywhere asks for another kernel: the call is not to be repeated."""
    one = kernel.Kernel(copy)
    monkeypatch.setattr(one, "jit", defaultdict(lambda: lambda *_, **__: None))
    x = torch.zeros(9)

    def run(x):
        out = tape.empty(x, 4)
        one.launch((1,), (x[1:], out), 5, BN=16)
        return (out,)

    known = {}
    for _ in range(2):
        kernel.repeated(known, "call", run, x)
    assert known == {"call": None}


def test_records_stay_bounded(monkeypatch):
    monkeypatch.setattr(kernel, "repeatable", lambda *_: None)
    known = {}
    for key in range(5 * kernel.MOST_REPEATS):
        kernel.repeated(known, key, lambda x: (x,), torch.zeros(1))
    assert len(known) <= kernel.MOST_REPEATS


def test_tensors_elsewhere_are_named():
    with pytest.raises(ValueError, match="on cuda:1 as others are, got cpu"):
        tape.addresses([torch.zeros(1)], 1)


def test_forced_configurations_are_not_recorded():
    from subquad.ops.attention.triton import configs, op

    x = torch.zeros(1, 8, 1, 16)
    assert op._key(mask.causal(), (x, x, x)) is not None
    with configs.forced({"forward": {"step": 32}}):
        assert op._key(mask.causal(), (x, x, x)) is None
