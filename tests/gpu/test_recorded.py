"""A CausalLM's tokens, recorded and repeated, on a GPU."""

import pytest
import torch

from kit import close
from subquad.caches import StateCache
from test_recorded import models

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", models())
@torch.no_grad()
def test_repeated(make, dtype):
    """As launched one by one, also where the room ends and after text that was not recorded."""
    model = make().to("cuda", dtype)
    ids, outs, graphs = torch.randint(31, (2, 90), device="cuda"), [], set()
    for recorded in (False, True):
        cache, out = StateCache(), []
        model(input_ids=ids[:, :40], past_key_values=cache)
        step = model.steps(cache, room=9)
        assert step.repeats
        for t in range(40, 90):
            if t == 70:
                model(input_ids=ids[:, :3], past_key_values=cache)
            one = ids[:, t : t + 1]
            logits = step(one) if recorded else model(input_ids=one, past_key_values=cache).logits
            out.append(logits.view(2, -1).clone())
            graphs.add(step._graph)
        outs.append(torch.stack(out).double())
    assert len(graphs) > 4
    scale = outs[0].abs().max()
    close(outs[1] / scale, outs[0] / scale, 1e-4 if dtype == torch.float32 else 3e-2)
