"""What policies that shape the cache keep, written plainly: ``bool [B,H,T,S]`` over all keys.

What a prompt's last tokens vote for holds for the tokens that follow, so a definition remembers the
last prompt it saw.
"""

import torch
import torch.nn.functional as F

from policy_kit import Row


def _spread(x, H):
    """``[B,S,G,K]`` to ``[B,S,H,K]``."""
    return x.repeat_interleave(H // x.shape[2], 2)


def _causal(T, S):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def _votes(policy, call, groups):
    """Weights of the last tokens ``[B,groups,r,w,S]``."""
    (_, T, H, _), w = call.q.shape, policy.window
    k = _spread(call.layer.keys, H)
    score = torch.einsum("bthk,bshk->bhts", call.q[:, -w:], k) * call.scale
    hidden = ~_causal(min(w, T), T)
    return score.masked_fill(hidden, -torch.inf).softmax(-1).unflatten(1, (groups, -1))


def snapkv_sets(policy, call):
    """For each row and cache head the kept tokens of a prompt."""
    T, w, C = call.q.shape[1], policy.window, policy.capacity
    groups = call.q.shape[2] if policy.share == "none" else call.layer.keys.shape[2]
    pool = F.avg_pool1d if policy.pool == "avg" else F.max_pool1d
    votes = _votes(policy, call, groups).sum(-2)
    votes = votes.amax(2) if policy.share == "max" else votes.mean(2)
    if policy.variant == "frontier":
        score = pool(votes, policy.kernel, 1, policy.kernel // 2)
        score[..., -policy.local :] = torch.inf
        score[..., : policy.prefix] = torch.inf
        return [[row.topk(C).indices.tolist() for row in rows] for rows in score]
    score = pool(votes[..., : T - w], policy.kernel, 1, policy.kernel // 2)
    last = list(range(T - w, T))
    return [[row.topk(C - w).indices.tolist() + last for row in rows] for rows in score]


def ada_sets(policy, call):
    T, w, f = call.q.shape[1], policy.window, policy.floor
    groups = call.q.shape[2] if policy.share == "none" else call.layer.keys.shape[2]
    pool = F.avg_pool1d if policy.pool == "avg" else F.max_pool1d
    weights = _votes(policy, call, groups)
    out = []
    for row in weights:
        if policy.variant == "frontier":
            votes = row.amax(2).amax(1)
            score = pool(votes, policy.kernel, 1, policy.kernel // 2)
            score[..., -policy.local :] = torch.inf
            score[..., : policy.prefix] = torch.inf
            least = max(int(policy.capacity * f), policy.local + policy.prefix)
            kept = [set(s.topk(least).indices.tolist()) for s in score]
            left = sorted(
                ((float(score[h, t]), h, t) for h in range(groups) for t in range(T)), reverse=True
            )
            left = [(h, t) for _, h, t in left if t not in kept[h]]
            for h, t in left[: groups * (policy.capacity - least)]:
                kept[h].add(t)
            out.append([sorted(s) for s in kept])
            continue
        votes = row.mean(2)
        votes = votes.amax(1) if policy.share == "max" else votes.mean(1)
        score = pool(votes[..., : T - w], policy.kernel, 1, policy.kernel // 2)
        budget = policy.budget(call.site)
        best = sorted(
            ((float(score[h, t]), h) for h in range(groups) for t in range(T - w)), reverse=True
        )
        count = [sum(h == own for _, own in best[: groups * budget]) for h in range(groups)]
        sizes = [round(c * (1 - f) + int(budget * f)) for c in count]
        last = list(range(T - w, T))
        out.append([s.topk(n).indices.tolist() + last for s, n in zip(score, sizes)])
    return out


class Remembered:
    """A prompt sees all that came before; what follows sees what ``sets`` chose of the prompt."""

    def __init__(self, sets):
        self.sets = sets

    def __call__(self, policy, call):
        (B, T, H, _), S = call.q.shape, call.layer.keys.shape[1]
        keep = _causal(T, S).expand(B, H, T, S).clone()
        if T > 1:
            self.prompt, self.kept = S, self.sets(policy, call)
            return keep
        for b in range(B):
            for h in range(H):
                kept = self.kept[b][h * len(self.kept[b]) // H]
                old = torch.zeros(self.prompt, dtype=torch.bool)
                old[kept] = True
                keep[b, h, :, : self.prompt] &= old
        return keep


_SNAP = {"capacity": 24, "window": 6, "kernel": 3}
_FRONTIER = {"variant": "frontier", "capacity": 24, "window": 9, "kernel": 5, "local": 6}

ROWS = [
    Row("snapkv", _SNAP, {"capacity": 100}, Remembered(snapkv_sets)),
    Row(
        "snapkv",
        {**_SNAP, "share": "none", "pool": "max"},
        {"capacity": 100, "share": "none"},
        Remembered(snapkv_sets),
        name="heads",
    ),
    Row(
        "snapkv",
        {**_SNAP, "pieces": True},
        {"capacity": 100, "pieces": True},
        Remembered(snapkv_sets),
        pieces=(30, 2, 20),
        name="pieces",
    ),
    Row("snapkv", _FRONTIER, {"capacity": 200}, Remembered(snapkv_sets), name="frontier"),
    Row("ada_snapkv", _SNAP, {"capacity": 100}, Remembered(ada_sets)),
    Row(
        "ada_snapkv",
        {**_SNAP, "share": "none", "floor": 0.2, "pyramid": 4},
        {"capacity": 200, "pyramid": 2},
        Remembered(ada_sets),
        name="pyramid",
    ),
    Row(
        "ada_snapkv",
        {**_FRONTIER, "pieces": True},
        {"variant": "frontier", "capacity": 200},
        Remembered(ada_sets),
        pieces=(30, 2, 20),
        name="frontier",
    ),
]
