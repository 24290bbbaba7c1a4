from collections import Counter

import pytest

from loadtests.peers.ceilings import least_s
from loadtests.peers.workloads import SHAPES, WORKLOADS, Shape, Workload, joined, random_rows

SENTENCES = [[101, *range(1000 + 10 * n, 1000 + 10 * n + n % 7 + 1), 102] for n in range(150)]
# As in the models' own libraries, embeddings included: millions of weights.
KNOWN = {"generate-135m": 134.5, "generate-25m": 25.2, "minilm": 10.6, "translate-6x6-512": 60.5}


def test_names_are_unique() -> None:
    assert Counter(workload.name for workload in WORKLOADS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", KNOWN)
def test_the_matrices_are_counted(name: str) -> None:
    shape = SHAPES[name]
    assert (shape.source_parameters + shape.target_parameters) / 1e6 == pytest.approx(KNOWN[name], rel=0.01)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_rows_are_those_that_the_name_says(workload: Workload) -> None:
    rows = workload.rows(SENTENCES)
    assert len(rows) == workload.at_once
    assert rows == workload.rows(SENTENCES)
    if workload.source_tokens:
        assert {len(row) for row in rows} == {workload.source_tokens}
    else:
        assert rows == SENTENCES[: workload.at_once]


def test_sources_end_and_prompts_do_not() -> None:
    assert all(row[-1] == 0 and 0 not in row[:-1] for row in random_rows(SHAPES["translate-6x2-256"], 50, 20))
    assert all(0 not in row for row in random_rows(SHAPES["generate-25m"], 50, 64))


def test_sentences_are_joined_within_one_frame() -> None:
    assert joined([[1, 5, 2], [1, 6, 7, 2]], 1, 7) == [1, 6, 7, 5, 6, 7, 2]


def test_the_ceiling_is_the_slower_of_products_and_reads() -> None:
    shape = Shape("toy", "generate", 64, 64, 1, 1, 0, 1, 1000)
    layer = 4 * 64 * 64 + 3 * 64 * 64
    assert shape.target_parameters == layer + 64_000
    workload = Workload("toy", shape, at_once=1, source_tokens=10, new_tokens=5)
    rates = {"memory": 1e6, "cache": 1e9}
    # Products at an endless rate: what is left are reads of one byte a weight, from memory and then from the cache.
    assert least_s(workload, 10, 8, 1e30, rates, 0) == pytest.approx((layer + 5 * (layer + 64_000)) / 1e6)
    assert least_s(workload, 10, 8, 1e30, rates, 1 << 30) == pytest.approx((layer + 5 * (layer + 64_000)) / 1e9)
    # Reads at an endless rate.
    endless = {"memory": 1e30, "cache": 1e30}
    assert least_s(workload, 10, 8, 1e6, endless, 0) == pytest.approx(2 * (10 * layer + 5 * (layer + 64_000)) / 1e6)
