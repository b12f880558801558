"""Kernels launched by the driver, recorded and repeated: whatever else the process does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from subquad import mask
from subquad.bench.recurrence import LIMITS, Case, decode_inputs, errors, results
from subquad.ops.attention import attention
from subquad.ops.backend import backend
from subquad.ops.recurrence import recurrence

layout = pytest.importorskip("subquad.ops.recurrence.triton.layout")
from subquad.ops.attention.triton import op as attention_op  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def _triton():
    with backend("triton"):
        yield


@pytest.fixture
def _described(monkeypatch):
    """Small cases, too, are read by the copy engine."""
    monkeypatch.setattr(layout, "MANY", 0)
    layout.lay_out.cache_clear()
    yield
    layout.lay_out.cache_clear()


@pytest.fixture
def _forgotten():
    """Nothing is recorded yet."""
    layout.lay_out.cache_clear()
    attention_op._known.clear()
    attention_op.of_mask.cache_clear()


def documents(T=300):
    return mask.documents(torch.arange(T) // 70) & mask.causal()


def chosen(device, T=300, size=64):
    rows = -(-T // size)
    index = torch.arange(rows, device=device)[:, None] - torch.tensor([1, 0], device=device)
    index = torch.where(index < 0, -1, index).sort(-1)[0]
    first = torch.where(index[:, :1] < 0, index.flip(-1), index)
    return mask.blocks(first.int()[None, None], size, size) & mask.causal()


MASKS = {
    "band": lambda device: mask.causal() & mask.window(99),
    "documents": lambda device: documents(),
    "chosen": chosen,
}


def attended(m, device="cuda", dtype=BF16, K=64, seed=0, T=300):
    """o, lse and gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, do = (
        torch.randn(1, T, h, K, device=device, generator=generator).to(dtype) for h in (4, 2, 2, 4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = attention(*leaves, m, return_lse=True)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do)]


