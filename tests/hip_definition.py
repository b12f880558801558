"""HiP's search as its paper's pseudo-code has it: one row, one head, plain numbers."""

import torch

from policy_kit import Row


def search(q, k, visible, budget, c, window, center=False):
    """The blocks for the queries ``q [m,K]`` (those that are asked) among ``k [S,K]``."""
    end, n = min(max(visible - window, 0), len(k)), -(-budget // c)
    B = -(-end // c)
    if end <= budget:
        return list(range(B))
    nodes = [(int(B / n * i), int(B / n * (i + 1)) - int(B / n * i)) for i in range(n)]
    span = B / n
    while span > 1:
        halves = []
        for a, g in nodes:
            left = int(0.5 * g)
            halves += [(a, left), (a + left, g - left)]
        scored = []
        for a, g in halves:
            block = a + g // 2 if center else a
            keys = k[block * c : block * c + c]
            scored.append(((q @ keys.T).max().item() if g else -32000.0, a, g))
        nodes = [(a, g) for _, a, g in sorted(scored, key=lambda x: -x[0])[:n]]
        span /= 2
    return sorted(a for a, _ in nodes)


class HiPDefinition:
    """Who sees whom; of an answer, what the last search found."""

    def __call__(self, policy, call):
        (B, T, H, _), (S, G) = call.q.shape, call.layer.keys.shape[1:3]
        if T == 1 and not policy.answers:
            return torch.ones(B, H, 1, S, dtype=torch.bool)
        rows = 1 if T == 1 else policy.rows
        if T > 1:
            self.age = policy.refresh
        self.age += 1
        fresh = T > 1 or self.age > policy.refresh
        if T == 1 and fresh:
            self.age, self.found = 1, {}
        keep = torch.zeros(B, H, T, S, dtype=torch.bool)
        for b in range(B):
            for h in range(H):
                group = [h]
                if policy.share:
                    group = [i for i in range(H) if i * G // H == h * G // H]
                k = call.layer.keys[b, :, h * G // H]
                for m in range(-(-T // rows)):
                    q = call.q[b, m * rows : (m + 1) * rows, group]
                    asked = q[1::2] if len(q) > 1 else q
                    visible = (m + 1) * rows + S - T
                    if fresh:
                        found = search(
                            asked.flatten(0, 1), k, visible, policy.budget, policy.block,
                            policy.window, policy.representative == "center",
                        )  # fmt: skip
                    if T == 1:
                        found = self.found.setdefault((b, h), found if fresh else None)
                    for t in range(m * rows, min((m + 1) * rows, T)):
                        self._row(keep[b, h, t], t + S - T, found, policy, T == 1)
        return keep

    def _row(self, row, t, found, policy, answer):
        window = policy.window + (self.age - 1 if answer else 0)
        for block in found:
            row[block * policy.block : (block + 1) * policy.block] = True
        row[max(t + 1 - window, 0) :] = True
        row[: policy.sinks] = True
        row[t + 1 :] = False


_BITES = {"budget": 12, "block": 1, "rows": 8, "window": 9, "sinks": 3, "dense_layers": 0}

ROWS = [
    Row("hip", _BITES, {"budget": 200}, HiPDefinition(), pieces=(32, 24)),
    Row(
        "hip",
        {**_BITES, "block": 3, "share": True, "representative": "center"},
        {"budget": 200, "dense_layers": 1, "share": True},
        HiPDefinition(),
        pieces=(8, 64),
        name="shared",
    ),
    Row(
        "hip",
        {**_BITES, "block": 2, "refresh": 2, "sinks": 0},
        {"budget": 200, "dense_layers": 0, "refresh": 4},
        HiPDefinition(),
        name="refreshed",
    ),
    Row(
        "hip",
        {**_BITES, "block": 2, "answers": False},
        {"budget": 200, "answers": False},
        HiPDefinition(),
        pieces=(32, 24),
        name="prompts",
    ),
]
