"""LongHeads token by token, as its paper writes it."""

import torch

from policy_kit import Row, rotate


def _at(x, positions):
    """``x [S,K]`` rotated."""
    return rotate(x[None, :, None], positions[None])[0, :, 0]


def summary(q, k, v, scale):
    """The key of one chunk and head."""
    place = torch.arange(len(k))
    q, k = _at(q, place), _at(k, place)
    said = ((q @ k.T * scale).softmax(-1) @ v).mean(0)
    return (said @ k.T * scale).softmax(-1) @ k


class LongHeadsDefinition:
    """Remembers the queries of the text, which summaries need."""

    def __init__(self):
        self.chosen = []

    def __call__(self, policy, call):
        (B, T, H, _), (S, G) = call.q.shape, call.layer.keys.shape[1:3]
        self.q = call.q if S == T else torch.cat([self.q, call.q], 1)
        o = torch.zeros(*call.q.shape[:3], call.v.shape[3], dtype=call.v.dtype)
        self.pairs = 0
        for b in range(B):
            for h in range(H):
                g = h * G // H
                text = self.q[b, :, h], call.layer.keys[b, :, g], call.layer.values[b, :, g]
                for i in range(T):
                    o[b, i, h] = self._token(policy, *text, S - T + i, T == 1, call.scale)
        return o

    def _token(self, policy, q, k, v, t, answer, scale):
        l, m, r = policy.chunk, t // policy.chunk, t % policy.chunk
        parity = policy.exclude_self
        after = policy.length if policy.after is None else policy.after
        if t < after - (answer and parity):
            place = torch.arange(t + 1)
            return self._read(q[t], k[place], v[place], place, scale)
        many, forced = policy.chunks, {0, m - 1, m}
        if answer and parity and r == l - 1:
            many, forced = many - 1, {0, m}
        forced = {c for c in forced if c >= 0}
        score = {
            c: float(q[t] @ summary(*(x[c * l : c * l + l] for x in (q, k, v)), scale))
            for c in range(m - 1)
            if c not in forced
        }
        if answer and parity and r == l - 1 and m > 1:
            own = slice((m - 1) * l, m * l)
            score[m - 1] = float(q[t] @ summary(q[own], k[own], v[own], scale))
        best = sorted(score, key=score.get, reverse=True)[: max(many - len(forced), 0)]
        chosen = sorted(forced | set(best))
        self.chosen.append(tuple(chosen))
        tokens = [j for c in chosen for j in range(c * l, c * l + l) if j <= t]
        if parity and not answer:
            tokens = [j for j in tokens if j < t]
        place = torch.arange(len(tokens))
        own = len([j for c in chosen[:-1] for j in range(l)]) + r
        return self._read(q[t], k[tokens], v[tokens], place, scale, own)

    def _read(self, q, k, v, place, scale, own=None):
        self.pairs += len(place)
        own = place[-1:] if own is None else torch.tensor([own])
        weights = (_at(q[None], own) @ _at(k, place).T * scale).softmax(-1)
        return (weights @ v)[0]


ROWS = [
    Row(
        "longheads",
        {"chunk": 5, "length": 25},
        {"chunk": 16, "length": 128},
        reference=LongHeadsDefinition(),
        pieces=(30, 2, 20),
    ),
    Row(
        "longheads",
        {"chunk": 4, "length": 20, "after": 0},
        None,  # the model's rotations are no finer than float32: see test_longheads.py
        reference=LongHeadsDefinition(),
        pieces=(1, 37, 2),
        name="soon",
    ),
    Row(
        "longheads",
        {"chunk": 4, "length": 16, "exclude_self": True},
        {"chunk": 16, "length": 128, "exclude_self": True},
        reference=LongHeadsDefinition(),
        name="parity",
    ),
]
