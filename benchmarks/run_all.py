"""Every GPU test and benchmark of ``run_all.toml`` on all GPUs of this machine, a process each.

    python benchmarks/run_all.py --out runs/gpu --seconds 3600
    python benchmarks/run_all.py --out runs/gpu --only recurrence sparse

What is timed has a GPU to itself; what is only judged shares one with others like it. Jobs begin
in the order of the file as soon as there is room, none when its time would end after ``--seconds``,
and each is killed with all its children once it has had its own. Output goes to ``OUT/NAME.log``,
results to where the commands put them, exit codes and seconds to ``OUT/jobs.json`` as they come.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import print as show

from subquad.bench.results import machine, write_json

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A row of the file.

    Attributes:
        name: a word; ``run``: the command, ``{out}`` and ``{model}`` filled in.
        seconds: after which it is killed.
        gpus: how many it needs; 0 for the CPU.
        alone: whether nobody else may use them meanwhile.
        after: the name of a job that ends before this one begins, where it is run at all.
        env: variables of its environment.
    """

    name: str
    run: str
    seconds: float
    gpus: int = 1
    alone: bool = False
    after: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def room(job: Job, load: Sequence[Counter], crowd: int) -> list[int] | None:
    """The GPUs on which the job may begin: empty ones where it is to be alone, else the fullest
    with less than ``crowd`` jobs; None where there is no room."""
    if not job.gpus:
        return []
    free = [i for i, on in enumerate(load) if not on.total()]
    if not job.alone:
        shared = [i for i, on in enumerate(load) if not on["alone"] and on.total() < crowd]
        free = sorted(shared, key=lambda i: -load[i].total())
    return free[: job.gpus] if len(free) >= job.gpus else None


@dataclass
class Running:
    job: Job
    gpus: list[int]
    process: subprocess.Popen[bytes]
    began: float

    def stop(self) -> None:
        """End it with its children: asked first, so that what it holds can be written."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def begin(job: Job, gpus: list[int], args: argparse.Namespace) -> Running:
    words = shlex.split(job.run.format(out=args.out, model=args.model))
    words = [sys.executable, *(words if words[0].endswith(".py") else ("-m", *words))]
    environment = {
        **os.environ,
        **job.env,
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "OMP_NUM_THREADS": str(args.threads),
        "PYTHONUNBUFFERED": "1",
    }
    with (args.out / f"{job.name}.log").open("wb") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, cwd=HERE.parent, start_new_session=True
        )
    return Running(job, gpus, process, time.monotonic())


def run(jobs: list[Job], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All that there is time for: ``{name: {"rc", "seconds", "gpus"}}``; the rest is absent."""
    start, waiting, running = time.monotonic(), list(jobs), list[Running]()
    load = [Counter[str]() for _ in range(args.gpus)]
    done: dict[str, dict[str, Any]] = {}
    while waiting or running:
        now = time.monotonic() - start
        for job in list(waiting):
            late = now + job.seconds > args.seconds
            first = job.after in {j.name for j in waiting} | {r.job.name for r in running}
            gpus = room(job, load, args.crowd)
            if late or job.gpus > args.gpus:
                waiting.remove(job)
            elif not first and gpus is not None and len(running) < args.processes:
                waiting.remove(job)
                running.append(begin(job, gpus, args))
                for i in gpus:
                    load[i]["alone" if job.alone else "shared"] += 1
        for one in list(running):
            spent = time.monotonic() - one.began
            if one.process.poll() is None and spent > one.job.seconds:
                one.stop()
            if (rc := one.process.poll()) is None:
                continue
            running.remove(one)
            for i in one.gpus:
                load[i]["alone" if one.job.alone else "shared"] -= 1
            done[one.job.name] = {"rc": rc, "seconds": round(spent, 1), "gpus": one.gpus}
            write_json(args.out / "jobs.json", {"made": machine(), "jobs": done})
            show(f"{'[green]ok' if rc == 0 else f'[red]{rc}'}[/] {one.job.name} {spent:.0f} s")
        time.sleep(0.2)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="logs and jobs.json")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs that begin so")
    parser.add_argument("--crowd", type=int, default=4, help="jobs that share a GPU")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 2) // 2)
    parser.add_argument("--model", type=Path, default=HERE.parent / "../shared/models/needle-16m")
    parser.add_argument("--jobs", type=Path, default=HERE / "run_all.toml")
    args = parser.parse_args()
    jobs = [Job(**row) for row in tomllib.loads(args.jobs.read_text())["job"]]
    wanted = [j for j in jobs if not args.only or j.name.startswith(tuple(args.only))]
    if not wanted:
        parser.error(f"--only must begin the name of a job, got {args.only}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    done = run(wanted, args)
    for job in wanted:
        if job.name not in done:
            show(f"[yellow]no time or GPUs for[/] {job.name}")
    sys.exit(any(row["rc"] for row in done.values()))


if __name__ == "__main__":
    main()
