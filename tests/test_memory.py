"""The memory operation: chunks = token by token, its limits, its gradients, its errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kit import close, poisoned
from subquad.ops.memory import begin, memory, read
from subquad.ops.memory.chunk import slab_width
from subquad.ops.memory.cost import net_size, state_bytes
from subquad.ops.memory.net import sources
from subquad.ops.memory.reference import _loss
from subquad.ops.recurrence import recurrence

NETS = [(1, False), (2, True), (3, True), (2, False)]
# chunk, step, when
CHUNKS = [
    (1, 1, "after"),
    (4, 1, "after"),
    (4, 1, "before"),
    (None, 1, "after"),
    (8, 4, "after"),
    (8, 4, "before"),
    (None, 2, "after"),
]


def inputs(B=2, T=7, H=2, d=4, depth=2, gain=True):
    """q, k, v, the weights and the gates."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, d, dtype=torch.float64) for _ in range(3))
    widths = [d, *[6] * (depth - 1), d]
    weights = [0.5 * torch.randn(H, a, b, dtype=q.dtype) for a, b in itertools.pairwise(widths)]
    if gain:
        weights.append(0.1 * torch.randn(H, d, dtype=q.dtype))
    x = torch.randn(3, B, T, H, dtype=q.dtype)
    gates = {
        "lr": 0.1 * x[0].sigmoid(),
        "momentum": F.logsigmoid(x[1]),
        "decay": F.logsigmoid(x[2] + 3),
    }
    return (q, k, v), weights, gates


def part(rows, gates, a, b):
    return [t[:, a:b] for t in rows], {n: t[:, a:b] for n, t in gates.items()}


def same(got, want) -> None:
    close(got[0], want[0])
    for a, b in zip(got[1][:-1], want[1][:-1], strict=True):
        for s, t in zip(a, b, strict=True):
            close(s, t)
    assert torch.equal(got[1].tokens, want[1].tokens)


@pytest.mark.parametrize(("chunk", "step", "when"), CHUNKS)
@pytest.mark.parametrize(("depth", "gain"), NETS)
def test_chunked_is_token_by_token(depth, gain, chunk, step, when):
    """At any length, in one call or several."""
    how = {"chunk": chunk, "step": step, "when": when, "gain_lr": 0.3}
    for T in (1, 8, 19):
        rows, weights, gates = inputs(T=T, depth=depth, gain=gain)
        want = memory(*rows, weights, **gates, **how, backend="reference")
        with poisoned():
            same(memory(*rows, weights, **gates, **how), want)
    ys, state = [], None
    for a, b in ((0, 6), (6, 7), (7, 19)):
        some, their = part(rows, gates, a, b)
        y, state = memory(*some, weights, **their, **how, state=state)
        ys.append(y)
    same((torch.cat(ys, 1), state), want)


def test_alike_tokens_do_not_drive_the_gain():
    """One token over and over, where one feature of the norm's output stands out: of the size of
    the root of the width. The gain's whole step overshoots it further with every chunk, and draws
    the layers along; 1/d of the step, as if a key of norm 1 were weighed, settles."""
    torch.manual_seed(0)
    d, T = 32, 512
    k = F.normalize(torch.randn(d), dim=0)
    v = torch.randn(d) / d**0.5
    W = 3 * k[:, None] * F.one_hot(torch.tensor(0), d) + 0.1 * torch.randn(d, d)
    rows = [t.expand(1, T, 1, d) for t in (k, k, v)]
    never = torch.zeros(1, T, 1)
    how = {"lr": never + 0.01, "momentum": never - 0.7, "decay": never, "chunk": 16}
    ends = {}
    for gain_lr in (1.0, 1 / d):
        _, state = memory(*rows, [W[None], torch.zeros(1, d)], **how, gain_lr=gain_lr)
        ends[gain_lr] = [t.abs().max() for t in state.weights]
    assert not max(ends[1.0]) < 1e6
    assert max(ends[1 / d]) < 5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gates_shut_for_good_are_exact(backend):
    """log gates of -inf: momentum 0, and a token that forgets everything before it."""
    rows, weights, gates = inputs(T=9)
    gates["momentum"][:, 2:5] = -math.inf
    gates["decay"][:, 4] = -math.inf
    got = memory(*rows, weights, **gates, chunk=4, backend=backend)
    assert got[0].isfinite().all()
    same(got, memory(*rows, weights, **gates, chunk=4, backend="reference"))


@pytest.mark.parametrize(("depth", "gain"), NETS)
def test_inner_gradient_is_autograd_s(depth, gain):
    (_, k, v), weights, _ = inputs(depth=depth, gain=gain)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = [w.expand(2, *w.shape).clone().requires_grad_() for w in weights]
    want = torch.autograd.grad(_loss(tuple(rows), k, v), rows)
    made = sources(rows, k, v)
    for a, delta, w in zip(made.inputs, made.deltas, want):
        close(a.mT @ delta, w)
    if gain:
        close(made.gain.sum(2), want[-1])


