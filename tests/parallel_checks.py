"""The checks that the ranks of `parallel_ranks.py` run: a split sequence beside a whole one.

Every rank computes the whole by the operations of one device too, and compares its own part, all
gradients, and the states.
"""

import re
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import subquad
from parallel_ranks import check
from rows import ROWS
from subquad import checkpoint, parallel
from subquad import mask as masks
from subquad.models.causal_lm import CausalLM, CausalLMConfig
from subquad.ops.attention import attention
from subquad.ops.recurrence import linear_attention, recurrence
from subquad.ops.scan import scan
from subquad.parallel import wire
from subquad.parallel.gather import gathered
from subquad.parallel.lasp2 import lasp2
from subquad.parallel.mesh import place
from subquad.parallel.ring_attention import layout_index, ring, ring_attention
from subquad.parallel.scan import lasp2_scan
from subquad.parallel.shards import attend_shards
from subquad.parallel.tokens import Before
from subquad.parallel.ulysses import gather_heads, scatter_heads, ulysses, ulysses_recurrence
from subquad.tasks import create_task
from subquad.train import TrainConfig, train
from subquad.train.ranks import Ranks

B, H, K, V = 2, 4, 3, 5


def within(groups, sizes=(4, 2, 3)):
    """The places of this process, in groups of so many."""
    for size in sizes:
        if dist.get_rank() < size:
            torch.manual_seed(size)  # the ranks of a group draw the same
            yield place(groups[size])


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(a, b, what=""):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


def part(t, here, index=None):
    """This rank's tokens."""
    if index is None:
        return parallel.split(t, mesh=here)
    return t[:, index[here.rank]]


def same(here, inputs, alone, split, *, shared=(), index=None, tokens=1):
    """Run both, compare outputs and gradients.

    Args:
        inputs: by name, float64 or None; ``shared`` are those that every rank has whole.
        alone, split: from the inputs to ``(o, ..., *states)``; the first ``tokens`` of them are cut
            by tokens.
    """
    whole = {n: None if t is None else t.clone().requires_grad_() for n, t in inputs.items()}
    mine = {
        n: None if t is None else (t if n in shared else part(t, here, index)).clone()
        for n, t in inputs.items()
    }
    mine = {n: None if t is None else t.requires_grad_() for n, t in mine.items()}
    want, got = alone(**whole), split(**mine)
    weights = [torch.randn_like(w) for w in want]
    loss = total = 0
    for i, (g, w, weight) in enumerate(zip(got, want, weights, strict=True)):
        total = total + (w * weight).sum()
        if i < tokens:
            close(g, part(w, here, index), "o")
            loss = loss + (g * part(weight, here, index)).sum()
        else:
            close(g, w, "state")
            # Each rank has a copy; their losses add up.
            loss = loss + (g * weight).sum() / here.size
    loss.backward()
    total.backward()
    for name, t in whole.items():
        if t is None or t.grad is None:
            continue
        grad = mine[name].grad
        if name in shared:
            grad = torch.zeros_like(mine[name]) if grad is None else grad
            dist.all_reduce(grad, group=here.group)
            close(grad, t.grad, f"d{name}")
        else:
            close(grad, part(t.grad, here, index), f"d{name}")


