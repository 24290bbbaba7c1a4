import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtests.peers.processes import ROOT, Team, WorkerFailed, busy_cpu_s, group_cpu_s, share_out, split_order
from loadtests.peers.worker import Load, Run

ORDER = Load("", "translate", "int8", threads=2, replicas=2, batch_tokens=8, cores=(0, 1, 2, 3))


def test_replicas_get_cores_of_their_own() -> None:
    assert [(order.replicas, order.threads, order.cores) for order in split_order(ORDER)] == [
        (1, 2, (0, 1)),
        (1, 2, (2, 3)),
    ]


def test_rows_are_shared_out_by_number_and_length() -> None:
    rows = [[0] * length for length in (1, 9, 8, 2, 5)]
    assert share_out(rows, 2) == [[0, 1, 4], [2, 3]]
    assert share_out(rows[:1], 2) == [[0], []]


def test_busy_time_counts_everything_but_waiting() -> None:
    tick = os.sysconf("SC_CLK_TCK")
    counters = " ".join(str(tick << place) for place in range(8))
    stat = f"cpu  {counters} 0 0\ncpu0 1"
    assert busy_cpu_s(stat) == 1 + 2 + 4 + 32 + 64 + 128


def test_the_time_of_a_process_group_is_read() -> None:
    script = "sum(range(20_000_000)); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert group_cpu_s(process.pid) > 0.05
        process.communicate(b"\n")


FAKE = '''
"""A peer that writes each row backwards."""
from loadtests.peers.worker import serve
def load(order):
    if order.variant == "broken":
        raise RuntimeError("no such numbers")
    return lambda run: [row[::-1] for row in run.rows]
serve((), load)
'''


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that runs the fake, whichever worker it is asked for."""
    (tmp_path / "fake.py").write_text(FAKE)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nPYTHONPATH=. exec {sys.executable} {tmp_path}/fake.py\n")
    script.chmod(0o755)
    return script


def order(variant: str = "int8") -> Load:
    core = min(os.sched_getaffinity(0))
    return Load("", "translate", variant, threads=1, replicas=2, batch_tokens=8, cores=(core, core))


def test_processes_share_a_batch_and_outputs_come_back_in_order(python: Path, tmp_path: Path) -> None:
    with Team(python, "fake", order(), tmp_path / "log", native_replicas=False) as team:
        rows = [[1, 2], [3, 4, 5], [6], [7, 8]]
        ran = team.run(Run(rows, with_outputs=True))
        assert ran.outputs == [[2, 1], [5, 4, 3], [6], [8, 7]]
        assert ran.ended_s >= ran.started_s
        # One row leaves the second process out.
        assert team.run(Run([[1, 2]], with_outputs=True)).outputs == [[2, 1]]


def test_a_worker_that_cannot_load_says_why(python: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="no such numbers"):
        Team(python, "fake", order("broken"), tmp_path / "log", native_replicas=True)


def test_a_stopped_worker_ends_with_its_parent(python: Path, tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from loadtests.peers.processes import Team
from loadtests.peers.worker import Load
core = min(os.sched_getaffinity(0))
order = Load("", "translate", "int8", 1, 1, 8, (core,))
team = Team(Path({str(python)!r}), "fake", order, Path({str(tmp_path / "log")!r}), native_replicas=True)
print(team._workers[0]._process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    worker = Path("/proc") / done.stdout.strip()
    for _ in range(500):
        if not worker.exists() or "\nState:\tZ" in (worker / "status").read_text():
            return
        time.sleep(0.01)
    pytest.fail("the worker has outlived its parent")
