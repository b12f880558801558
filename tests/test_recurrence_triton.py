"""The recurrence's GPU kernels, run by Triton's interpreter on the CPU, against the definition."""

import sys
import threading
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from kit import in_the_interpreter
from subquad.bench.recurrence import Case, decode_defined, decode_inputs, errors
from subquad.ops.backend import Request, backend, interpreted
from subquad.ops.recurrence import recurrence
from subquad.ops.recurrence.reference import recurrence as definition
from subquad.ops.recurrence.triton.gate import verify

# Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")
F32 = torch.float32


@pytest.fixture(autouse=True)
def _plans():
    """Plans made under another segment length do not outlive their test."""
    yield
    found = sys.modules.get("subquad.ops.recurrence.triton.layout")
    if found:
        found.lay_out.cache_clear()


def test_kernels_in_the_interpreter():
    in_the_interpreter(__file__)


def test_the_choice_is_traced_without_warnings():
    """Dynamo traces through a cached function, with a warning; the question is asked as it is."""

    def chosen(x):
        asked = Request("cuda", F32, {"B": 1, "T": 4, "K": 8, "V": 8}, frozenset())
        return x + verify(asked)[0]

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(2))


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize(("T", "segment"), [(100, 128), (6000, 2048)])
def test_a_rehearsal_meets_every_kernel(decay, T, segment, monkeypatch):
    """Without a GPU: the compiler is asked for a Hopper's kernels, and gives none to launch."""
    if interpreted():
        pytest.skip("nothing is compiled")
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from subquad.ops import kernel
    from subquad.ops.recurrence.triton import launch, layout

    class Hopper:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    ahead, launched = set(), set()

    def asked(*, key, **_):
        (launched if threading.current_thread() is threading.main_thread() else ahead).add(key)
        return True

    monkeypatch.setattr(kernel, "_met", set())
    monkeypatch.setattr(kernel.Launch, "_comes", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", asked)
    monkeypatch.setattr(layout, "segment_length", lambda *_: segment)
    for delta in (False, True):
        x = Case(decay, delta, T=T, H=1, K=16, V=16).draw("cpu")
        o, _, kept = launch.forward(**_named(x), scale=1.0, trains=True)
        assert launched
        assert launched < ahead
        launch.backward(o, None, **_named(x), kept=kept, scale=1.0)
        assert launched == ahead


def _add_one(X, n):
    """A kernel that is never compiled."""


def test_a_kernel_that_rarely_has_work_is_waited_for_by_its_second_launch(monkeypatch):
    if interpreted():
        pytest.skip("nothing is compiled")
    pytest.importorskip("triton")
    from concurrent.futures import Future

    from subquad.ops import kernel
    from subquad.ops.tape import record

    launched = []
    monkeypatch.setattr(kernel, "_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernel.Launch, "__call__", lambda self, *_: launched.append(self))
    add_one, x = kernel.Kernel(_add_one, sizes=("n",)), torch.zeros(4)
    idle, busy = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32)
    one, two = (add_one.bind((1,), n) for n in (4, 5))
    one.binaries[(x.dtype,)] = Future()
    _, tape = record(lambda: one.where(idle, x))
    assert (launched, tape.whole) == ([], False)
    _, tape = record(lambda: one.where(idle, x))
    assert (launched, tape.whole) == ([one], True)
    two.where(busy, x)
    assert launched == [one, two]


def _named(x):
    return {**{n: t for n, t in x.items() if n != "cu_seqlens"}, "cu": x["cu_seqlens"]}


CASES = {
    "none, split, several tiles of keys": (
        Case("none", True, T=140, H=1, K=160, V=24, dtype=F32, state=True), 64,
    ),
    "plain": (Case("head", False, T=130, H=1, K=16, V=16, dtype=F32, state=True), None),
    "no decay, delta, unequal": (
        Case("none", True, T=66, H=1, K=80, V=24, dtype=F32, state=True), None,
    ),
    "head, split and packed": (
        Case("head", True, T=140, H=2, K=16, V=16, dtype=F32, packed=(10, 0, 130), groups=2,
             state=True), 64,
    ),
    "plain, split, packed": (
        Case("head", False, T=300, H=2, K=16, V=24, dtype=F32, packed=(5, 0, 70, 225), groups=2,
             state=True), 128,
    ),
    "plain, split, strong": (
        Case("head", False, T=130, H=1, K=16, V=16, dtype=F32, strong=True), 64,
    ),
    "no decay, plain, split": (
        Case("none", False, T=270, H=1, K=16, V=80, dtype=F32, state=True), 128,
    ),
    "channel, strong, split": (
        Case("channel", True, T=130, H=1, K=16, V=16, dtype=F32, strong=True), 64,
    ),
    "channel, plain, packed": (
        Case("channel", False, T=70, H=1, K=24, V=16, dtype=F32, packed=(1, 0, 69)), None,
    ),
}  # fmt: skip


@inside
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    from subquad.ops.recurrence.triton import layout

    case, segment = CASES[name]
    whole = (case.T + 63) // 64 * 64
    with mock.patch.object(layout, "segment_length", return_value=segment or whole):
        found = errors(case, "cpu")
    assert max(found.values()) < 2e-5, found


BULK = {
    "head": (Case("head", True, T=64, H=2, K=128, V=128, dtype=torch.float16, groups=2), 64),
    "none, split": (Case("none", True, T=128, H=1, K=128, V=128, dtype=torch.float16), 64),
    "plain": (Case("head", False, T=64, H=2, K=128, V=128, dtype=torch.float16, groups=2), 64),
    "no decay, plain, split": (
        Case("none", False, T=128, H=1, K=128, V=128, dtype=torch.float16),
        64,
    ),
    "channel": (Case("channel", False, T=64, H=2, K=128, V=128, dtype=torch.float16), 64),
    "KDA, split": (Case("channel", True, T=128, H=1, K=128, V=128, dtype=torch.float16), 64),
}


@inside
@pytest.mark.parametrize("name", BULK)
def test_by_the_copy_engine(name):
    from subquad.ops.recurrence.triton import configs, layout

    case, segment = BULK[name]
    with (
        mock.patch.object(layout, "segment_length", return_value=segment),
        mock.patch.object(layout, "MANY", 0),
        mock.patch.object(configs, "copy_engine", return_value=True),
    ):
        found = errors(case, "cpu")
    assert max(found.values()) < 4e-3, found


TILES = {
    "head, delta, split": (
        Case("head", True, T=70, H=2, K=80, V=16, dtype=F32, groups=2, state=True), 64,
    ),
    "channel, delta": (Case("channel", True, T=66, H=1, K=80, V=16, dtype=F32, state=True), 128),
    "channel, plain, split": (Case("channel", False, T=66, H=1, K=80, V=16, dtype=F32), 64),
    "head, plain, split": (Case("head", False, T=66, H=1, K=144, V=16, dtype=F32), 64),
    "none, one launch": (Case("none", False, T=66, H=1, K=144, V=16, dtype=F32), 128),
    "head, by the copy engine": (
        Case("head", True, T=64, H=1, K=128, V=128, dtype=torch.float16), 64,
    ),
}  # fmt: skip


@inside
@pytest.mark.parametrize("name", TILES)
def test_a_state_of_two_tiles(name):
    from subquad.ops.recurrence.triton import configs, layout

    case, segment = TILES[name]
    config = {"BK": 64, "BV": 16 if case.V == 16 else 64, "num_warps": 4, "num_stages": 1}
    kernels = dict.fromkeys(("scan", "scan_back", "outputs"), config)
    kernels |= {n: {**config, "fill": 1} for n in ("scan_split", "states")}
    with (
        mock.patch.object(layout, "segment_length", return_value=segment),
        mock.patch.object(layout, "MANY", 0),
        mock.patch.object(configs, "copy_engine", return_value=True),
        configs.forced(kernels),
    ):
        found = errors(case, "cpu")
    assert max(found.values()) < (2e-5 if case.dtype == F32 else 4e-3), found


@inside
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_half_precision(decay):
    found = errors(Case(decay, True, T=70, H=1, K=16, V=16, dtype=torch.float16), "cpu")
    assert max(found.values()) < 4e-3, found


@inside
def test_recurrent_form_and_one_token():
    case = Case("head", True, B=2, T=5, H=2, K=16, V=24, dtype=F32, state=True)
    inputs = case.draw("cpu")
    want = definition(**inputs, scale=0.25)
    got = recurrence(**inputs, scale=0.25, form="recurrent", backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    one = {n: t if t is None or n == "state" else t[:, :1] for n, t in inputs.items()}
    got = recurrence(**one, scale=0.25, backend="triton")
    torch.testing.assert_close(got, definition(**one, scale=0.25), rtol=1e-5, atol=1e-5)


@inside
def test_operator_contract():
    from subquad.ops.recurrence.triton import op

    x = Case("head", False, T=3, H=1, K=16, V=16, dtype=F32, state=True).draw("cpu")
    leaves = [t.requires_grad_() if t is not None else t for t in list(x.values())[:-1]]
    torch.library.opcheck(op._forward.overload, (*leaves, None, 0.25), atol=1e-4, rtol=1e-4)


@inside
def test_compiles_as_one_graph():
    x = Case("head", True, T=3, H=1, K=16, V=16, dtype=F32).draw("cpu")

    def run(q, k, v, decay, beta):
        return recurrence(q, k, v, decay=decay, beta=beta, backend="triton")[0]

    args = [x[n] for n in ("q", "k", "v", "decay", "beta")]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), run(*args))