@pytest.mark.parametrize(
    ("chunk", "step", "depth", "gain"), [(3, 1, 2, True), (4, 2, 2, True), (1, 1, 1, 0)]
)
def test_gradients_go_through_the_inner_steps(chunk, step, depth, gain):
    """By finite differences, for q, k, v, the first weights, all gates and the state."""
    rows, weights, gates = inputs(B=1, T=5, H=1, d=3, depth=depth, gain=bool(gain))
    how = {"chunk": chunk, "step": step}
    _, state = memory(*rows, weights, **gates, **how)
    state = state._replace(tokens=torch.zeros(1, dtype=torch.int64))
    n = len(weights)
    given = [*rows, *gates.values(), *weights, *state.weights, *state.momentum]
    leaves = [t.detach().clone().requires_grad_() for t in given]

    def run(*t: Tensor) -> Tensor:
        past = state._replace(weights=t[6 + n : 6 + 2 * n], momentum=t[6 + 2 * n :])
        fresh, _ = memory(*t[:3], t[6 : 6 + n], **dict(zip(gates, t[3:6])), **how)
        y, after = memory(*t[:3], t[6 : 6 + n], **dict(zip(gates, t[3:6])), **how, state=past)
        return fresh.sum(-1) + y.sum(-1) + sum(w.sum() for w in after.weights + after.momentum)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_second_order_gradient_is_not_cut():
    """The outer gradient differs from the one in which the inner gradients are held fixed."""
    rows, weights, gates = inputs(T=6)
    first = [w.clone().requires_grad_() for w in weights]
    y, _ = memory(*rows, first, **gates, chunk=None)
    whole = torch.autograd.grad(y.sum(), first)
    state = begin(first, 2, chunk=None)
    fixed = state._replace(base=tuple(w.detach() for w in state.base))
    y, _ = memory(*rows, first, **gates, chunk=None, state=fixed)
    for a, b in zip(whole, torch.autograd.grad(y.sum(), first), strict=True):
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_packed_and_padded_are_looped(backend):
    """An empty sequence among them, and each at its own place in a chunk when it goes on."""
    rows, weights, gates = inputs(B=1, T=20)
    cu = torch.tensor([0, 0, 7, 8, 20], dtype=torch.int32)
    how = {"chunk": 4, "backend": backend}
    y, state = memory(*rows, weights, **gates, cu_seqlens=cu, **how)
    more, their = part(rows, gates, 0, 12)
    on = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    y2, last = memory(*more, weights, **their, cu_seqlens=on, state=state, **how)
    for n, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:])):
        some, gs = part(rows, gates, a, b)
        alone, past = memory(*some, weights, **gs, **how)
        close(y[:, a:b], alone)
        some, gs = part(rows, gates, 3 * n, 3 * n + 3)
        alone, past = memory(*some, weights, **gs, state=past, **how)
        close(y2[:, 3 * n : 3 * n + 3], alone)
        for w, v in zip(last.weights, past.weights, strict=True):
            close(w[n : n + 1], v)
    rows, weights, gates = inputs(B=2, T=11)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :5] = True
    y, state = memory(*rows, weights, **gates, padding=padding, **how)
    some, gs = part([t[:1] for t in rows], {n: t[:1] for n, t in gates.items()}, 5, 11)
    alone, past = memory(*some, weights, **gs, **how)
    close(y[:1, 5:], alone)
    close(state.momentum[0][:1], past.momentum[0])
    assert state.tokens.tolist() == [6, 11]


def test_one_matrix_is_the_gated_delta_rule():
    """W = (1 - alpha) W - 2 theta k^T (k W - v), read after the write; the recurrence decays W
    before it takes the error, so its values are divided by the decay."""
    (q, k, v), _, gates = inputs(T=11, depth=1, gain=False)
    gates["momentum"].fill_(-math.inf)
    gates["decay"].zero_()
    k = F.normalize(k, dim=-1)
    weights = [torch.zeros(2, 4, 4, dtype=q.dtype)]
    y, state = memory(q, k, v, weights, **gates, chunk=1)
    o, S = recurrence(q, k, v, beta=2 * gates["lr"], scale=1.0)
    close(y, o)
    close(state.weights[0], S)
    gates["decay"] = torch.full_like(gates["decay"], math.log(0.9))
    y, _ = memory(q, k, v, weights, **gates, chunk=1)
    W = torch.zeros(2, 2, 4, 4, dtype=q.dtype)
    for t in range(11):
        error = (k[:, t, :, None] @ W)[..., 0, :] - v[:, t]
        step = 2 * gates["lr"][:, t, :, None, None] * k[:, t, ..., None] * error[..., None, :]
        W = 0.9 * W - step
        close(y[:, t], (q[:, t, :, None] @ W)[..., 0, :])


def test_without_a_refresh_one_matrix_is_gated_linear_attention():
    (q, k, v), _, gates = inputs(T=13, depth=1, gain=False)
    gates["momentum"].fill_(-math.inf)
    weights = [torch.zeros(2, 4, 4, dtype=q.dtype)]
    y, _ = memory(q, k, v, weights, **gates, chunk=None)
    o, _ = recurrence(q, 2 * gates["lr"][..., None] * k, v, decay=gates["decay"], scale=1.0)
    close(y, o)


