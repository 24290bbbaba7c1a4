"""A teacher behind an OpenAI-compatible endpoint. Knows nothing of data sets or of what its words are for."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import httpx2 as httpx

from energy.types import Quality
from training.errors import TrainingError
from training.recipe import TeacherRecipe
from training.targets import Teacher, Written

TRIES = 6
TIMEOUT_S = 120.0
LONGEST_WAIT_S = 300.0
_TRANSIENT = (408, 409, 429)
"""Worth another try, as is every status from 500 on."""


class Endpoint:
    """Asks ``<url>/chat/completions`` for one output after the other; from any number of threads, until closed."""

    def __init__(self, wanted: TeacherRecipe, key: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.wanted, self.sleep = wanted, sleep
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def write(self, texts: Sequence[str]) -> Written:
        """One output for each text; joules where the endpoint says what an answer cost, as Wattle does.

        Raises ``TrainingError`` where the endpoint refuses, or still fails after ``TRIES`` tries.
        """
        outputs, costs, quality = [], [], Quality.UNAVAILABLE.value
        for text in texts:
            answer = self._ask(self.wanted.prompt.replace("{input}", text))
            outputs.append(_content(answer))
            joules = answer.headers.get("x-energy-joules")
            costs.append(None if joules is None else float(joules))
            quality = answer.headers.get("x-energy-quality", quality)
        known = [cost for cost in costs if cost is not None]
        return Written(outputs, sum(known) if len(known) == len(costs) else None, quality)

    def _ask(self, prompt: str) -> httpx.Response:
        body = {**self.wanted.setting, "model": self.wanted.source, "messages": [{"role": "user", "content": prompt}]}
        url = f"{self.wanted.url}/chat/completions"
        said = ""
        for number in range(TRIES):
            wait_s = 2.0**number
            try:
                answer = self.client.post(url, json=body)
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code == 200:
                    return answer
                said = f"status {answer.status_code}: {answer.text[:300]}"
                if answer.status_code < 500 and answer.status_code not in _TRANSIENT:
                    raise TrainingError(f"{url} refuses: {said}")
                wait_s = _wait_s(answer, wait_s)
            if number + 1 < TRIES:
                self.sleep(wait_s)
        raise TrainingError(f"{url} still fails after {TRIES} tries ({said}); what was written is kept: run it again")


@contextmanager
def endpoint_teacher(wanted: TeacherRecipe, key: str | None) -> Iterator[Teacher]:
    """The model ``wanted.source`` at ``wanted.url``."""
    with Endpoint(wanted, key) as endpoint:
        yield Teacher(wanted.source, str(wanted.url), endpoint.write, texts=1)


def _content(answer: httpx.Response) -> str | None:
    """The words of a chat completion. Raises ``TrainingError`` where the answer is none."""
    try:
        choice = answer.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"{answer.url} answers no chat completion: {answer.text[:300]}") from error
    return None if choice.get("finish_reason") == "length" else content


def _wait_s(answer: httpx.Response, otherwise: float) -> float:
    """How long the endpoint asks to wait, in the two ways there are to say it in seconds."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(LONGEST_WAIT_S, max(0.0, float(answer.headers[name]) * unit_s))
        except (KeyError, ValueError):
            continue
    return otherwise
