"""Policies on the block-sparse kernels = the same choice over copies of the keys."""

import pytest
import torch

from subquad.ops.attention.token import Rope, token
from subquad.ops.select.pages import best, bounds
from subquad.policies.base import Call, Policy, Site, create_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = [
    ("vertical_slash", {"vertical": 60, "slash": 120}),
    ("vertical_slash", {"vertical": 60, "slash": 80, "variant": "frontier"}),
    ("block_topk", {"block": 16, "topk": 8}),
    ("block_topk", {"block": 64, "topk": 4, "variant": "minference"}),
    ("flexprefill", {"gamma": 0.5, "tau": 0.0, "min_budget": 128}),
    ("flexprefill", {"gamma": 0.5, "min_budget": 64, "variant": "frontier", "last_q": 64}),
    ("quest", {"budget": 128, "dense_layers": 0}),
    ("quest", {"budget": 128, "variant": "frontier"}),
]


def plain_token(q, k, v, *clock, **options):
    """A token without kernels, in float64."""
    return token(q.double(), k.double(), v.double(), *clock, **options).to(v.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1000, 1024])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda c: str(c))
def test_kernels_are_the_choice(name, options, T, dtype, monkeypatch):
    """Both paths attend to the keys that were chosen in the lower precision."""
    from subquad.policies.parts import chosen

    policy = create_policy(name, **options)
    torch.manual_seed(0)
    tensors = [torch.randn(1, T, n, 64, device="cuda").to(dtype) for n in (4, 2, 2)]
    site = Site(5, 8, heads=4, kv_heads=2, head_dim=64, window=None)

    def run():
        layer, outs, seen = policy.layer(site), [], 0
        for size in (T - 1, 1):
            q, k, v = (x[:, seen : seen + size] for x in tensors)
            layer.update(k.transpose(1, 2), v.transpose(1, 2))
            places = torch.arange(seen, seen + size, device="cuda")[None]
            call = Call(site, q, k, v, layer, 0.125, None, places, lambda x, p: x)
            outs.append(policy.decode(call) if size == 1 else policy.prefill(call))
            policy.settle(call)
            seen += size
        return torch.cat(outs, 1)

    def gathered(call, starts, size, rows, columns, unit):
        starts = torch.where(starts < 0, -1, starts * unit)
        return chosen._gathered(call, starts, size, rows, columns)

    by_kernels = run()
    monkeypatch.setattr(chosen, "_kernels", gathered)
    monkeypatch.setattr(chosen, "token", plain_token)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(by_kernels, run(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(1000, 1000), (300, 1111), (300, 1068)])
