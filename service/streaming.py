"""A request's texts while they are written: from the executor's thread to the event loop. Knows nothing of HTTP."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from service.engine.types import Item, WriteItem


class Transcript(Protocol):
    """Reads token ids one by one, and tells their text as soon as nothing that follows can change it."""

    def read(self, token: int) -> str:
        """The text that is certain since ``token`` and was not before; often none."""


class PlainTranscript:
    """A text as the tokenizer decodes it, up to the first of its stop texts.

    A letter of several bytes waits for the last of them, and what may begin a stop text for what follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._told = 0

    def read(self, token: int) -> str:
        """See ``Transcript``."""
        self._text += self._decoder.step(self._tokenizer, token) or ""
        certain = cut_at_stop(self._text, self._stop)
        if len(certain) == len(self._text):
            certain = certain[: len(certain) - _beginning_of(self._stop, certain)]
        piece = certain[self._told :]
        self._told = len(certain)
        return piece


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop text in it."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def _beginning_of(stop: Sequence[str], text: str) -> int:
    """How many letters at the end of ``text`` a stop text begins with."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    ends = (length for length in range(longest, 0, -1) if any(each.startswith(text[-length:]) for each in stop))
    return next(ends, 0)


def overhear(
    items: Sequence[Item], transcripts: Sequence[Transcript | None], tell: Callable[[int, str], None]
) -> Iterator[Item]:
    """The ``items``, which from now on ``tell`` (on the running loop) their number and every new piece of text.

    An item without a transcript keeps silent.
    """
    loop = asyncio.get_running_loop()
    for number, (item, transcript) in enumerate(zip(items, transcripts, strict=True)):
        if transcript is None or not isinstance(item, WriteItem):
            yield item
        else:
            yield replace(item, on_tokens=_hear(loop, number, transcript, tell))


def _hear(
    loop: asyncio.AbstractEventLoop, number: int, transcript: Transcript, tell: Callable[[int, str], None]
) -> Callable[[Sequence[int]], None]:
    def read(token: int) -> None:
        if piece := transcript.read(token):
            tell(number, piece)

    def hear(ids: Sequence[int]) -> None:
        # Nothing but handing over: a device waits for it.
        loop.call_soon_threadsafe(read, ids[-1])

    return hear
