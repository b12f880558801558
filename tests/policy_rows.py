"""The table of policies under test: a policy joins with one row, and its definition in a few lines.

A definition takes the policy and a call over all keys, and says which pairs are attended to,
``bool [B,H,T,S]``.
"""

import torch

import cache_definitions
import duo_definition
import hip_definition
import infini_definition
import longheads_definition
import prefill_definitions
from policy_kit import Row, masked, rotate
from subquad.policies.block_topk import BlockTopK
from subquad.policies.quest import Quest


def places(call):
    """Key positions of queries ``[T,1]`` and of keys ``[S]``."""
    T, S = call.q.shape[1], call.layer.keys.shape[1]
    return torch.arange(S - T, S)[:, None], torch.arange(S)


def everywhere(call, keep):
    """``[T,S]`` for every row and head."""
    return keep.expand(call.q.shape[0], call.q.shape[2], -1, -1)


def streaming(policy, call):
    p, j = places(call)
    return everywhere(call, (j <= p) & ((j < policy.sinks) | (p - j < policy.window)))


def streaming_in_cache(policy, call):
    """Token by token: the kept keys are numbered anew, and the query is the last of them."""
    keep, outs = streaming(policy, call), []
    for i in range(call.q.shape[1]):
        kept = keep[0, 0, i].nonzero()[:, 0]
        place = torch.arange(len(kept)).expand(call.q.shape[0], -1)
        k, v = rotate(call.layer.keys[:, kept], place), call.layer.values[:, kept]
        q = rotate(call.q[:, i : i + 1], place[:, -1:])
        everything = torch.ones(1, 1, 1, len(kept), dtype=torch.bool)
        outs.append(masked(q, k, v, everything, call.scale))
    return torch.cat(outs, 1)


