"""What a conversation or a bare prompt asks of a model: a request to its task. Knows no dialect and no HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from service.errors import InvalidValue, invalid_value
from service.models import Model
from service.tasks import task_of
from service.tasks.base import Task, TaskRequest
from service.tasks.generate import Turn


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the task that it is for."""

    task: Task[Any, Any]
    request: TaskRequest


def ask_turn(model: Model, turns: Sequence[Turn], wishes: Mapping[str, Any]) -> Asked:
    """Ask for what comes after ``turns``: their last one, the user's, is what the model's task is to be done on.

    What stands before it is what a chatting model remembers, and what an answering model looks for the answer in.
    Raises ``InvalidValue``.
    """
    *before, last = turns
    if last.role != "user":
        raise InvalidValue("input", "the last message must be the user's")
    told = dict(wishes)
    fields = task_of(model).request.model_fields
    if "history" in fields and model.chat is not None:
        told["history"] = [turn.model_dump() for turn in before]
    if "context" in fields and before:
        told.setdefault("context", "\n\n".join(turn.content for turn in before if turn.role != "assistant"))
    return ask(model, last.content, told)


def ask(model: Model, texts: str | Sequence[str], wishes: Mapping[str, Any]) -> Asked:
    """Ask for the model's task to be done on ``texts``, with those of ``wishes`` that the task knows.

    Wishes that are None are none, and a limit of tokens above the model's own is the model's own. Raises
    ``InvalidValue``.
    """
    task = task_of(model)
    fields = task.request.model_fields
    told = {name: value for name, value in wishes.items() if value is not None}
    if told.get("n", 1) != 1 and "n" not in fields:
        raise InvalidValue("n", f"the model {model.name} writes one text")
    if "context" in fields and not told.keys() & {"context", "knowledge_base"}:
        raise InvalidValue("input", f"the model {model.name} needs a context: a message before the question")
    limit = told.get("max_tokens")
    if isinstance(limit, int):
        told["max_tokens"] = min(limit, model.manifest.max_output_tokens)
    known = {name: value for name, value in told.items() if name in fields}
    return Asked(task, request_of(task, {**known, "model": model.name, task.texts: texts}))


def request_of(task: Task[Any, Any], body: Mapping[str, Any]) -> TaskRequest:
    """A request of ``task``. Raises ``InvalidValue``."""
    try:
        return task.request.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid_value(first["type"], str(first["loc"][0]), first["msg"]) from error
