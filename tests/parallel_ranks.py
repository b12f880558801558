"""What the ranks of `test_parallel.py` do: four processes forked once, every check in turn.

python parallel_ranks.py FOLDER      writes FOLDER/results.json: {check: error, or ""}
"""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

CHECKS = {}
SIZE = 4


def check(fn):
    CHECKS[fn.__name__] = fn
    return fn


def work(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE))
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True)
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    groups = {4: dist.group.WORLD}
    for size in (2, 3):
        groups[size] = dist.new_group(list(range(size)))
    only = os.environ.get("CHECK")
    results = {}
    for name, fn in CHECKS.items():
        if only and only not in name:
            continue
        torch.manual_seed(0)
        try:
            fn(groups)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
            raise  # the others must not wait for this one
        finally:
            (folder / f"results.{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


def die(rank: int, folder: Path) -> None:
    """Three ranks of which the second ends: in the middle of what others do with it."""
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    from subquad import mask
    from subquad.parallel.lasp2 import lasp2
    from subquad.parallel.ring_attention import ring_attention

    q = torch.randn(1, 4, 2, 2, requires_grad=True)
    mesh = dist.group.WORLD
    o, _ = lasp2(q, q, q, mesh=mesh)
    ring = ring_attention(q, q, q, mask.causal(), mesh=mesh)
    if rank == 1:
        os._exit(1)
    said = {}
    for name, call in {
        "lasp2 (backward)": lambda: o.sum().backward(),
        "ring_attention (backward)": lambda: ring.sum().backward(),
        "lasp2": lambda: lasp2(q, q, q, mesh=mesh),
    }.items():
        try:
            call()
        except RuntimeError as error:
            said[name] = str(error)
    (folder / f"die.{rank}.json").write_text(json.dumps(said))
    os._exit(0)


def main(folder: Path, mode: str = "") -> int:
    if not mode:
        import parallel_checks  # all that is imported here is imported once

        with torch.no_grad():
            parallel_checks.language_model()(torch.zeros(1, 4, dtype=torch.int64))

    children = []
    for rank in range(3 if mode else SIZE):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                (die if mode else work)(rank, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.modules["parallel_ranks"] = sys.modules["__main__"]
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