def block_topk(policy, call):
    if call.q.shape[1] == 1:
        return streaming_all(call)
    (B, T, H, _), b = call.q.shape, policy.block
    n = -(-T // b)
    keys = call.layer.keys.repeat_interleave(H // call.layer.keys.shape[2], 2)
    pad = torch.zeros(B, n * b - T, *keys.shape[2:], dtype=keys.dtype)
    q, k = (torch.cat([x, pad], 1).view(B, n, b, H, -1).mean(2) for x in (call.q, keys))
    score = torch.einsum("bmhk,bnhk->bhmn", q, k)
    if policy.variant == "frontier":
        for m in range(n):
            score[:, :, m, max(m - 1, 0) : m + 1] = torch.inf
    score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    if policy.variant == "frontier":
        score[..., 0] = torch.inf
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(-1, score.topk(min(policy.topk, n), -1).indices, True)
    kept = kept.repeat_interleave(b, 2).repeat_interleave(b, 3)[..., :T, :T]
    p, j = places(call)
    return kept & (j <= p)


def quest(policy, call):
    if call.q.shape[1] > 1:
        return streaming_all(call)
    B, H, (p, j) = call.q.shape[0], call.q.shape[2], places(call)
    page, last = j // policy.page, int(p) // policy.page
    keep = torch.zeros(B, H, 1, len(j), dtype=torch.bool)
    n = policy.budget // policy.page
    for b in range(B):
        bounds = torch.zeros(H, last + 1)
        for h in range(H):
            scores = call.q[b, 0, h] * call.layer.keys[b, :, h // 2]
            bounds[h] = torch.stack(
                [scores[page == c].amax(0).sum() for c in range(last + 1)]
            )  # fmt: skip
        if policy.variant == "frontier":
            if policy.share:
                bounds = bounds.view(2, 2, -1).sum(1).repeat_interleave(2, 0)
            bounds[:, last] = torch.inf
            n = policy.budget // policy.page + 1
        for h in range(H):
            keep[b, h, 0] = torch.isin(page, bounds[h].topk(min(max(n, 3), last + 1)).indices)
    return keep


def streaming_all(call):
    p, j = places(call)
    return everywhere(call, j <= p)


def dense_decode(definition):
    """A definition of prompts alone: tokens after them see everything."""
    return lambda policy, call: (
        definition(policy, call) if call.q.shape[1] > 1 else streaming_all(call)
    )


SLASH = {"vertical": 6, "slash": 9, "last_q": 12, "sinks": 2, "local": 5, "block": 8}
FLEX = {"block": 4, "unit": 4, "min_budget": 9}

ROWS = [
    Row(
        "vertical_slash",
        {**SLASH, "variant": "frontier"},
        {"variant": "frontier", "vertical": 100, "slash": 100},
        dense_decode(prefill_definitions.vertical_slash),
    ),
    Row(
        "vertical_slash",
        {**SLASH, "local": 3, "vertical": 35, "slash": 4, "block": 3},
        {"vertical": 100, "slash": 4},
        dense_decode(prefill_definitions.vertical_slash),
        name="minference",
    ),
    Row(
        "flexprefill",
        {**FLEX, "gamma": 0.6, "tau": 0.0},
        {"min_budget": 96},
        dense_decode(prefill_definitions.flexprefill),
    ),
    Row(
        "flexprefill",
        {**FLEX, "gamma": 0.5, "tau": 0.3},
        {"block": 8, "unit": 8, "gamma": 1.0, "min_budget": 0, "tau": 0.0},
        dense_decode(prefill_definitions.flexprefill),
        name="aware",
    ),
    Row(
        "flexprefill",
        {
            "variant": "frontier",
            "gamma": 0.4,
            "min_budget": 6,
            "last_q": 20,
            "sinks": 2,
            "local": 5,
            "slash_block": 8,
        },
        {"variant": "frontier", "min_budget": 100},
        dense_decode(prefill_definitions.flex_frontier),
        name="frontier",
    ),
    Row(
        "streaming_llm",
        {"sinks": 3, "window": 17},
        {"sinks": 4, "window": 100},
        streaming,
        streaming_in_cache,
        pieces=(30, 2, 1, 20),
    ),
    Row(
        "streaming_llm",
        {"sinks": 3, "window": 17, "position": "absolute"},
        {"sinks": 4, "window": 100, "position": "absolute"},
        streaming,
        pieces=(30, 2, 1, 20),
        name="absolute",
    ),
    Row(
        "streaming_llm",
        {"sinks": 0, "window": 9},
        {"sinks": 0, "window": 100},
        streaming,
        streaming_in_cache,
        pieces=(70,),
        name="window",
    ),
    Row(
        "quest",
        {"budget": 16, "page": 4, "dense_layers": 0},
        {"budget": 96, "page": 16, "dense_layers": 1},
        quest,
        pieces=(30, 2, 20),
    ),
    Row(
        "quest",
        {"budget": 12, "page": 4, "variant": "frontier"},
        {"budget": 96, "variant": "frontier"},
        quest,
        pieces=(64,),
        name="frontier",
    ),
    Row(
        "quest",
        {"budget": 12, "page": 4, "variant": "frontier", "share": False},
        {"budget": 96, "variant": "frontier", "share": False},
        quest,
        name="alone",
    ),
    Row(
        "quest",
        {"budget": 16},
        {"budget": 96},
        name="joined",
        make=lambda budget: (
            BlockTopK(block=8, topk=max(3, budget // 4))
            + Quest(budget=budget, page=4, dense_layers=0)
        ),
    ),
    Row("block_topk", {"block": 8, "topk": 3}, {"topk": 64}, block_topk, pieces=(32, 24)),
    Row(
        "block_topk",
        {"block": 8, "topk": 2, "variant": "minference"},
        {"variant": "minference", "topk": 64},
        block_topk,
        pieces=(32, 24),
        name="minference",
    ),
    *cache_definitions.ROWS,
    *hip_definition.ROWS,
    *infini_definition.ROWS,
    *duo_definition.ROWS,
    *longheads_definition.ROWS,
]
