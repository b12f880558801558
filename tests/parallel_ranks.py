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


def names():
    """The checks, without running them."""
    import parallel_checks  # noqa: F401

    return list(CHECKS)


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


def main(folder: Path) -> int:
    import parallel_checks  # noqa: F401

    children = []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(rank, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.modules["parallel_ranks"] = sys.modules["__main__"]
    sys.exit(main(Path(sys.argv[1])))
