"""Facts of policies and caches: the checks of the sheets and the vectors of the authors."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from policy_kit import close
from subquad.caches.ring import RingLayer
from subquad.policies.base import Call, Site
from subquad.policies.streaming_llm import StreamingLLM


@pytest.fixture
def golden(shared):
    return lambda key: load_file(shared / "golden" / f"{key}.safetensors")


def _rope(x, positions, base=10_000.0):
    K = x.shape[-1]
    angle = positions[..., None] * base ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)
    cos, sin = (f(torch.cat([angle, angle], -1))[:, :, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _project(golden):
    """x through the golden projections: q ``[2,70,4,8]``, k and v ``[2,70,2,8]``."""
    return (
        nn.functional.linear(golden["x"], golden[f"w.{n}_proj"]).unflatten(-1, (-1, 8))
        for n in "qkv"
    )


@pytest.mark.parametrize("sizes", [(1,) * 70, (70,), (5, 30, 1, 1, 33)], ids=len)
def test_streaming_golden(golden, sizes):
    """The authors' stream, fed token by token, at once, and in pieces."""
    golden = golden("streaming_llm")
    q, k, v = _project(golden)
    policy = StreamingLLM(sinks=4, window=12)
    site = Site(0, 1, heads=4, kv_heads=2, head_dim=8, window=None)
    layer, outs = policy.layer(site), []
    for now in torch.arange(70).split(sizes):
        qs, ks, vs = q[:, now], k[:, now], v[:, now]
        layer.update(ks.transpose(1, 2), vs.transpose(1, 2))
        call = Call(site, qs, ks, vs, layer, 8**-0.5, None, now[None], _rope)
        outs.append(policy.decode(call) if len(now) == 1 else policy.prefill(call))
        policy.settle(call)
    out = nn.functional.linear(torch.cat(outs, 1).flatten(2), golden["w.o_proj"])
    close(out, golden["out"], 1e-5)
    close(layer.keys.transpose(1, 2), golden["k_cache"], 1e-6)
    close(layer.values.transpose(1, 2), golden["v_cache"], 1e-6)


def test_ring_is_slicing():
    """The ring holds what slicing sinks and window would, and never grows."""
    ring, x = RingLayer(3, 5), torch.randn(2, 2, 40, 4)
    sizes = []
    for t in range(40):
        ring.update(x[:, :, t : t + 1], x[:, :, t : t + 1])
        kept = [j for j in range(t + 1) if j < 3 or t - j < 5]
        close(ring.keys, x[:, :, kept].transpose(1, 2))
        sizes.append(ring.nbytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * 2 * 2 * 9 * 4 * 4
