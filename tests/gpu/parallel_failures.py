"""Two ranks of which the second fails; what the first says goes to stdout, with its seconds.

torchrun --nproc-per-node 2 parallel_failures.py shapes|before|during
"""

import os
import sys
import time

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist

from subquad import mask
from subquad.parallel.lasp2 import lasp2
from subquad.parallel.ring_attention import ring


def main(how: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    mesh = dist.group.WORLD

    def drawn(tokens):
        return [torch.randn(1, tokens, 2, 64, device=device, requires_grad=True) for _ in "qkv"]

    x = drawn(256)
    o, state = lasp2(*x, mesh=mesh)
    loss = (o + ring(*x, mask.causal(), mesh=mesh)).square().sum() + state.sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    print(f"rank {rank} ready at {time.time():.1f}", flush=True)
    if how == "shapes":
        lasp2(*drawn(256 + rank), mesh=mesh)
    elif rank == 1:
        if how == "during":
            time.sleep(2)  # the first waits in a collective of its backward pass by now
        os._exit(7)
    elif how == "before":
        lasp2(*x, mesh=mesh)
    else:
        loss.backward()
        torch.cuda.synchronize() if gpu else None
    raise AssertionError("no error")


if __name__ == "__main__":
    main(sys.argv[1])
