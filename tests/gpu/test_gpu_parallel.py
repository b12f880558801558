"""One sequence on two GPUs, over NCCL: equal to one GPU, and ended where a rank fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def ranks(script: Path, *arguments: str, timeout: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), *arguments]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(command, env=env, timeout=timeout, capture_output=True, text=True)


def test_two_gpus_are_one(tmp_path):
    """Operations with their states and gradients, and models: the benchmark's gate."""
    out = tmp_path / "parallel.json"
    options = ["--quick", "--seconds", "0", "--out", str(out)]
    done = ranks(ROOT / "benchmarks" / "parallel.py", *options, timeout=240)
    assert done.returncode == 0, done.stderr
    gate = json.loads(out.read_text())["gate"]
    assert len(gate) > 10
    assert all(row["ok"] for row in gate), gate


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shapes", "rank 1 has lasp2: q [1, 257, 2, 64]"),
        ("before", "was left alone in lasp2"),
        ("during", "exitcode  : 7"),
    ],
)
def test_a_failing_rank_ends_the_other(how, message):
    done = ranks(Path(__file__).with_name("parallel_failures.py"), how, timeout=120)
    ended = time.time()
    ready = [float(line.split()[-1]) for line in done.stdout.splitlines() if "ready at" in line]
    assert ended - max(ready) < 30
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
