"""What DuoAttention's heads see: piece by piece, the first piece whole."""

import torch

from policy_kit import Row


class DuoDefinition:
    def __call__(self, policy, call):
        (B, T, H, _), (S, G) = call.q.shape, call.layer.keys.shape[1:3]
        keep = (torch.arange(S) <= torch.arange(S - T, S)[:, None]).expand(B, H, T, S).clone()
        gates = torch.tensor(policy.gates[call.site.index])
        for h in range(H):
            if gates[h * G // H] > 0.5:
                continue
            for i in range(T):
                t = S - T + i
                start = S - T + i // (policy.chunk or T) * (policy.chunk or T)
                if start == 0:
                    continue
                j = torch.arange(S)
                keep[:, h, i] &= (j < policy.sinks) | ((j >= start - policy.window) & (j <= t))
        return keep


_GATES = {"gates": ((1.0, 0.0), (0.1, 0.9)), "sinks": 2, "window": 5}
_WHOLE = {"gates": ((1.0, 0.0), (0.1, 0.9)), "sinks": 4, "window": 90}

ROWS = [
    Row("duo", _GATES, _WHOLE, DuoDefinition()),
    Row(
        "duo",
        {**_GATES, "chunk": 16},
        {**_WHOLE, "chunk": 16},
        DuoDefinition(),
        pieces=(32, 16),
        name="pieces",
    ),
]
