"""The scheduler of GPU jobs, on jobs that need none."""

import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from run_all import Job, room  # noqa: E402


@pytest.mark.parametrize(
    ("needs", "load", "want"),
    [
        ({"gpus": 0}, [], []),
        ({"alone": True}, [{"shared": 1}, {}], [1]),
        ({"alone": True}, [{"shared": 1}, {"alone": 1}], None),
        ({}, [{"alone": 1}, {}, {"shared": 1}], [2]),  # where one shares already
        ({}, [{"shared": 2}, {}], [1]),
        ({}, [{"shared": 2}, {"alone": 1}], None),
        ({"gpus": 2, "alone": True}, [{}, {"shared": 1}, {}], [0, 2]),
        ({"gpus": 2, "alone": True}, [{}], None),
    ],
)
def test_room(needs, load, want):
    job = Job("a", "a.py", 1, **needs)
    assert room(job, [Counter(x) for x in load], crowd=2) == want


def test_jobs_name_scripts_that_are_there():
    jobs = [
        Job(**row) for row in tomllib.loads((ROOT / "benchmarks/run_all.toml").read_text())["job"]
    ]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        files = [w for w in job.run.split() if w.endswith(".py") and "{" not in w]
        assert files, job.run
        assert all((ROOT / f).is_file() for f in files), job.run


def test_runs_in_order_kills_what_is_late_and_keeps_what_ended(tmp_path):
    for name, text in {
        "good": "print('made', open('first').read())",
        "first": "open('first', 'w').write('first')",
        "bad": "raise SystemExit(3)",
        "slow": "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\ntime.sleep(60)",
    }.items():
        (tmp_path / f"{name}.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{text}\n")
    rows = [
        {"name": "good", "after": "first", "seconds": 20},
        {"name": "first", "seconds": 20},
        {"name": "bad", "seconds": 20},
        {"name": "slow", "seconds": 2},
        {"name": "never", "seconds": 1000},
        {"name": "card", "seconds": 1, "gpus": 1},
    ]
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        "\n".join(
            "[[job]]\n"
            + "\n".join(f"{k} = {json.dumps(v)}" for k, v in ({"gpus": 0} | row).items())
            + f'\nrun = "{tmp_path}/{row["name"]}.py"'
            for row in rows
        )
    )
    command = [sys.executable, str(ROOT / "benchmarks/run_all.py"), "--jobs", str(jobs)]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--gpus",
        "0",
        "--seconds",
        "60",
        "--processes",
        "4",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    done = json.loads((tmp_path / "out/jobs.json").read_text())["jobs"]
    assert {name: row["rc"] for name, row in done.items()} == {
        "first": 0, "good": 0, "bad": 3, "slow": -15,
    }  # fmt: skip
    assert ended.returncode == 1
    assert "never" in ended.stdout
    assert "card" in ended.stdout
    assert "made first" in (tmp_path / "out/good.log").read_text()
    assert not alive(int((tmp_path / "child").read_text()))


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
