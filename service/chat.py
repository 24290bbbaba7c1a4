"""Chat templates: messages in, token ids out. Knows nothing of models' weights or of HTTP."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Message = Mapping[str, str]
"""``role`` and ``content``."""

# A noncharacter, which Unicode sets aside for internal use: it marks where a content goes.
_MARK = "\ufdd0"


class TemplateRefusal(Exception):
    """The template raised an error about the messages; says which."""


class ChatTemplate:
    """A compiled chat template, run in a sandbox.

    Contents are tokenised apart from the template's own text, in which alone control tokens count: whatever a
    caller types stays plain text.
    """

    def __init__(self, source: str, control: Tokenizer) -> None:
        """``control`` reads control tokens. Raises ``jinja2.TemplateError`` if ``source`` is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._template = environment.from_string(source)
        self._control = control

    def encode(self, messages: Sequence[Message], plain: Tokenizer) -> list[tuple[int | None, list[int]]]:
        """The prompt in pieces: the number of the message (None for the template's own text) and its token ids.

        ``plain`` takes control tokens for text. Raises ``TemplateRefusal``.
        """
        marked = [{**message, "content": f"{_MARK}{n}{_MARK}"} for n, message in enumerate(messages)]
        try:
            rendered = self._template.render(messages=marked, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateRefusal(str(error)) from error
        pieces: list[tuple[int | None, list[int]]] = []
        # Split at the marks, every second part is the number of a message.
        for place, part in enumerate(rendered.split(_MARK)):
            if place % 2:
                content = messages[int(part)]["content"]
                pieces.append((int(part), plain.encode(content, add_special_tokens=False).ids))
            elif part:
                pieces.append((None, self._control.encode(part, add_special_tokens=False).ids))
        return pieces


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
