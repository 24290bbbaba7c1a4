"""Texts for requests: real lengths, never the same text twice in a row. Knows nothing of HTTP."""

import bisect
import json
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.scenario import Scenario

TEXTS = Path(__file__).parent / "texts"
WRITING = ("translate", "generate", "summarize")
"""Tasks whose answer is written token by token, and can be streamed."""
NEAREST = 12
"""A text is chosen among this many of about the wanted length."""


@dataclass(frozen=True, slots=True)
class Query:
    """One request, in no server's dialect."""

    task: str
    texts: tuple[str, ...]
    """What to work on: one text, or a list; questions for ``answer``."""
    contexts: tuple[str, ...] = ()
    """For ``answer``: one for each question."""
    stream: bool = False
    max_tokens: int | None = None


class Lengths:
    """Words per text of one task, drawn from the quantiles of real data."""

    def __init__(self, task: str) -> None:
        table = tomllib.loads((TEXTS / "lengths.toml").read_text(encoding="utf-8"))
        self._shares: list[float] = table["shares"]
        self._words: list[float] = table[task]

    def at(self, share: float) -> int:
        """The length below which this share of the texts is, between the quantiles linearly."""
        after = min(max(1, bisect.bisect_left(self._shares, share)), len(self._shares) - 1)
        (left, right), (low, high) = self._shares[after - 1 : after + 1], self._words[after - 1 : after + 1]
        return round(low + (high - low) * (share - left) / (right - left))


class Shelf:
    """Texts sorted by length, that gives the same one never twice in a row."""

    def __init__(self, texts: Sequence[str], chance: random.Random) -> None:
        self._texts = sorted(texts, key=_words)
        self._lengths = [_words(text) for text in self._texts]
        self._chance = chance
        self._last = ""

    def near(self, words: int) -> str:
        """A text of about this many words, put together from several where the longest is much too short."""
        text = self._one(words)
        while _words(text) < 0.75 * words:
            text = f"{text} {self._one(words - _words(text))}"
        return text

    def _one(self, words: int) -> str:
        place = bisect.bisect_left(self._lengths, words)
        first = max(0, min(place - NEAREST // 2, len(self._texts) - NEAREST))
        choices = [text for text in self._texts[first : first + NEAREST] if text != self._last]
        self._last = self._chance.choice(choices)
        return self._last


class Deck:
    """Longer pieces in an order by chance, all of them before any comes again."""

    def __init__(self, count: int, chance: random.Random) -> None:
        self._count = count
        self._chance = chance
        self._waiting: list[int] = []
        self._last = -1

    def next(self) -> int:
        """Number of the next piece; never that of the one before."""
        if not self._waiting:
            self._waiting = self._chance.sample(range(self._count), self._count)
            if self._waiting[-1] == self._last:
                self._waiting.reverse()
        self._last = self._waiting.pop()
        return self._last


class Inputs:
    """An endless stream of queries as a scenario wants them; the same ``seed`` gives the same ones.

    ``lists`` and ``streams`` say whether the server's dialect has them; where not, such queries become plain ones.
    """

    def __init__(self, scenario: Scenario, seed: int, *, lists: bool = True, streams: bool = True) -> None:
        self._scenario = scenario
        self._lists = lists
        self._streams = streams
        self._chance = random.Random(seed)
        self._lengths: dict[str, Lengths] = {task: Lengths(task) for task in scenario.tasks}
        shelves = {"translate": "sentences", "generate": "prompts", "sentiment": "reviews"}
        self._shelves = {
            task: Shelf([row["text"] for row in _rows(name)], self._chance) for task, name in shelves.items()
        }
        self._passages = _rows("passages")
        self._questions = [
            (number, question) for number, row in enumerate(self._passages) for question in row["questions"]
        ]
        self._question_deck = Deck(len(self._questions), self._chance)
        self._dialogues = [row["turns"] for row in _rows("dialogues")]
        self._dialogue_deck = Deck(len(self._dialogues), self._chance)
        self._write: dict[str, Callable[[int], str]] = {
            **{task: shelf.near for task, shelf in self._shelves.items()},
            "summarize": self._dialogue,
        }

    def __iter__(self) -> Iterator[Query]:
        """Queries without end."""
        while True:
            yield self.next()

    def next(self) -> Query:
        """The next query."""
        scenario, chance = self._scenario, self._chance
        (task,) = chance.choices(list(scenario.tasks), list(scenario.tasks.values()))
        is_list = chance.random() < scenario.list_share
        is_stream = chance.random() < scenario.stream_share
        size = chance.randint(*scenario.list_size)
        count = size if is_list and self._lists else 1
        max_tokens = scenario.max_tokens if task == "generate" else None
        if task == "answer":
            pairs = [self._question(self._words(task)) for _ in range(count)]
            return Query(task, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))
        texts = tuple(self._write[task](self._words(task)) for _ in range(count))
        stream = is_stream and self._streams and count == 1 and task in WRITING
        return Query(task, texts, stream=stream, max_tokens=max_tokens)

    def _words(self, task: str) -> int:
        return self._lengths[task].at(self._chance.random())

    def _question(self, words: int) -> tuple[str, str]:
        """A question, and its passage between others until the context is long enough."""
        number, question = self._questions[self._question_deck.next()]
        pieces = [self._passages[number]["context"]]
        for other in self._chance.sample(range(len(self._passages)), len(self._passages)):
            if sum(map(_words, pieces)) >= 0.75 * words:
                break
            if other != number:
                pieces.insert(self._chance.randint(0, len(pieces)), self._passages[other]["context"])
        return question, " ".join(pieces)

    def _dialogue(self, words: int) -> str:
        """The first turns of a dialogue; of a long one, several dialogues one after the other."""
        turns: list[str] = []
        while not turns or sum(map(_words, turns)) < 0.75 * words:
            for turn in self._dialogues[self._dialogue_deck.next()]:
                turns.append(turn)
                if sum(map(_words, turns)) >= words:
                    break
        return "\n".join(turns)


def _rows(name: str) -> list[dict[str, Any]]:
    with (TEXTS / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _words(text: str) -> int:
    return len(text.split())