def near(got, want):
    """Other kernels may have run."""
    return (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


FORMS = [("head", True), ("channel", True), ("head", False)]
CASES = [Case(*form, T=T, H=2, state=True) for form in FORMS for T in (200, 2100)]


def found(case, device="cuda"):
    """Outputs and gradients of one drawing, on whatever GPU."""
    inputs = {n: t if t is None else t.to(device) for n, t in case.draw("cpu").items()}
    o, last = recurrence(
        **{n: None if t is None else t.requires_grad_() for n, t in inputs.items()}
    )
    leaves = [t for t in inputs.values() if t is not None]
    weights = torch.arange(o.shape[-1], device=device) - 20.0
    total = (o.float() * weights).sum() + (last * weights).sum()
    return [o.detach(), last.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.usefixtures("_described")
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize(("decay", "delta"), [("head", True), ("none", True), ("head", False)])
def test_dtypes_that_only_descriptors_tell_apart(decay, delta, width):
    for dtype in (BF16, F16, BF16):
        case = Case(decay, delta, B=2, T=320, dtype=dtype, K=width, V=width, state=True)
        off = errors(case, "cuda")
        assert max(off.values()) <= LIMITS[dtype], (dtype, off)


@TWO
@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recurrence_on_another_gpu(case):
    """The current device stays the first; kernels are compiled for the second first."""
    for _ in range(2):
        on_second, on_first = found(case, "cuda:1"), found(case, "cuda:0")
        same(on_second, on_first)
    assert torch.cuda.current_device() == 0


@TWO
@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("K", [32, 128])
def test_attention_on_another_gpu(name, K):
    make = MASKS[name]
    with torch.random.fork_rng():
        q = torch.randn(1, 300, 2, K)
    for _ in range(2):
        got = []
        for device in ("cuda:1", "cuda:0"):
            leaves = [q.to(device, BF16).requires_grad_() for _ in "qkv"]
            o = attention(*leaves, make(device))
            got.append([o.detach(), *torch.autograd.grad(o, leaves, o.detach())])
        same(*got)


@TWO
def test_decode_on_another_gpu():
    from subquad.ops.recurrence.triton.decode import decode_layer

    inputs = decode_inputs("cpu", B=2, HQ=2, H=2, K=64, V=64, dtype=BF16)

    def moved(x, device):
        if isinstance(x, tuple):
            return tuple(moved(t, device) for t in x)
        return x.to(device, copy=True) if isinstance(x, torch.Tensor) else x

    got = []
    for device in ("cuda:1", "cuda:0"):
        here = {n: moved(x, device) for n, x in inputs.items()}
        y, pasts = decode_layer(**here)
        got.append([y, *pasts, here["state"]])
    same(*got)


@TWO
@torch.no_grad()
def test_tokens_recorded_on_another_gpu():
    """After some were recorded on the first, and while that is the current one."""
    from subquad.caches import StateCache
    from test_recorded import models

    make = next(iter(models())).values[0]
    ids, outs = torch.randint(31, (2, 60)), []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        model, here, cache = make().to(device, F32), ids.to(device), StateCache()
        model(input_ids=here[:, :40], past_key_values=cache)
        step = model.steps(cache, room=9)
        assert step.repeats
        outs.append([step(here[:, t : t + 1]).clone() for t in range(40, 60)])
        with pytest.raises(ValueError, match="ids must have shape"):
            step(here[:1, :1])
    for a, b in zip(*outs, strict=True):
        assert near(b.cpu(), a.cpu())


@TWO
def test_threads_on_two_gpus_at_once():
    """As in DataParallel."""
    case = Case("head", True, T=190, H=2, K=64, V=64, state=True)
    want, band = found(case, "cuda:0"), attended(MASKS["band"](None))
    layout.lay_out.cache_clear()
    attention_op._known.clear()

    def work(n):
        with backend("triton"), torch.cuda.device(n % 2):
            return [found(case, f"cuda:{n % 2}") for _ in range(5)]

    with ThreadPoolExecutor(8) as threads:
        for every in threads.map(work, range(8)):
            for got in every:
                same(got, want)
    assert len(band) == 5


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda:1", marks=TWO)])
@pytest.mark.parametrize("name", ["k", "decay", "state", "cu_seqlens"])
def test_tensors_elsewhere_are_refused(name, where):
    """Also where the call was recorded with all of them on the GPU."""
    packed = (100, 33) if name == "cu_seqlens" else ()
    inputs = Case("head", True, T=133, H=2, packed=packed, state=True).draw("cuda")
    with torch.no_grad():
        for _ in range(2):
            want, _ = recurrence(**inputs)
        with pytest.raises(ValueError, match="on"):
            recurrence(**{**inputs, name: inputs[name].to(where)})
        assert torch.equal(recurrence(**inputs)[0], want)
        if name == "k":
            q = inputs["q"]
            band = mask.causal() & mask.window(50)
            attention(q, q, q, band)
            with pytest.raises(ValueError, match="on"):
                attention(q, q.to(where), q, band)


def test_starts_at_any_byte():
    """A view that starts at an odd element, after an aligned one, and the other way round."""
    T, H, K = 200, 2, 64
    room = [torch.randn(T * H * K + 8, device="cuda").to(BF16) for _ in "qkv"]
    band = mask.causal() & mask.window(99)

    def views(start):
        return [x[start : start + T * H * K].view(1, T, H, K) for x in room]

    with torch.no_grad():
        for start in (0, 1, 0, 4, 8, 3):
            odd, even = views(start), [x.clone() for x in views(start)]
            assert torch.equal(recurrence(*odd)[0], recurrence(*even)[0])
            assert near(attention(*odd, band), attention(*even, band))


def test_views_of_one_projection():
    """q, k and v in one tensor, each pair alike, and all the same; recorded with either."""
    T, H, K = 200, 2, 64
    x = torch.randn(1, T, 3, H, K, device="cuda").to(BF16)
    band = mask.causal() & mask.window(98)
    for sets in ((0, 0, 0), (0, 1, 2), (0, 1, 1), (2, 1, 0), (0, 0, 0)):
        views = [x[:, :, n].requires_grad_() for n in sets]
        alone = [x[:, :, n].clone().requires_grad_() for n in sets]
        for run in (lambda *a: recurrence(*a)[0], lambda *a: attention(*a, band)):
            got, want = run(*views), run(*alone)
            assert near(got, want)
            do = torch.ones_like(got)
            pairs = zip(torch.autograd.grad(got, views, do), torch.autograd.grad(want, alone, do))
            if len(set(sets)) == 3:
                for a, b in pairs:
                    assert near(a, b)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", ["band", "chosen"])
def test_attention_first_called_in_a_cuda_graph(name):
    """What the capture caches must serve calls outside it, before the graph ever ran."""
    q = torch.randn(1, 300, 2, 64, device="cuda").to(BF16)
    m = MASKS[name]("cuda")
    with torch.no_grad():
        # A warm-up, of another mask.
        attention(q, q, q, mask.window(11) & mask.causal() if name == "band" else chosen("cuda"))
        torch.cuda.synchronize()
        poison = torch.full((64 << 20,), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        del poison
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(q, q, q, m)
        eager = attention(q, q, q, m)
        attention_op._known.clear()
        again = attention(q, q, q, m)
        with backend("torch"):
            right = attention(q.float(), q.float(), q.float(), m)
        graph.replay()
    for got in (eager, again, captured):
        assert near(got, right)


@pytest.mark.usefixtures("_forgotten")
def test_lists_of_a_mask_are_not_made_in_a_cuda_graph():
    """PyTorch refuses the copy to the GPU; a call before makes them."""
    q = torch.randn(1, 300, 2, 64, device="cuda").to(BF16)
    m, graph = documents(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
            attention(q, q, q, m)
        want, graph = attention(q, q, q, m), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = attention(q, q, q, m)
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
@pytest.mark.parametrize("warm", [False, True])
def test_recurrence_in_a_cuda_graph(case, warm):
    """Forward and backward pass; the first call, and one that was recorded."""
    inputs = {n: t if t is None else t.requires_grad_() for n, t in case.draw("cuda").items()}
    leaves = [t for t in inputs.values() if t is not None]

    def step():
        o, last = recurrence(**inputs)
        loss = (o.float() * torch.arange(o.shape[-1], device="cuda")).sum() + last.sum()
        return [o.detach(), last.detach(), *torch.autograd.grad(loss, leaves)]

    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    same(got, step())


def test_streams_at_once():
    """Calls of one kind on several streams, none waiting for another."""
    case = Case("head", True, B=2, T=2100, H=2, K=64, V=64, state=True)
    sets = [case.draw("cuda", seed) for seed in range(4)]
    want = [list(results(recurrence, x).values()) for x in sets]
    m = documents()
    seen = [attended(m, seed=n) for n in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    got, saw = [[] for _ in sets], [[] for _ in sets]
    for _ in range(5):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[n].append(list(results(recurrence, sets[n]).values()))
                saw[n].append(attended(m, seed=n))
    torch.cuda.synchronize()
    for n in range(4):
        for one in got[n]:
            same(one, want[n])
        for one in saw[n]:
            same(one, seen[n])


@pytest.mark.usefixtures("_forgotten")
def test_mask_first_seen_on_a_side_stream():
    side = torch.cuda.Stream()
    m = documents()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        attended(m)
    got = attended(m)
    torch.cuda.synchronize()
    same(got, attended(m))


@pytest.mark.usefixtures("_forgotten")
def test_first_calls_of_many_threads():
    case = Case("head", True, T=170, H=2, K=64, V=64, state=True)
    m = documents()
    ready = threading.Barrier(8)

    def work(n):
        with backend("triton"):
            ready.wait()
            return [(found(case), attended(m)) for _ in range(3)]

    with ThreadPoolExecutor(8) as threads:
        every = [x for xs in threads.map(work, range(8)) for x in xs]
    for one, two in every[1:]:
        same(one, every[0][0])
        same(two, every[0][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations(reentrant):
    inputs = Case("head", True, T=160, H=2).draw("cuda")
    names = ("q", "k", "v", "decay", "beta")
    band = mask.causal() & mask.window(40)

    def run(*x):
        o = recurrence(**dict(zip(names, x, strict=True)))[0]
        return attention(o, o, o, band).float().square().sum()

    leaves = [inputs[n].requires_grad_() for n in names]
    want = torch.autograd.grad(run(*leaves), leaves)
    for _ in range(2):
        loss = checkpoint(run, *leaves, use_reentrant=reentrant)
        if reentrant:
            for x in leaves:
                x.grad = None
            loss.backward()
            got = [x.grad for x in leaves]
        else:
            got = torch.autograd.grad(loss, leaves)
        same(got, want)


def test_second_derivatives_are_refused():
    inputs = Case("head", True, T=100, H=2).draw("cuda")
    q = inputs["q"].requires_grad_()
    for run in (
        lambda: recurrence(**inputs)[0],
        lambda: attention(q, q, q, mask.causal() & mask.window(9)),
    ):
        (grad,) = torch.autograd.grad(run().float().square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.float().square().sum(), q)


def test_deterministic_mode_and_autocast():
    case = Case("head", True, T=2100, H=2, state=True)
    inputs = case.draw("cuda")
    want, m = list(results(recurrence, inputs).values()), documents()
    saw = attended(m)
    torch.use_deterministic_algorithms(True)
    try:
        same(list(results(recurrence, inputs).values()), want)
        same(attended(m), saw)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cuda", dtype=F16):
        same(list(results(recurrence, inputs).values()), want)
        same(attended(m), saw)


def test_caches_stay_bounded():
    """Other lengths and other scales at every call."""
    from subquad.ops import kernel

    q = torch.randn(1, 64, 1, 64, device="cuda").to(BF16)
    band = mask.causal() & mask.window(9)
    with torch.no_grad():
        for n in range(300):
            recurrence(q, q, q, scale=0.1 + n / 1000)
            attention(q, q, q, band, scale=0.1 + n / 1000)
    plan = layout.plan(q, q, q, None, None, None)
    assert len(plan.repeats) <= kernel.MOST_REPEATS
    assert len(plan.launches) <= kernel.MOST_LAUNCHES
    assert len(attention_op._known) <= kernel.MOST_REPEATS


def test_a_call_that_fails_midway_is_made_again(monkeypatch):
    from subquad.ops.kernel import Launch

    inputs = Case("head", True, T=150, H=2).draw("cuda")
    layout.lay_out.cache_clear()
    whole, made = Launch.__call__, []

    def stop(self, *tensors):
        made.append(self)
        if len(made) == 2:
            raise KeyboardInterrupt
        return whole(self, *tensors)

    with torch.no_grad():
        monkeypatch.setattr(Launch, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            recurrence(**inputs)
        monkeypatch.undo()
        got = [recurrence(**inputs)[0] for _ in range(3)]
        with backend("torch"):
            right = recurrence(**{n: t if t is None else t.float() for n, t in inputs.items()})[0]
    for one in got:
        assert (one.float() - right).norm() <= 2e-2 * right.norm()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_then_eager(mode):
    """Pools of compiled graphs hold nothing that is read elsewhere."""
    torch._dynamo.reset()
    layout.lay_out.cache_clear()
    attention_op._known.clear()
    attention_op.of_mask.cache_clear()
    m = mask.causal() & (mask.window(40) | mask.sinks(3))
    x = torch.randn(1, 300, 2, 64, device="cuda").to(BF16)

    def run(x):
        return attention(x, x, x, m) + recurrence(x, x, x)[0]

    compiled = torch.compile(run, mode=mode)
    leaf = x.clone().requires_grad_()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(leaf)
        (grad,) = torch.autograd.grad(got.float().square().sum(), leaf)
        got, grad = got.detach().clone(), grad.clone()
    poison = torch.full((64 << 20,), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
    del poison
    want = run(leaf)
    (right,) = torch.autograd.grad(want.float().square().sum(), leaf)
    assert near(got, want.detach())
    assert near(grad, right)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["recurrence", "band", "documents"])
def test_a_backward_pass_compiled_alone(name):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    x = torch.randn(1, 300, 2, 64, device="cuda").to(BF16).requires_grad_()

    def run(x):
        if name == "recurrence":
            return recurrence(x, x, x)[0]
        return attention(x, x, x, MASKS[name]("cuda"))

    (want,) = torch.autograd.grad(run(x).float().square().sum(), x)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        run(x).float().square().sum().backward()
    assert near(x.grad, want)


@pytest.mark.parametrize("name", ["documents", "chosen"])
def test_masks_with_data_compile(name):
    torch._dynamo.reset()
    m = MASKS[name]("cuda")
    x = torch.randn(1, 300, 2, 64, device="cuda").to(BF16).requires_grad_()

    def run(x):
        return attention(x, x, x, m)

    got, want = torch.compile(run, fullgraph=True)(x), run(x)
    assert near(got, want)
    do = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, x, do), torch.autograd.grad(want, x, do)):
        assert near(a, b)


def test_forward_mode_is_refused():
    x = torch.randn(1, 100, 2, 64, device="cuda").to(BF16)
    band = mask.causal() & mask.window(9)
    for run in (lambda q: recurrence(q, q, q)[0], lambda q: attention(q, q, q, band)):
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(run, (x,), (x,))


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_default_device(implementation):
    """As scripts set it: what is made on the CPU is still made there."""
    torch.set_default_device("cuda")
    try:
        x = torch.randn(1, 300, 2, 64).to(BF16)
        for m in (mask.causal() & mask.window(21), documents(), chosen("cuda")):
            with backend(implementation):
                got = attention(x, x, x, m)
            with backend("reference"):
                assert near(got, attention(x.double(), x.double(), x.double(), m))
        with backend(implementation):
            got = recurrence(x, x, x)[0]
        with backend("reference"):
            assert near(got, recurrence(x.double(), x.double(), x.double())[0])
    finally:
        torch.set_default_device(None)


@pytest.mark.usefixtures("_forgotten")
def test_trained_after_inference_mode():
    m, case = documents(), Case("head", True, T=200, H=2, state=True)
    with torch.inference_mode():
        recurrence(**case.draw("cuda"))
        q = torch.randn(1, 300, 4, 64, device="cuda").to(BF16)
        attention(q, q, q, m)
    same(attended(m), attended(m))
    same(found(case), found(case))


def test_transforms_are_right_or_refused():
    x = torch.randn(3, 1, 100, 2, 64, device="cuda").to(BF16)
    band = mask.causal() & mask.window(9)
    runs = (lambda q: recurrence(q, q, q)[0], lambda q: attention(q, q, q, band))
    for run in runs:
        want = torch.stack([run(q) for q in x])
        try:
            got = torch.vmap(run)(x)
        except RuntimeError:
            continue
        assert torch.equal(got, want)
    for run in runs:
        leaf = x[0].clone().requires_grad_()
        (want,) = torch.autograd.grad(run(leaf).float().sum(), leaf)
        try:
            got = torch.func.grad(lambda q, run=run: run(q).float().sum())(x[0])
        except RuntimeError:
            continue
        assert torch.equal(got, want)


def test_numbers_of_other_types():
    """scale 1, 1.0 and True are one number, 2 and 2.0 another."""
    x = torch.randn(1, 100, 2, 64, device="cuda").to(BF16) / 8
    band = mask.causal() & mask.window(9)
    with torch.no_grad():
        for scales in ((2, 2.0), (1, 1.0), (1.0, 1), (0, 0.0)):
            attention_op._known.clear()
            a, b = (attention(x, x, x, band, scale=s) for s in scales)
            assert torch.equal(a, b)
            layout.lay_out.cache_clear()
            a, b = (recurrence(x, x, x, scale=s)[0] for s in scales)
            assert torch.equal(a, b)


def test_triton_of_another_version(monkeypatch):
    """Where its metadata bear other names, Triton launches, and nothing is recorded."""
    from subquad.ops import driver

    monkeypatch.setattr(driver, "_maps", lambda about: about.no_such_name)
    x = torch.randn(1, 100, 2, 48, device="cuda").to(BF16) / 8
    want = recurrence(x.float(), x.float(), x.float(), backend="torch")[0]
    with torch.no_grad():
        for _ in range(3):
            got = recurrence(x, x, x)[0]
            assert (got.float() - want).norm() <= 2e-2 * want.norm()
    plan = layout.plan(x, x, x, None, None, None)
    assert not any(plan.repeats.values())