@pytest.mark.parametrize(
    "shape", [(32, 2, 100, 16), (64, 4, 128, 16), (32, 1, 256, 16), (16, 1, 7, 0)], ids=str
)
def test_hip_by_kernels_is_the_choice(shape, T, S, dtype):
    """Blocks, windows and sinks where they are = the same keys copied."""
    rows, block, window, sinks = shape
    options = {"rows": rows, "block": block, "window": window, "sinks": sinks}
    policy = create_policy("hip", budget=128, dense_layers=0, **options)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, S, n, 64, device="cuda").to(dtype) for n in (4, 2, 2))
    site = Site(5, 8, heads=4, kv_heads=2, head_dim=64, window=None)
    layer = policy.layer(site)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    places = torch.arange(S - T, S, device="cuda")[None]
    q = q[:, -T:]
    call = Call(site, q, k[:, -T:], v[:, -T:], layer, 0.125, None, places, lambda x, p: x)
    found = policy.search(q, k)
    want = policy._gathered(call, found, rows, window)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(policy._attend(call, found, rows, window), want, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("representative", ["first", "center"])
@pytest.mark.parametrize(("rows", "block", "budget"), [(32, 2, 256), (64, 4, 300), (1, 1, 40)])
def test_hip_search_by_the_kernel(rows, block, budget, representative, share, dtype):
    """The blocks that the definition finds; products of such integers are exact anywhere."""
    T = 1 if rows == 1 else 3000
    generator = torch.Generator().manual_seed(rows)
    q = torch.randint(-64, 65, (2, T, 6, 128), generator=generator)
    k = torch.randint(-64, 65, (2, 4000, 2, 128), generator=generator)
    options = {"rows": rows, "block": block, "budget": budget}
    policy = create_policy("hip", representative=representative, share=share, **options)
    found = policy.search(q.cuda().to(dtype), k.cuda().to(dtype))
    assert torch.equal(found, policy.search(q.cuda().double(), k.cuda().double()))


@pytest.mark.parametrize(("T", "S"), [(4096, 4096), (777, 3001), (65, 70)])
def test_diagonals_by_the_kernels(T, S):
    """Runs and single columns are those that the CPU finds."""
    from subquad.policies.parts import lines

    generator = torch.Generator().manual_seed(S)

    def drawn(n):
        order = torch.rand(2, 3, S, generator=generator).argsort(-1)
        return order[..., :n].sort(-1).values

    columns, distances = drawn(min(S, 300)), drawn(min(S, 60))
    want = lines.blocks(columns, distances, T, S, 64)
    found = lines.blocks(columns.cuda(), distances.cuda(), T, S, 64)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(lines.trimmed(a.long()).cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(("L", "S", "K"), [(64, 5000, 128), (300, 1111, 64), (20, 20, 96)])
def test_last_rows_by_the_kernels(L, S, K, window, dtype):
    """Sums by key and by distance, in float64 as they are defined."""
    from subquad.policies.parts import lines

    torch.manual_seed(0)
    q, k = (torch.randn(2, n, h, K, device="cuda").to(dtype) for n, h in ((L, 6), (S, 2)))
    found = lines.last_rows(q, k, 0.1, window)
    want = lines.last_rows(q.double(), k.double(), 0.1, window)
    torch.testing.assert_close(found, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("S", "v", "s"), [(1000, 20, 700), (131_072, 3276, 362), (300, 301, 5)])
def test_best_lines_by_the_kernel(S, v, s):
    """Of equal sums the earlier."""
    from subquad.policies.parts import lines

    generator = torch.Generator().manual_seed(S)
    sums = (torch.rand(2, 2, 3, S, generator=generator) ** 9 * 2000).round().cuda()
    found = lines.best(sums, (v, 4), (s, 100))
    for score, n, forced, own in zip(sums, (v, s), (4, 100), found, strict=True):
        score = score.clone()
        score[..., : min(forced, n)] = torch.inf
        order = score.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        assert torch.equal(own, order.sort(-1).values.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["frontier", "minference"])
@pytest.mark.parametrize(
    ("T", "S", "block", "topk"), [(4096, 4096, 16, 20), (700, 3001, 64, 5), (65, 70, 16, 9)]
)
def test_block_topk_by_the_kernels(T, S, block, topk, variant, dtype):
    """The blocks that the definition finds; sums of such integers are exact anywhere, and ties go
    to the earlier."""
    policy = create_policy("block_topk", block=block, topk=topk, variant=variant)
    generator = torch.Generator().manual_seed(T)
    q, k = (
        (block * torch.randint(-2, 3, (2, n // block, h, 128), generator=generator))
        .repeat_interleave(block, 1)
        .cuda()
        for n, h in ((S + block, 6), (S + block, 2))
    )
    q, k = q[:, S - T : S], k[:, :S]
    found = policy.select(q.to(dtype), k.to(dtype))
    assert torch.equal(found, policy.select(q.double(), k.double()))


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 0.5}, {"tau": 0.0, "max_budget": 700}])
@pytest.mark.parametrize(("T", "S"), [(5000, 5000), (300, 3001)])
def test_flexprefill_by_the_kernels(T, S, options):
    """The blocks that the definition finds."""
    from subquad.policies.parts import lines

    torch.manual_seed(0)
    policy = create_policy("flexprefill", gamma=0.8, block=64, min_budget=128, **options)
    q, k = (torch.randn(2, n, h, 64, device="cuda") for n, h in ((T, 4), (S, 2)))
    found = lines.trimmed(policy.select(q, k, 0.3).long())
    assert torch.equal(found, policy.select(q.double(), k.double(), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("P", "K"), [(1, 64), (100, 128), (8192, 96)])
def test_bounds_by_the_kernel(P, K, dtype):
    torch.manual_seed(0)
    q = torch.randn(2, 12, K, device="cuda").to(dtype)
    a, b = torch.randn(2, 2, P, 2, K, device="cuda").to(dtype)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    found = bounds(q, low, high)
    want = bounds(q.double(), low.double(), high.double())
    torch.testing.assert_close(found, want.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize(("P", "tokens"), [(64, 1000), (9000, 131_000), (40_000, 640_000)])
def test_best_pages_by_the_kernel(P, tokens, current):
    torch.manual_seed(0)
    q = torch.randn(2, 12, 64, device="cuda")
    a, b = torch.randn(2, 2, P, 2, 64, device="cuda")
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    options = {"page": 16, "share": current, "current": current}
    found = best(q, low, high, 64, tokens=tokens, **options)
    clock = torch.tensor([tokens - 1], device="cuda")
    assert torch.equal(best(q, low, high, 64, tokens=1, clock=clock, **options), found)
    last = (tokens - 1) // 16
    score = bounds(q, low, high, share=current)[..., : last if current else last + 1]
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :64]
    n = order.shape[-1]
    assert torch.equal(found[..., :n], 16 * order.sort(-1).values.int())
    rest = found[..., n:]
    assert torch.equal(rest[..., :-1], torch.full_like(rest[..., :-1], -1))
    if rest.numel():
        assert (rest[..., -1] == (16 * last if current else -1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 911])
@pytest.mark.parametrize(
    ("size", "n", "lists"), [(16, 64, 12), (7, 5, 2), (1, 300, 4), (1, 0, 0)], ids=str
)
def test_a_token_by_the_kernel(size, n, lists, window, dtype):
    """Some spans are none, some reach over the end, behind which memory holds anything; in
    float64, the same keys copied."""
    torch.manual_seed(0)
    S, room = 1111, 100
    q = torch.randn(2, 1, 12, 128, device="cuda").to(dtype)
    k, v = torch.randn(2, 2, S + room, 2, 128, device="cuda").to(dtype)
    starts = None
    if n:
        starts = torch.rand(2, lists, S // size + 1, device="cuda").argsort(-1)[..., :n] * size
        starts[:, :, 1::9] = -1
    options = {"starts": starts, "size": size, "scale": 0.1, "window": window}
    want = plain_token(q, k[:, :S], v[:, :S], **options)
    k[:, S:], v[:, S:] = torch.nan, torch.nan
    clock = torch.tensor([S - 5], device="cuda")
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    found = token(q, k, v, clock, 4, **options)
    torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)
    if n:
        found = token(q, k[:, :S], v[:, :S], **options)
        torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("last", [0, 30, 1026, 1027, 1028, 5000])
def test_a_token_rotated_by_the_kernel(last, pairs, dtype):
    """Sinks and a ring that fill up, then turn; halves or pairs of features."""
    torch.manual_seed(0)
    s, w, K = 4, 1024, 96
    q = torch.randn(2, 1, 12, K, device="cuda").to(dtype)
    k, v = torch.randn(2, 2, s + w, 2, K, device="cuda").to(dtype)
    angle = torch.randn(s + w, K // 2, device="cuda") * 3
    feature = torch.arange(K, device="cuda")
    partner, half = (feature ^ 1, feature // 2) if pairs else (feature.roll(K // 2), feature)
    sign = torch.where(feature < partner, 1, -1)
    cos, sin = angle.cos()[:, half % (K // 2)], sign * angle.sin()[:, half % (K // 2)]
    rope = Rope(cos.to(dtype), sin.to(dtype), partner.int())
    filled = min(last + 1, s + w)
    k[:, filled:], v[:, filled:] = torch.nan, torch.nan
    wide = Rope(rope.cos.double(), rope.sin.double(), rope.partner)
    options = {"scale": 0.1, "ring": (s, w)}
    want = plain_token(q, k[:, :filled], v[:, :filled], None, last, rope=wide, **options)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 3e-5
    close = {"atol": tolerance, "rtol": tolerance}
    found = token(q, k[:, :filled], v[:, :filled], None, last, rope=rope, **options)
    torch.testing.assert_close(found, want, **close)
    clock = torch.tensor([last - 2], device="cuda")
    torch.testing.assert_close(token(q, k, v, clock, 2, rope=rope, **options), want, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("at", "ring", "page"), [(32, None, 8), (37, None, 8), (37, (2, 11), 0)])
def test_a_token_is_appended(at, ring, page, dtype):
    from subquad.ops import cache

    torch.manual_seed(0)
    memory, limits = torch.randn(2, 3, 40, 2, 96), torch.randn(2, 3, 5, 2, 96)
    k, v = torch.randn(2, 3, 2, 1, 96).transpose(2, 3)
    k, v, memory, limits = (x.cuda().to(dtype) for x in (k, v, memory, limits))
    made = []
    for run, given in ((cache._append, None), (cache.append, None), (cache.append, at - 3)):
        held, own = memory.clone(), limits.clone()
        clock = None if given is None else torch.tensor([given], device="cuda")
        bounds = (*own, page) if page else None
        if run is cache.append:
            run(k, v, *held, at if clock is None else 3, clock, ring=ring, bounds=bounds)
        else:
            run(k, v, *held, at, None, ring, bounds)
        made.append(torch.cat([held.flatten(), own.flatten()]))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    "name", ["full", "quest", "frontier", "snapkv", "duo", "streaming", "vertical_slash"]
)
def test_recorded_tokens(name):
    """Tokens from a CUDA graph are those launched one by one: rooms that run out, and a piece of
    text in between."""
    import transformers

    import subquad

    policy = {
        "full": Policy,
        "quest": lambda: create_policy("quest", budget=128, dense_layers=1),
        "frontier": lambda: create_policy("quest", budget=128, variant="frontier"),
        "snapkv": lambda: create_policy("snapkv", capacity=128),
        "duo": lambda: create_policy("duo", gates=((1, 0), (0, 0), (0, 1)), sinks=4, window=60),
        "streaming": lambda: create_policy("streaming_llm", sinks=4, window=600),
        "vertical_slash": lambda: create_policy("vertical_slash", vertical=60, slash=120),
    }[name]()
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(made).eval().cuda()
    ids, outs = torch.randint(500, (2, 577), device="cuda"), []
    with torch.inference_mode(), subquad.apply(model, policy) as on:
        for recorded in (False, True):
            cache, out = on.new_cache(), []
            model(ids, past_key_values=cache, logits_to_keep=1)
            step = on.steps(cache, room=13)
            assert step.repeats
            for t in range(45):
                if t == 20:
                    model(ids[:, :3], past_key_values=cache)
                one = ids[:, t : t + 1]
                logits = step(one) if recorded else model(one, past_key_values=cache).logits[:, -1]
                out.append(logits.clone())
            outs.append(torch.stack(out))
            assert {layer.seen for layer in cache.held} == {577 + 48}
    torch.testing.assert_close(outs[1], outs[0], atol=2e-3, rtol=2e-3)