@contextmanager
def counted():
    """What goes over the wire inside, by kind: calls and elements that a rank sends to others."""
    calls, sent = [], {}

    def wrap(kind, amount):
        real = getattr(wire, kind)

        def call(*args, **options):
            calls.append(kind)
            W = dist.get_world_size(options.get("group"))
            sent[kind] = sent.get(kind, 0) + amount(args, W)
            return real(*args, **options)

        return mock.patch.object(wire, kind, call)

    def hops(args, W):
        return sum(op.tensor.numel() for op in args[0] if op.op is dist.isend)

    with (
        wrap("all_gather", lambda a, W: (W - 1) * a[1].numel()),
        wrap("reduce_scatter", lambda a, W: (W - 1) * a[0].numel()),
        wrap("all_to_all", lambda a, W: a[1].numel() * (W - 1) // W),
        wrap("all_reduce", lambda a, W: 2 * (W - 1) * a[0].numel() // W),
        wrap("send_and_receive", hops),
        mock.patch.object(parallel.Split, "agree", return_value=None),
    ):
        yield calls, sent


# --- lasp2 --------------------------------------------------------------------------------------


def recurrent(T, *, decay=None, delta=False, state=True, N=B, rows=B, kv=H, vs=H):
    k = drawn(rows, T, kv, K)
    inputs = {
        "q": drawn(rows, T, H, K),
        "k": torch.nn.functional.normalize(k, dim=-1) if delta else k,
        "v": drawn(rows, T, vs, V),
        "decay": None,
        "beta": drawn(rows, T, H).sigmoid() if delta else None,
        "state": drawn(N, H, K, V) if state else None,
    }
    shape = {"constant": (H,), "head": (rows, T, H), "channel": (rows, T, H, K)}
    if decay is not None:
        inputs["decay"] = -drawn(*shape[decay]).abs()
    shared = ("state", "decay") if decay == "constant" else ("state",)
    return inputs, shared


@check
def lasp2_every_decay_and_the_delta_rule(groups):
    for here in within(groups, (4, 3)):
        for i, decay in enumerate((None, "constant", "head", "channel")):
            for delta in (False, True):
                inputs, shared = recurrent(
                    6 * here.size,
                    decay=decay,
                    delta=delta,
                    state=(i + delta + here.size) % 2 == 0,  # each with and without
                    kv=2,
                    vs=2 if decay is None else H,
                )
                same(here, inputs, recurrence, partial(lasp2, mesh=here), shared=shared)


CUTS = ([0, 24], [0, 3, 3, 14, 24], [0, 12, 13, 24, 24], [0, 0, 6, 18, 24], [0, 1, 23, 24])


@check
def lasp2_packed(groups):
    for here in within(groups, (4, 3)):
        for i, cut in enumerate(CUTS):
            for decay, delta in ((None, False), ("head", True), ("channel", False), (None, True)):
                for state in (i % 2 == 0,):
                    inputs, shared = recurrent(
                        24, decay=decay, delta=delta, rows=1, N=len(cut) - 1, state=state
                    )
                    cu = torch.tensor(cut, dtype=torch.int32)
                    same(
                        here,
                        inputs,
                        partial(recurrence, cu_seqlens=cu),
                        partial(lasp2, cu_seqlens=cu, mesh=here),
                        shared=shared,
                    )


@check
def lasp_hands_the_state_on(groups):
    """The serial predecessor finds the same; a rank sends one state forward and one back."""
    for here in within(groups, (4, 3)):
        serial = partial(lasp2, exchange="serial", mesh=here)
        for decay, delta in (
            (None, False),
            ("constant", False),
            ("channel", False),
            ("head", True),
        ):
            inputs, shared = recurrent(6 * here.size, decay=decay, delta=delta)
            same(here, inputs, recurrence, serial, shared=shared)
            cu = torch.tensor(CUTS[1], dtype=torch.int32)
            inputs, shared = recurrent(24, decay=decay, delta=delta, rows=1, N=4)
            same(
                here,
                inputs,
                partial(recurrence, cu_seqlens=cu),
                partial(serial, cu_seqlens=cu),
                shared=shared,
            )


@check
def lasp2_wide_values_take_a_second_run(groups):
    here = next(within(groups, (2,)), None)
    if here is None:
        return
    with mock.patch("subquad.parallel.lasp2.WIDEST", 4):
        inputs, shared = recurrent(12, decay="head", delta=True)
        same(here, inputs, recurrence, partial(lasp2, mesh=here), shared=shared)


@check
def lasp2_zeros_change_nothing(groups):
    """Tokens at the end with k = 0, decay = 0, beta = 0 leave the state as it is."""
    here = next(within(groups, (4,)))
    for decay, delta in (("channel", False), ("head", True)):
        inputs, _ = recurrent(13, decay=decay, delta=delta)
        _, want = recurrence(**inputs)
        padded = {
            n: t if n == "state" or t is None else parallel.split(t, fill=0.0, mesh=here)
            for n, t in inputs.items()
        }
        close(lasp2(**padded, mesh=here)[1], want)


@check
def lasp2_resets(groups):
    """A decay of minus infinity where a document starts lets nothing of those before through."""
    for here in within(groups, (4, 3)):
        for cut in CUTS[2:3], CUTS[4:]:
            starts = sorted({*cut[0]} - {0, 24})
            cu = torch.tensor([0, *starts, 24], dtype=torch.int32)
            for decay, delta in (("head", False), ("channel", False), ("head", True)):
                inputs, _ = recurrent(24, decay=decay, delta=delta, rows=1, state=False)
                inputs["decay"][:, starts] = -torch.inf

                def alone(cu=cu, **inputs):
                    gate = inputs.pop("decay")
                    gate = gate.masked_fill(gate.isinf(), 0)  # a start has nothing to forget
                    o, states = recurrence(**inputs, decay=gate, cu_seqlens=cu)
                    return o, states[-1:]

                for more in ({"exchange": "serial"}, {"form": "chunk"}, {"form": "parallel"}):
                    same(here, inputs, alone, partial(lasp2, mesh=here, **more))


@check
def lasp2_normalised(groups):
    for here in within(groups):
        for causal in (True, False):
            T = 5 * here.size
            inputs = {n: drawn(B, T, H, d).abs() for n, d in (("q", K), ("k", K), ("v", V))}

            def split(q, k, v, causal=causal, here=here):
                with parallel.sequence(here.group):
                    o, state = parallel.linear_attention(q, k, v, causal=causal)
                return o, *state

            def alone(q, k, v, causal=causal):
                o, state = linear_attention(q, k, v, causal=causal)
                return o, *state

            same(here, inputs, alone, split)


@check
def lasp2_scans(groups):
    for here in within(groups, (4, 3)):
        for cut in (None, *CUTS):
            for turns in (False, True):
                rows, cu = (2, None) if cut is None else (1, torch.tensor(cut, dtype=torch.int32))
                N = 2 if cut is None else len(cut) - 1
                inputs = {"x": drawn(rows, 24, 3), "decay": -drawn(rows, 24, 3).abs()}
                inputs["state"] = drawn(N, 3)
                if turns:
                    inputs = {n: torch.complex(t, torch.randn_like(t)) for n, t in inputs.items()}
                real = (lambda r: tuple(torch.view_as_real(t) for t in r)) if turns else tuple
                same(
                    here,
                    inputs,
                    lambda real=real, cu=cu, **x: real(scan(**x, cu_seqlens=cu)),
                    lambda real=real, cu=cu, here=here, **x: real(
                        lasp2_scan(**x, cu_seqlens=cu, mesh=here)
                    ),
                    shared=("state",),
                )


@check
def lasp2_traffic(groups):
    """One collective forward, one backward; B H K V elements to each other rank, whatever T is."""
    for here in within(groups):
        W = here.size
        for decay, delta, more in (
            (None, False, 0), ("constant", False, 0), ("head", False, H), ("channel", False, H * K),
            ("head", True, H * K * K),
        ):  # fmt: skip
            for C in (4, 8):
                inputs, shared = recurrent(C * W, decay=decay, delta=delta, state=False)
                x = {
                    n: None if t is None else (t if n in shared else part(t, here)).clone()
                    for n, t in inputs.items()
                }
                x = {n: None if t is None else t.requires_grad_() for n, t in x.items()}
                with counted() as (calls, sent):
                    o, _ = lasp2(**x, mesh=here)
                    o.sum().backward()
                assert calls == ["all_gather", "reduce_scatter"], calls
                size = (W - 1) * B * (H * K * V + more)
                assert list(sent.values()) == [size, size], (sent, size)


# --- softmax ------------------------------------------------------------------------------------


def attended(T, G=2, rows=B):
    return {"q": drawn(rows, T, H, K), "k": drawn(rows, T, G, K), "v": drawn(rows, T, G, V)}


def both(run, **options):
    return lambda **x: run(**x, return_lse=True, **options)


@check
def ring_every_layout(groups):
    for here in within(groups):
        for layout in ("contiguous", "zigzag", "striped"):
            for mask in (None, masks.causal()):
                if layout == "zigzag" and mask is None:
                    continue
                T = 6 * here.size
                index = layout_index(T, here.size, layout)
                same(
                    here,
                    attended(T),
                    both(attention, mask=mask),
                    lambda here=here, mask=mask, layout=layout, **x: ring_attention(
                        **x, mask=mask, layout=layout, mesh=here, return_lse=True
                    ),
                    index=index,
                    tokens=2,
                )


@check
def ring_lse_has_gradients(groups):
    here = next(within(groups, (4,)))
    x = {n: part(t, here).requires_grad_() for n, t in attended(16).items()}
    whole = {n: parallel.join(t.detach(), mesh=here).requires_grad_() for n, t in x.items()}
    _, lse = ring_attention(**x, mask=masks.causal(), return_lse=True, mesh=here)
    _, want = attention(**whole, mask=masks.causal(), return_lse=True)
    close(lse, part(want, here))
    lse.square().sum().backward()
    want.square().sum().backward()
    for name in ("q", "k"):
        close(x[name].grad, part(whole[name].grad, here), name)


@check
def consecutive_tokens(groups):
    """What mixers call: ring (dealt out anew), gather and ulysses; any mask; packed."""
    window = masks.causal() & (masks.window(5) | masks.sinks(2))
    for here in within(groups, (4, 3)):
        for run in (ring, gathered, ulysses):
            if run is ulysses and H % here.size:
                continue
            for mask in (None, masks.causal(), window):
                same(
                    here,
                    attended(24),
                    both(attention, mask=mask),
                    both(run, mask=mask, mesh=here),
                    tokens=2,
                )
            for i, cut in enumerate(CUTS):
                cu = torch.tensor(cut, dtype=torch.int32)
                mask = None if i == here.size % 3 else masks.causal()
                same(
                    here,
                    attended(24, rows=1),
                    both(attention, mask=mask, cu_seqlens=cu),
                    both(run, mask=mask, cu_seqlens=cu, mesh=here),
                    tokens=2,
                )


@check
def odd_shares_and_short_tails(groups):
    here = next(within(groups, (4,)))
    same(
        here,
        attended(4 * 5),
        both(attention, mask=masks.causal()),
        both(ring, mask=masks.causal(), mesh=here),
        tokens=2,
    )
    whole = attended(4 * 5 + 2)
    want = attention(**whole, mask=masks.causal())
    x = {n: parallel.split(t, fill=0.0, mesh=here) for n, t in whole.items()}
    for run in (ring, gathered, ulysses):
        o = parallel.join(run(**x, mask=masks.causal(), mesh=here), mesh=here)
        close(o[:, :22], want)


@check
def keys_that_stay_split(groups):
    """A new token reads shards of different lengths, one of them empty."""
    here = next(within(groups, (4,)))
    whole = attended(15)
    q = whole["q"][:, -1:]
    lengths = [6, 0, 2, 7]
    k, v = (whole[name].split(lengths, 1)[here.rank] for name in "kv")
    close(attend_shards(q, k, v, mesh=here), attention(q, whole["k"], whole["v"]))


@check
def ring_traffic(groups):
    """W - 1 messages of keys and values forward; as many backward, and W of their gradients."""
    for here in within(groups):
        W, C, G = here.size, 4, 2
        x = {n: part(t, here).clone().requires_grad_() for n, t in attended(C * W).items()}
        with counted() as (calls, sent):
            o = ring_attention(**x, mask=masks.causal(), layout="zigzag", mesh=here)
            kv = B * C * G * (K + V)
            assert calls == ["send_and_receive"] * (W - 1)
            assert sent["send_and_receive"] == (W - 1) * kv
            o.sum().backward()
        assert len(calls) == (W - 1) + (W - 1) + W
        assert sent["send_and_receive"] == (W - 1 + W - 1 + W) * kv


@check
def gather_traffic(groups):
    for here in within(groups):
        W, C, G = here.size, 4, 2
        x = {n: part(t, here).clone().requires_grad_() for n, t in attended(C * W).items()}
        with counted() as (calls, sent):
            gathered(**x, mask=masks.causal(), mesh=here).sum().backward()
        assert calls == ["all_gather", "reduce_scatter"]
        assert set(sent.values()) == {(W - 1) * B * C * G * (K + V)}


@check
def ulysses_traffic(groups):
    """Four exchanges forward, of (W-1)/W of a rank's q, k, v, o: they halve where W doubles."""
    T, found = 24, {}
    for here in within(groups, (4, 2)):
        W, G = here.size, 4
        x = {n: part(t, here).clone().requires_grad_() for n, t in attended(T, G).items()}
        with counted() as (calls, sent):
            o = ulysses(**x, mask=masks.causal(), mesh=here)
            assert calls == ["all_to_all"] * 4
            found[W] = sent["all_to_all"]
            assert found[W] == (W - 1) * B * T // W * (H * K + G * (K + V) + H * V) // W
            o.sum().backward()
        assert len(calls) == 8
        assert sent["all_to_all"] == 2 * found[W]
    if 2 in found:
        assert found[4] * 4 // 3 == found[2] * 2 // 1 // 2


@check
def ulysses_heads_keep_their_order(groups):
    for here in within(groups, (4, 2)):
        x = torch.arange(H, dtype=torch.float64).view(1, 1, H, 1).expand(2, 3, H, 2)
        x = (x + 10 * here.rank).clone().requires_grad_()
        there = scatter_heads(x, here)
        h = H // here.size
        assert there.shape == (2, 3 * here.size, h, 2)
        assert there[0, ::3, 0, 0].tolist() == [here.rank * h + 10 * r for r in range(here.size)]
        back = gather_heads(there, here)
        assert torch.equal(back, x)
        weight = torch.randn_like(x)
        (back * weight).sum().backward()
        assert torch.equal(x.grad, weight)


@check
def ulysses_fewer_key_heads_than_ranks(groups):
    here = next(within(groups, (4,)))
    for G in (4, 2, 1):
        same(
            here,
            attended(16, G),
            both(attention, mask=masks.causal()),
            both(ulysses, mask=masks.causal(), mesh=here),
            tokens=2,
        )


@check
def ulysses_recurrences(groups):
    for here in within(groups, (4, 2)):
        for decay, delta in ((None, False), ("constant", True), ("channel", False), ("head", True)):
            inputs, shared = recurrent(12, decay=decay, delta=delta, kv=2)
            same(
                here,
                inputs,
                recurrence,
                partial(ulysses_recurrence, mesh=here),
                shared=shared,
            )


# --- what goes wrong ----------------------------------------------------------------------------


def says(error, words, fn):
    with pytest.raises(error, match=re.escape(words)):
        fn()


@check
def shapes_that_differ(groups):
    here = next(within(groups, (4,)))
    T = 4 + (here.rank == 2)
    x = {"q": drawn(1, T, 4, 2), "k": drawn(1, T, 4, 2), "v": drawn(1, T, 4, 2)}
    for run in (lasp2, ring, gathered, ulysses, ulysses_recurrence):
        says(ValueError, "rank 2 has", lambda run=run: run(**x, mesh=here))
        says(ValueError, "[1, 5, 4, 2]", lambda run=run: run(**x, mesh=here))
    says(ValueError, "rank 2 has join", lambda: parallel.join(x["q"], mesh=here))
    says(
        ValueError,
        "rank 2 has shift_left",
        lambda: parallel.shift_left(x["q"][0, ..., 0], 0, mesh=here),
    )
    before = partial(Before, past=None, cu_seqlens=None, P=3, here=here)
    says(ValueError, "rank 2 has a short convolution", lambda: before(x["q"].flatten(2)))


@check
def arguments_that_do_not_fit(groups):
    here = next(within(groups, (4,)))
    q, k = drawn(1, 4, 4, 2), drawn(1, 4, 3, 2)
    says(ValueError, "must be a multiple of the 4 ranks", lambda: ulysses(k, k, k, mesh=here))
    says(ValueError, "multiple or a divisor of the 4", lambda: ulysses(q, k, k, mesh=here))
    says(ValueError, "use gather", lambda: ring_attention(q, q, q, masks.window(2), mesh=here))
    says(ValueError, "layout must be", lambda: ring_attention(q, q, q, layout="x", mesh=here))
    says(ValueError, "4 ranks, got 6", lambda: parallel.split(drawn(1, 6), mesh=here))
    says(ValueError, "one of ['ring'", parallel.sequence(here.group, attention="x").__enter__)
    with parallel.sequence(here.group) as set_:
        assert parallel.current() is set_
        with parallel.sequence(None):
            assert parallel.current() is None
        assert parallel.current() is set_
        mixer = subquad.create_mixer("longlora", dim=8, heads=2)
        says(ValueError, "LongLoRA splits no sequence", lambda: mixer(torch.randn(1, 4, 8)))
        mixer = subquad.create_mixer("gla", dim=8, heads=2)
        pad = torch.zeros(1, 4, dtype=torch.bool)
        says(ValueError, "padding must be None", lambda: mixer(torch.randn(1, 4, 8), padding=pad))


# --- mixers and models --------------------------------------------------------------------------


@check
def every_mixer_that_splits(groups):
    """Output, input gradient, weights' gradients and the state, from a state and without."""
    here = next(within(groups, (2,)), None)
    if here is None:
        return
    for row in ROWS:
        if row.grid is not None:
            continue
        mixer, T = row.build(), 16
        if not mixer.splits:
            continue
        C = row.options["dim"]
        torch.manual_seed(1)
        before, x, weight = drawn(1, 3, C), drawn(1, T, C), drawn(1, T, C)
        cuts = (None, torch.tensor([0, 3, 11, 16], dtype=torch.int32)) if row.packs else (None,)
        for cu in cuts:
            if cu is not None and not row.causal:
                continue
            for past in (False, True):
                if past and (cu is not None or not row.causal):
                    continue
                state = mixer(before)[1].detach() if past else None
                fresh = state.snapshot() if past else None
                whole, mine = x.clone().requires_grad_(), part(x, here).clone().requires_grad_()
                want, end = mixer(whole, state=state, cu_seqlens=cu)
                wanted = torch.autograd.grad((want * weight).sum(), [whole, *mixer.parameters()],
                                             allow_unused=True)  # fmt: skip
                with parallel.sequence(here.group):
                    got, mine_end = mixer(mine, state=fresh, cu_seqlens=cu)
                    grads = torch.autograd.grad(
                        (got * part(weight, here)).sum(), [mine, *mixer.parameters()],
                        allow_unused=True,
                    )  # fmt: skip
                where = f"{row.id} packed={cu is not None} past={past}"
                close(got, part(want, here), where)
                close(grads[0], part(wanted[0], here), where)
                for g, w, (name, _) in zip(grads[1:], wanted[1:], mixer.named_parameters()):
                    if w is not None:
                        total = torch.zeros_like(w) if g is None else g.clone()
                        dist.all_reduce(total, group=here.group)
                        close(total, w, f"{where} {name}")
                assert torch.equal(mine_end.seen, end.seen)
                assert set(mine_end.tensors) == set(end.tensors)
                for name in end.tensors:
                    close(mine_end[name], end[name], f"{where} state {name}")


def language_model(**options):
    torch.manual_seed(0)
    config = CausalLMConfig(
        vocab_size=18, dim=16, depth=3, layers="gated_deltanet softmax gla", max_positions=64,
        mixers={key: {"heads": 2} for key in ("gated_deltanet", "softmax", "gla")}, **options,
    )  # fmt: skip
    return CausalLM(config).double()


@check
def a_language_model(groups):
    """Loss and gradients from labels, packed and not, every kind of attention, checkpointed layers;
    a prompt read together, then decoded by each alone."""
    here = next(within(groups, (2,)), None)
    if here is None:
        return
    ids = torch.randint(0, 17, (1, 24))
    for attention_, recurrence_, cu, again in (
        ("ring", "lasp2", None, True),
        ("gather", "lasp2", torch.tensor([0, 7, 12, 24], dtype=torch.int32), False),
        ("ulysses", "ulysses", None, False),
    ):
        alone, split = language_model(), language_model()
        if again:
            split.gradient_checkpointing_enable()
        want = alone.train()(ids, labels=ids, cu_seqlens=cu)
        want.loss.backward()
        kinds = {"attention": attention_, "recurrence": recurrence_, "states": False}
        with parallel.sequence(here.group, **kinds):
            mine = parallel.split(ids)
            got = split.train()(mine, labels=mine, cu_seqlens=cu)
            got.loss.backward()
        close(got.logits, part(want.logits, here))
        close(parallel.total(got.loss.detach(), here), want.loss.detach())
        for (name, p), q in zip(split.named_parameters(), alone.parameters()):
            dist.all_reduce(p.grad, group=here.group)
            close(p.grad, q.grad, name)
    model = language_model().eval()
    with torch.no_grad():
        want = model(ids, use_cache=True)
        with parallel.sequence(here.group):
            got = model(parallel.split(ids), use_cache=True)
        assert got.past_key_values.tokens == 24
        step = torch.tensor([[3]])
        one = model(step, past_key_values=got.past_key_values).logits
        close(one, model(step, past_key_values=want.past_key_values).logits)
        with parallel.sequence(here.group, states=False):
            left = model(parallel.split(ids), use_cache=True).past_key_values
            says(ValueError, "state is empty", lambda: model(step, past_key_values=left))


@check
def training(groups):
    """Two groups of two processes that share sequences, sharded by FSDP2, beside one process."""
    task = create_task("mqar", vocab_size=18, length=14, pairs=2)
    sizes = {"steps": 2, "batch": 4, "eval_batches": 1, "save_every": 0, "clip": 0.5, "warmup": 1}
    alone, lone = language_model(), Ranks(0, 1, torch.device("cpu"))
    with mock.patch.object(Ranks, "join", return_value=lone):
        whole = train(alone, task, TrainConfig(**sizes), progress=lambda event: None)
    for sequence in (2, 4):  # the second does not divide the tokens
        split = language_model()
        options = TrainConfig(**sizes, sequence=sequence)
        found = train(split, task, options, progress=lambda event: None)
        for a, b in zip(found.history, whole.history, strict=True):
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a, b)
        assert found.evals[-1] == pytest.approx(whole.evals[-1], rel=1e-5)
        for (name, p), q in zip(split.named_parameters(), alone.parameters()):
            torch.testing.assert_close(
                checkpoint.whole(p.data), q.data, rtol=1e-4, atol=1e-5, msg=name
            )
