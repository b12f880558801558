"""The equalities that every policy must keep, written once. A policy joins with one row."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import subquad
from kit import poisoned
from subquad.caches.kv import KVLayer
from subquad.policies.base import Call, Policy, Site, Tally, create_policy

T, NEW, VOCABULARY = 75, 6, 97
STARTS = (0, 13, 64)  # columns of padding


@dataclass(frozen=True)
class Row:
    """One policy under test, on models of two layers, four query and two key heads.

    Attributes:
        key: in the catalogue.
        options: budgets so small that they bite at ``T`` tokens.
        whole: options that leave a prompt of ``T`` and ``NEW`` tokens as it is.
        keep: ``keep(policy, call) -> bool [B,H,T,S]``, the pairs attended to, by the sheet's
            definition and as plainly as possible; for a prompt and for one token more. None where
            ``reference`` says all.
        reference: ``reference(policy, call) -> o [B,T,H,V]``, where keys are also moved or mixed.
        pieces: lengths of the pieces in which the prompt may be fed without a change; () where
            the sheet promises nothing.
        name: of the row, where a policy has several.
        make: builds the policy instead of ``create_policy`` (for what was calibrated, or joined).
    """

    key: str
    options: Mapping[str, Any]
    whole: Mapping[str, Any] | None
    keep: Callable[[Any, Call], Tensor] | None = None
    reference: Callable[[Any, Call], Tensor] | None = None
    pieces: tuple[int, ...] = ()
    name: str = ""
    make: Callable[..., Policy] | None = None

    @property
    def id(self) -> str:
        return f"{self.key}-{self.name}" if self.name else self.key

    def build(self, options: Mapping[str, Any] | None = None) -> Policy:
        options = self.options if options is None else options
        return self.make(**options) if self.make else create_policy(self.key, **options)


def tiny(kind: str = "Llama", **changes: Any):
    """A random model in float64: "Llama", "Qwen3", "Mistral" or "Gemma3"."""
    import transformers

    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if kind == "Gemma3":
        config |= {"sliding_window": 512, "query_pre_attn_scalar": 8}
    text = "TextConfig" if kind == "Gemma3" else "Config"
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}{text}")(**config | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(made).eval().double()


def tokens(B: int = 1, length: int = T, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (B, length), generator=generator)


@contextmanager
def applied(model, policy: Policy):
    with torch.no_grad(), subquad.apply(model, policy) as on:
        yield on


def read(model, on, ids: Tensor, mask: Tensor | None = None, pieces=(), new: int = NEW):
    """Logits after the prompt and after each of ``new`` tokens more (the prompt's last, backwards),
    ``[B, 1 + new, vocabulary]``, and the cache."""
    cache, length, out = on.new_cache(), ids.shape[1], []
    sizes = [*pieces, *[length - sum(pieces)] * (sum(pieces) < length), *[1] * new]
    text = torch.cat([ids, ids.flip(1)[:, :new]], 1)
    real = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    done = 0
    for size in sizes:
        now = slice(done, done + size)
        done += size
        seen = None if real is None else real[:, :done]
        places = _places(seen, size)
        made = model(text[:, now], attention_mask=seen, position_ids=places, past_key_values=cache)
        if done >= length:
            out.append(made.logits[:, -1])
    return torch.stack(out, 1), cache


def _places(mask: Tensor | None, size: int) -> Tensor | None:
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)[:, -size:]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """A rotary embedding of halves, of base 100."""
    K = x.shape[-1]
    angle = positions[..., None] * 100.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def calls(policy: Policy, B: int = 1, prompt: int = T, H: int = 4, G: int = 2, K: int = 8):
    """A prompt's call and, once it has been attended to, those of tokens after it, by hand."""
    generator = torch.Generator().manual_seed(3)
    site = Site(index=1, layers=2, heads=H, kv_heads=G, head_dim=K, window=None)
    layer, seen = policy.layer(site), 0
    for size in (prompt, 1, 1, 1):
        q, k, v = (
            torch.randn(B, size, heads, K, generator=generator, dtype=torch.float64)
            for heads in (H, G, G)
        )
        layer.update(k.transpose(1, 2), v.transpose(1, 2))
        positions = torch.arange(seen, seen + size).expand(B, -1)
        seen += size
        yield Call(site, q, k, v, layer, K**-0.5, None, positions, rotate, Tally())


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Dense attention over the pairs ``keep [B,H,T,S]``."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~keep, -torch.inf).softmax(-1), v)


def check_whole(row: Row) -> None:
    """Budgets that cover the text change nothing."""
    if row.whole is None:
        pytest.skip("no budget makes it dense")
    model, ids = tiny(), tokens(2 if row.build().batched else 1)
    with applied(model, Policy()) as on:
        want, _ = read(model, on, ids)
    with applied(model, row.build(row.whole)) as on:
        got, _ = read(model, on, ids)
    close(got, want)


def check_bites(row: Row) -> None:
    """The small budgets do change something, so that what follows is no test of dense attention."""
    model, ids = tiny(), tokens()
    with applied(model, Policy()) as on:
        want, _ = read(model, on, ids)
    with applied(model, row.build()) as on:
        got, _ = read(model, on, ids)
    assert (got - want).abs().max() > 1e-6


def check_definition(row: Row) -> None:
    """A prompt and tokens after it against the sheet's definition on all keys, and their pairs
    counted right."""
    policy = row.build()
    past: list[tuple[Tensor, Tensor]] = []
    for call in calls(policy, B=2):
        past.append((call.k, call.v))
        k, v = (torch.cat(x, 1) for x in zip(*past))
        o = policy.decode(call) if call.q.shape[1] == 1 else policy.prefill(call)
        full = _with_past(call, k, v)
        if row.reference is not None:
            close(o, row.reference(policy, full))
        if row.keep is not None:
            keep = row.keep(policy, full)
            if row.reference is None:
                close(o, masked(call.q, k, v, keep, call.scale))
            pairs = call.tally.prefill if call.q.shape[1] > 1 else call.tally.decode
            assert pairs.attended == int(keep.sum())
        if call.q.shape[1] > 1:
            policy.settle(call)


def _with_past(call: Call, k: Tensor, v: Tensor) -> Call:
    """The call over a plain layer that holds every key."""
    layer = KVLayer()
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    return dataclasses.replace(call, layer=layer, tally=None)


def check_pieces(row: Row) -> None:
    """A prompt in pieces is the prompt at once."""
    if not row.pieces:
        pytest.skip("the pieces choose for themselves")
    model, ids = tiny(), tokens(2)
    with applied(model, row.build()) as on:
        want, _ = read(model, on, ids)
        got, cache = read(model, on, ids, pieces=row.pieces)
    close(got, want)
    assert cache.get_seq_length() == T + NEW


def check_padding(row: Row) -> None:
    """Left padding changes nothing, for prompt and answer; or a batch is refused."""
    policy, model, ids = row.build(), tiny(), tokens(3)
    with applied(model, policy) as on:
        if not policy.batched:
            with pytest.raises(ValueError, match="takes one sequence at a time, got 3"):
                read(model, on, ids)
            return
        mask = torch.ones_like(ids)
        for b, start in enumerate(STARTS):
            mask[b, :start] = 0
        got, _ = read(model, on, ids, mask)
        for b, start in enumerate(STARTS):
            want, _ = read(model, on, ids[b : b + 1, start:])
            close(got[b : b + 1], want)


def check_beams(row: Row) -> None:
    """Rows of the cache reordered = rows of the input reordered; a copy lives on its own."""
    if not row.build().batched:
        pytest.skip("one sequence at a time")
    model, ids, more, order = tiny(), tokens(3), tokens(3, 1, seed=5), torch.tensor([2, 0, 0])
    with applied(model, row.build()) as on:
        _, cache = read(model, on, ids)
        kept = copy.deepcopy(cache)
        want = model(more, past_key_values=copy.deepcopy(cache)).logits
        cache.reorder_cache(order)
        close(model(more[order], past_key_values=cache).logits, want[order])
        close(model(more, past_key_values=kept).logits, want)


def check_generate(row: Row) -> None:
    """``generate`` runs, and a second turn on its cache continues the text."""
    model, ids = tiny(), tokens()
    with applied(model, row.build()) as on:
        cache = on.new_cache()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert cache.get_seq_length() == out.shape[1] - 1
        turn = torch.cat([out, tokens(1, 9, seed=2)], 1)
        again = model.generate(turn, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert again.shape[1] == turn.shape[1] + 4
        assert cache.get_seq_length() == again.shape[1] - 1


def check_memory(row: Row) -> None:
    """Nothing depends on memory that nobody wrote, and ``nbytes`` is what the layers hold."""
    model, ids = tiny(), tokens(2 if row.build().batched else 1)
    with applied(model, row.build()) as on:
        want, _ = read(model, on, ids)
        with poisoned():
            got, cache = read(model, on, ids)
        close(got, want)
        assert cache.nbytes == sum(layer.nbytes for layer in cache.layers) > 0


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
