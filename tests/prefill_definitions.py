"""Vertical-slash attention and FlexPrefill as defined: loops over heads, rows and lists."""

import torch


def _probabilities(q, k, scale):
    """The last queries ``q [L,K]`` over all keys ``k [S,K]``: ``[L,S]`` in float32."""
    L, S = len(q), len(k)
    scores = (q.float() @ k.float().T) * scale
    hidden = torch.arange(S)[None] > torch.arange(S - L, S)[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _diagonals(p):
    L, S = p.shape
    out = torch.zeros(S)
    for i in range(L):
        t = S - L + i
        out[: t + 1] += p[i, : t + 1].flip(0)
    return out


def _heads(call):
    """(row, head, q [T,K], k [S,K]) of every head."""
    share = call.q.shape[2] // call.layer.keys.shape[2]
    for b in range(call.q.shape[0]):
        for h in range(call.q.shape[2]):
            yield b, h, call.q[b, :, h], call.layer.keys[b, :, h // share]


def slash_rows(T, columns, distances, M):
    """Step 5 of the sheet: ``(starts, columns)`` of every row of M queries, entry by entry."""
    for m in range(-(-T // M)):
        end, ranges, starts = M * (m + 1), None, []
        for d in sorted((d for d in distances if d < end), reverse=True):
            e = max(end - d, M)
            if ranges is None or e > ranges + M:
                starts.append(e - M)
                ranges = e
            elif e > ranges:
                starts.append(ranges)
                ranges += M
        covered = {j for s in starts for j in range(s, s + M)}
        yield starts, [v for v in sorted(columns) if v not in covered and v < (ranges or 0)]


def _slashes(call, pick, M):
    """``pick(q, k) -> (columns, distances)`` of a head, as the pairs that its rows see."""
    B, T, H, _ = call.q.shape
    keep = torch.zeros(B, H, T, T, dtype=torch.bool)
    for b, h, q, k in _heads(call):
        for m, (starts, single) in enumerate(slash_rows(T, *pick(q, k), M)):
            rows = slice(m * M, (m + 1) * M)
            for s in starts:
                keep[b, h, rows, s : s + M] = True
            keep[b, h, rows, single] = True
    return keep & torch.ones(T, T).tril().bool()


def vertical_slash(policy, call):
    own = policy.settings

    def pick(q, k):
        p = _probabilities(q[-own.last_q :], k, call.scale)
        vertical, slash = p.sum(0), _diagonals(p)
        v = min(max(policy.vertical, own.least[0]), len(k))
        s = min(max(policy.slash, own.least[1]), len(k))
        vertical[: min(own.sinks, v)], slash[: min(own.local, s)] = torch.inf, torch.inf
        return vertical.topk(v).indices.tolist(), slash.topk(s).indices.tolist()

    return _slashes(call, pick, policy.block)


def flex_frontier(policy, call):
    def pick(q, k):
        p = _probabilities(q[-policy.last_q :], k, call.scale)
        found = []
        lasts = min(policy.last_q, len(q))
        for x, forced in ((p.sum(0), policy.sinks), (_diagonals(p), policy.local)):
            x = x / lasts
            n = int((x.sort(descending=True).values.cumsum(0) <= policy.gamma).sum()) + 1
            n = min(max(n, policy.min_budget, forced), len(x))
            x[:forced] = torch.inf
            found.append(x.topk(n).indices.tolist())
        return found

    return _slashes(call, pick, policy.slash_block)


def flexprefill(policy, call):
    B, T, H, _ = call.q.shape
    keep = torch.stack([flex_blocks(policy, q, k, call.scale) for _, _, q, k in _heads(call)])
    b = policy.block
    keep = keep.repeat_interleave(b, 1).repeat_interleave(b, 2)[:, :T, :T].view(B, H, T, T)
    return keep & torch.ones(T, T).tril().bool()


def flex_blocks(policy, q, k, scale):
    """Steps 1 to 8 of the sheet for one head: bool ``[n,n]`` over blocks."""
    T, b = len(q), policy.block
    n = -(-T // b)
    least = -(-policy.min_budget // b)
    if max(2 * b, least * b) >= T:
        return torch.ones(n, n).tril().bool()
    most = n if policy.max_budget is None else min(-(-policy.max_budget // b), n)
    p = _probabilities(q[-b:], k, scale)
    vertical, slash = p.mean(0), _diagonals(p).flip(0) / b  # index p of the sheet: T - 1 - distance

    def cover(x):
        count = int((x.sort(descending=True).values.cumsum(0) <= policy.gamma).sum()) + 1
        return min(max(count // policy.unit + 1, least), most)

    nv, ns = cover(vertical), cover(slash)
    pad = torch.zeros(n * b - T)
    vertical, slash = (torch.cat([x, pad]).view(n, b).sum(1) for x in (vertical, slash))
    blocks = [slice(i * b, (i + 1) * b) for i in range(n)]
    pooled_k = torch.stack([k[i].float().mean(0) for i in blocks])
    pooled_q = torch.stack([q[i].float().mean(0) for i in blocks])
    guess = ((q[-b:].float().mean(0) * scale) @ pooled_k.T).softmax(0)
    middle = (guess + vertical) / 2
    gap = torch.xlogy(guess, guess / middle).sum() + torch.xlogy(vertical, vertical / middle).sum()
    aware = (0.5 * gap).clamp_min(0).sqrt() < policy.tau
    if aware:
        nv = ns = max(least, 1)  # the first block and the diagonal are forced
    vertical[0], slash[n - 1] = torch.inf, torch.inf
    columns = vertical.topk(nv).indices.tolist()
    distances = [n - 1 - i for i in slash.topk(ns).indices.tolist()]
    keep = torch.zeros(n, n, dtype=torch.bool)
    for m in range(n):
        keep[m, [c for c in columns if c <= m]] = True
        keep[m, [m - d for d in distances if d <= m]] = True
    if aware:
        score = (pooled_q * scale) @ pooled_k.T
        score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        ordered = score.flatten().sort(descending=True)
        for i, mass in zip(ordered.indices.tolist(), ordered.values.cumsum(0).tolist()):
            if mass > policy.gamma * n:
                break
            keep[i // n, i % n] |= i % n <= i // n
    return keep
