"""The tasks that Wattle serves. A sixth is one new file beside the others and one line here."""

from typing import Any

from service.errors import InvalidValue
from service.models import Model
from service.tasks.answer import Answer
from service.tasks.base import Task
from service.tasks.embed import embeds
from service.tasks.generate import Generate
from service.tasks.sentiment import Sentiment
from service.tasks.summarize import Summarize
from service.tasks.translate import Translate

TASKS: tuple[Task[Any, Any], ...] = (
    Translate(),
    Generate(),
    Answer(),
    Sentiment(),
    Summarize(),
)


def task_of(model: Model) -> Task[Any, Any]:
    """What ``model`` does first of all. Raises ``InvalidValue`` for one that only embeds."""
    if embeds(model):
        raise InvalidValue("model", f"the model {model.name} makes embeddings, and nothing else")
    return next(task for task in TASKS if task.name == model.manifest.tasks[0])