@inside
@pytest.mark.parametrize(("channel", "gated"), [(False, True), (True, False)])
def test_decode_layer(channel, gated):
    from subquad.ops.recurrence.triton.decode import decode_layer

    inputs = decode_inputs("cpu", channel=channel, gated=gated)
    right = decode_defined(inputs)
    y, nexts = decode_layer(**inputs)
    for name, past, new in zip("qkv", inputs["pasts"], nexts, strict=True):
        assert torch.equal(new, torch.cat([past[:, 1:], inputs[name].flatten(1)[:, None]], 1))
    torch.testing.assert_close((y.double(), inputs["state"].double()), right, rtol=1e-4, atol=1e-5)


@inside
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("gated_deltanet", {"heads": 1, "value_heads": 2, "head_dim": 8}),
        ("gated_deltanet", {"heads": 1, "head_dim": 8, "negative_eigenvalues": True}),
        ("kimi_linear", {"heads": 2}),
    ],
)
def test_a_mixer_decodes_in_one_launch(key, options, monkeypatch):
    import subquad
    from subquad.ops.recurrence.triton import decode

    mixer = subquad.create_mixer(key, dim=16, **options)
    x = torch.randn(2, 5, 16)
    calls = []
    launch = decode.decode_layer
    monkeypatch.setattr(decode, "decode_layer", lambda *a, **b: calls.append(1) or launch(*a, **b))
    with torch.no_grad():
        with backend("torch"):
            want, last = mixer(x)
            _, state = mixer(x[:, :2])
        with backend("triton"):
            for t in range(2, 5):
                y, state = mixer(x[:, t : t + 1], state=state)
                torch.testing.assert_close(y, want[:, t : t + 1], rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
    torch.testing.assert_close(dict(state.tensors), dict(last.tensors), rtol=1e-4, atol=1e-5)
