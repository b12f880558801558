"""The recurrence's GPU kernels, run by Triton's interpreter on the CPU, against the definition."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from subquad.bench.recurrence import Case, errors
from subquad.ops.backend import interpreted
from subquad.ops.recurrence import recurrence
from subquad.ops.recurrence.reference import recurrence as definition

# Triton reads TRITON_INTERPRET when it is imported, so the kernels run in a process of their own.
inside = pytest.mark.skipif(not interpreted(), reason="runs under TRITON_INTERPRET=1")
F32 = torch.float32


def test_kernels_in_the_interpreter():
    if interpreted():
        pytest.skip("these are the tests")
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


CASES = {
    "plain, one launch": (Case("head", False, T=70, H=1, K=16, V=16, dtype=F32), None, 4096),
    "no decay, delta, unequal": (
        Case("none", True, T=66, H=1, K=80, V=24, dtype=F32, state=True), None, 4096,
    ),
    "head, split and packed": (
        Case("head", True, T=140, H=2, K=16, V=16, dtype=F32, packed=(10, 0, 130), groups=2,
             state=True), 64, 4096,
    ),
    "plain, split, prepared": (
        Case("head", False, T=130, H=1, K=16, V=16, dtype=F32, state=True), 64, 0,
    ),
    "channel, strong, split": (
        Case("channel", True, T=130, H=1, K=16, V=16, dtype=F32, strong=True), 64, 4096,
    ),
    "channel, plain, packed": (
        Case("channel", False, T=70, H=1, K=24, V=16, dtype=F32, packed=(1, 0, 69)), None, 4096,
    ),
}  # fmt: skip


@inside
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    from subquad.ops.recurrence.triton import launch

    case, segment, short = CASES[name]
    whole = (case.T + 63) // 64 * 64
    with (
        mock.patch.object(launch, "segment_length", return_value=segment or whole),
        mock.patch.object(launch, "SHORT", short),
    ):
        found = errors(case, "cpu")
    assert max(found.values()) < 2e-5, found


@inside
def test_half_precision():
    found = errors(Case("channel", True, T=70, H=1, K=16, V=16, dtype=torch.float16), "cpu")
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
    torch.library.opcheck(op._forward, (*leaves, None, 0.25), atol=1e-4, rtol=1e-4)


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

    B, HQ, H, K, V, size = 2, 1, 2, 24, 40, 4
    qkv = [torch.randn(B, h, w) for h, w in ((HQ, K), (HQ, K), (H, V))]
    pasts = tuple(torch.randn(B, size - 1, x[0].numel()) for x in qkv)
    weights = tuple(torch.randn(x[0].numel(), size) for x in qkv)
    raw = torch.randn(B, H, K) if channel else torch.randn(B, H)
    A_log, dt_bias = torch.randn(H), torch.randn(H * K if channel else H)
    beta, state = torch.randn(B, H), torch.randn(B, H, K, V)
    gate, norm = (torch.randn(B, H, V), torch.randn(V)) if gated else (None, None)
    before = state.clone()
    y, nexts = decode_layer(
        *qkv, pasts=pasts, weights=weights, decay=raw, A_log=A_log, dt_bias=dt_bias, beta=beta,
        state=state, gate=gate, norm=norm,
    )  # fmt: skip
    convolved = []
    for x, past, weight, new in zip(qkv, pasts, weights, nexts, strict=True):
        rows = torch.cat([past, x.flatten(1)[:, None]], 1)
        assert torch.equal(new, rows[:, 1:])
        convolved.append(F.silu((rows.mT * weight).sum(-1)).view(x.shape)[:, None])
    q, k, v = convolved
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    rate = A_log.exp()[:, None] if channel else A_log.exp()
    decay = -rate * F.softplus(raw + dt_bias.view(raw.shape[1:]))
    o, last = definition(
        q, k, v, decay=decay[:, None], beta=beta.sigmoid()[:, None], scale=K**-0.5, state=before,
        cu_seqlens=None,
    )  # fmt: skip
    o = o[:, 0]
    if gated:
        o = F.rms_norm(o, (V,), norm, 1e-5) * F.silu(gate)
    torch.testing.assert_close(y, o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