def test_forgetting_everything_leaves_the_token_alone():
    """alpha = 1, eta = 0: y at t depends on token t (and the base it started from) only."""
    rows, weights, gates = inputs(T=9)
    gates["momentum"].fill_(-math.inf)
    gates["decay"].fill_(-math.inf)
    changed = [t.clone() for t in rows]
    for t in changed:
        t[:, :4] += 1
    how = {**gates, "chunk": None}
    close(memory(*changed, weights, **how)[0][:, 4:], memory(*rows, weights, **how)[0][:, 4:])


@pytest.mark.parametrize("depth", [1, 2])
def test_one_pair_again_and_again_is_learned(depth):
    """The error falls at every token, faster with momentum."""
    (_, k, v), weights, gates = inputs(B=1, T=1, depth=depth, gain=depth > 1)
    k = F.normalize(k, dim=-1).expand(-1, 60, -1, -1)
    v = v.expand(-1, 60, -1, -1)
    errors = {}
    for eta in (0.0, 0.5):
        gates = {
            "lr": torch.full((1, 60, 2), 0.003, dtype=k.dtype),
            "momentum": torch.full((1, 60, 2), math.log(eta) if eta else -math.inf, dtype=k.dtype),
            "decay": torch.zeros(1, 60, 2, dtype=k.dtype),
        }
        y, _ = memory(k, k, v, weights, **gates, chunk=1)
        errors[eta] = (y - v).square().sum((0, 2, 3))
    assert (errors[0.0].diff() < 0).all()
    assert errors[0.5][-1] < 0.7 * errors[0.0][-1]


def test_reading_writes_nothing():
    rows, weights, gates = inputs()
    _, state = memory(*rows, weights, **gates, chunk=1)
    y, _ = memory(*part(rows, gates, 6, 7)[0], weights, **{
        "lr": torch.zeros(2, 1, 2, dtype=torch.float64),
        "momentum": torch.full((2, 1, 2), -math.inf, dtype=torch.float64),
        "decay": torch.zeros(2, 1, 2, dtype=torch.float64),
    }, chunk=1, state=state)  # fmt: skip
    close(read(rows[0][:, 6:7], state.weights), y)
    close(read(rows[0], weights), read(rows[0], begin(weights, 2).weights))


def test_float32_and_bfloat16_carry_a_float32_state():
    rows, weights, gates = inputs(T=9)
    want = memory(*rows, weights, **gates, chunk=4)[0]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        small = {n: t.float() for n, t in gates.items()}
        y, state = memory(*(t.to(dtype) for t in rows), weights, **small, chunk=4)
        assert y.dtype == dtype
        assert state.weights[0].dtype == torch.float32
        close(y.double(), want, tolerance)


def test_costs():
    assert net_size(d=4, depth=1, expand=2, gain=False) == 16
    assert net_size(d=4, depth=3, expand=2, gain=True) == 4 * 8 + 8 * 8 + 8 * 4 + 4
    assert [slab_width(c) for c in (1, 48, 64, 128, 96, None)] == [1, 48, 64, 64, 48, 64]
    _, weights, _ = inputs()
    for chunk, step in ((1, 1), (4, 1), (4, 2)):
        state = begin([w.float() for w in weights], 3, chunk=chunk, step=step)
        held = sum(t.numel() * 4 for group in state[:-1] for t in group) + 3 * 8
        size = sum(w[0].numel() for w in weights)
        assert state_bytes(B=3, H=2, size=size, chunk=chunk, step=step) == held


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": torch.zeros(2, 7, 3)}, r"lr must have shape \[2, 7, 2\]"),
        ({"decay": torch.ones(2, 7, 2)}, "decay must be a log gate, <= 0, got 1"),
        ({"chunk": 0}, "chunk must be a positive int, got 0"),
        ({"step": 3, "chunk": 4}, "step must divide chunk=4, got 3"),
        ({"when": "now"}, "when must be one of"),
        ({"weights": [torch.zeros(2, 3, 4)]}, r"weights must be layers \[2,4,e\]"),
        ({"weights": []}, "weights must be layers"),
        ({"padding": torch.zeros(2, 6, dtype=torch.bool)}, "padding must have shape"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "packed sequences need a batch of 1, got B=2"),
        ({"backend": "cuda"}, "backend of memory must be one of"),
    ],
)
def test_bad_input_is_named(change, said):
    rows, weights, gates = inputs()
    with pytest.raises(ValueError, match=said):
        memory(*rows, **{"weights": weights, **gates, **change})


def test_a_state_of_another_memory_is_refused():
    rows, weights, gates = inputs()
    with pytest.raises(ValueError, match=r"state\.base must hold 0 tensors"):
        memory(*rows, weights, **gates, chunk=1, state=begin(weights, 2, chunk=4))
    with pytest.raises(ValueError, match=r"state\.tokens must have shape"):
        memory(*rows, weights, **gates, state=begin(weights, 3))
