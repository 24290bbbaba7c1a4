"""The tasks that Wattle serves. A sixth is one new file beside the others and one line here."""

from typing import Any

from service.tasks.answer import Answer
from service.tasks.base import Task
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
