"""Texts: real lengths, never twice in a row, the same from the same seed."""

import itertools
import json
from itertools import pairwise
from typing import Any

import pytest

from loadtests.inputs import TEXTS, WRITING, Inputs, Lengths, Query
from loadtests.scenario import Scenario

TASKS = ("translate", "generate", "answer", "sentiment", "summarize")


def scenario(**fields: object) -> Scenario:
    return Scenario.model_validate({"tasks": dict.fromkeys(TASKS, 1), "users": 1, "duration_s": 10, **fields})


def first(count: int, **fields: object) -> list[Query]:
    return list(itertools.islice(Inputs(scenario(**fields), seed=1), count))


def passages() -> list[dict[str, Any]]:
    lines = (TEXTS / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_shelf_holds_several_hundred_texts_and_none_twice() -> None:
    total = 0
    for path in TEXTS.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)), path.name
        total += len(lines)
    assert total + sum(len(row["questions"]) for row in passages()) > 400


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_those_of_the_data(task: str) -> None:
    lengths = Lengths(task)
    drawn = [lengths.at(number / 100) for number in range(101)]
    assert drawn == sorted(drawn)
    queries = first(400, tasks={task: 1})
    texts = [(query.contexts or query.texts)[0] for query in queries]
    words = sorted(len(text.split()) for text in texts)
    for share in (0.25, 0.5, 0.75):
        wanted = lengths.at(share)
        assert abs(words[int(share * len(words))] - wanted) <= max(2, 0.35 * wanted), (share, wanted)


@pytest.mark.parametrize("task", TASKS)
def test_no_text_comes_twice_in_a_row(task: str) -> None:
    for one, other in pairwise(first(300, tasks={task: 1})):
        assert one.texts[-1] != other.texts[0]


def test_the_same_seed_asks_the_same() -> None:
    assert first(50, list_share=0.5, stream_share=0.5) == first(50, list_share=0.5, stream_share=0.5)


def test_lists_and_streams_come_as_often_as_wanted() -> None:
    queries = first(600, list_share=0.25, stream_share=0.5, list_size=(3, 5))
    lists = [query for query in queries if len(query.texts) > 1]
    assert 0.18 < len(lists) / len(queries) < 0.32
    assert {len(query.texts) for query in lists} == {3, 4, 5}
    streamed = [query for query in queries if query.stream]
    assert streamed and {query.task for query in streamed} <= set(WRITING)
    assert all(len(query.texts) == 1 for query in streamed)
    assert all(len(query.contexts) == len(query.texts) for query in queries if query.task == "answer")


def test_a_dialect_without_lists_or_streams_gets_plain_queries() -> None:
    inputs = Inputs(scenario(list_share=1.0, stream_share=1.0), seed=1, lists=False, streams=False)
    assert all(len(query.texts) == 1 and not query.stream for query in itertools.islice(inputs, 100))


def test_the_answer_is_in_the_context() -> None:
    by_question = {question: row["context"] for row in passages() for question in row["questions"]}
    for query in first(100, tasks={"answer": 1}):
        assert by_question[query.texts[0]] in query.contexts[0]
