import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.peers.worker import Ids, Ran, Run, batches, padded, timed

ROOT = Path(__file__).parents[3]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 4))
def test_every_row_is_in_one_batch_and_no_batch_is_over_the_budget(
    lengths: list[int], budget: int, replicas: int
) -> None:
    rows = [[0] * length for length in lengths]
    found = batches(rows, budget, replicas)
    assert sorted(place for places in found for place in places) == list(range(len(rows)))
    for places in found:
        width = max(lengths[place] for place in places)
        assert len(places) == 1 or width * len(places) <= budget


def test_replicas_share_one_batch() -> None:
    assert batches([[0] * 4] * 4, 1000, replicas=2) == [[0, 1], [2, 3]]


def test_padding_is_masked() -> None:
    assert padded([[1, 2, 3], [4]], 9) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])


def test_a_batch_is_computed_as_often_as_asked() -> None:
    seen: list[Ids] = []

    def runner(run: Run) -> Ids:
        seen.append(run.rows)
        return run.rows

    ran = timed(runner, Run([[1]], repeats=3))
    assert (seen, ran.outputs) == ([[[1]]] * 3, None)
    assert ran.ended_s >= ran.started_s
    assert timed(runner, Run([[1]], with_outputs=True)).outputs == [[1]]


WORKER = """
from loadtests.peers.worker import serve
def load(order):
    print("a library's banner")
    def run(it):
        if it.beams == 9:
            raise ValueError("nine beams")
        return [[token + order.threads for token in row] for row in it.rows]
    return run
serve(("pytest",), load)
"""


@pytest.fixture
def answers() -> list[dict[str, Any]]:
    core = min(os.sched_getaffinity(0))
    order = {"folder": "", "kind": "translate", "variant": "", "threads": 5, "replicas": 1, "batch_tokens": 1}
    messages: list[dict[str, Any]] = [
        {"load": {**order, "cores": [core]}},
        {"run": {"rows": [[1, 2]], "with_outputs": True}},
        {"run": {"rows": [[1]], "beams": 9}},
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        cwd=ROOT,
        input="".join(json.dumps(message) + "\n" for message in messages),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a library's banner" in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_answers_line_by_line_and_survives_an_error(answers: list[dict[str, Any]]) -> None:
    loaded, ran, failed = answers
    assert loaded == {"versions": {"pytest": pytest.__version__}}
    assert Ran(**ran).outputs == [[6, 7]]
    assert failed == {"error": "ValueError: nine beams"}
