"""The texts of one model that are written side by side: they come and go between steps, and the rows in use are always
the first ones. Knows nothing of queues or clocks."""

from collections.abc import Container, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from service.engine.beams import Beams, Copy, Hypothesis
from service.engine.devices import Logits
from service.engine.graphs import BeamGraph, DecoderGraph
from service.engine.sampling import repeating_tokens
from service.engine.texts import Text, Written
from service.engine.types import FinishReason, Sampling

KeyT = TypeVar("KeyT")
Outcome = Written | Exception
"""A whole text, or what went wrong with this text alone."""


class Lane(Protocol[KeyT]):
    """Texts with the same number of beams, each under the key of whoever waits for it; text i has the rows from
    ``i * beams`` on."""

    decoder: DecoderGraph
    keys: list[KeyT]

    def begin(self, keys: Sequence[KeyT], texts: "Sequence[New]", logits: Logits | None) -> list[tuple[KeyT, Outcome]]:
        """Add texts whose prompts or sources the decoder has just read, behind those that are here.

        ``logits`` ``(texts, words)`` follow the prompts; over a source, nothing has been read yet. Returns those that
        have ended.
        """

    def write(self) -> list[tuple[KeyT, Outcome]]:
        """Let every row read one token; returns the texts that have ended."""

    def leave(self, keys: Sequence[KeyT]) -> None:
        """Take texts out."""


class New:
    """How a text is to be written: where it starts (over a source), its limit, and how its tokens are chosen."""

    def __init__(self, text: Text, sampling: Sampling, max_tokens: int, bos: int) -> None:
        self.text, self.sampling, self.max_tokens, self.bos = text, sampling, max_tokens, bos


class _Places(Generic[KeyT]):
    """The bookkeeping that both kinds of lanes share."""

    def __init__(self, decoder: DecoderGraph) -> None:
        self.decoder = decoder
        self.keys: list[KeyT] = []

    def _remove(self, keys: Sequence[KeyT]) -> list[int]:
        """Free one place after the other; the last text of all moves into each. Returns the places."""
        places, moves = [], []
        for key in keys:
            place = self.keys.index(key)
            last = self.keys.pop()
            if place < len(self.keys):
                self.keys[place] = last
                moves.append((len(self.keys), place))
            places.append(place)
        self.decoder.move(moves)
        return places


class PlainLane(_Places[KeyT]):
    """Texts that are written greedily or by chance, one row each."""

    def __init__(self, decoder: DecoderGraph) -> None:
        super().__init__(decoder)
        self._texts: list[Text] = []
        self._next_ids: list[int] = []

    def begin(self, keys: Sequence[KeyT], texts: Sequence[New], logits: Logits | None) -> list[tuple[KeyT, Outcome]]:
        """See ``Lane``."""
        first = len(self.keys)
        self.keys += keys
        self._texts += [new.text for new in texts]
        self._next_ids += [new.bos for new in texts]
        return [] if logits is None else self._advance(first, logits)

    def write(self) -> list[tuple[KeyT, Outcome]]:
        """See ``Lane``."""
        return self._advance(0, self.decoder.step(self._next_ids))

    def leave(self, keys: Sequence[KeyT]) -> None:
        """See ``Lane``."""
        for place in self._remove(keys):
            self._texts[place], self._next_ids[place] = self._texts[-1], self._next_ids[-1]
            self._texts.pop()
            self._next_ids.pop()

    def _advance(self, first: int, logits: Logits) -> list[tuple[KeyT, Outcome]]:
        ended: list[tuple[KeyT, Outcome]] = []
        for row, likeliest in enumerate(logits.argmax(-1).tolist()):
            text, token = self._texts[first + row], likeliest
            outcome: Outcome | None
            try:
                if not text.is_plain:
                    token = text.choose(logits[row], likeliest)
                outcome = text.take(token)
            except Exception as error:  # a callback's, perhaps: it is this text's alone
                outcome = error
            if outcome is None:
                self._next_ids[first + row] = token
            else:
                ended.append((self.keys[first + row], outcome))
        if ended:
            self.leave([key for key, _ in ended])
        return ended


class BeamLane(_Places[KeyT]):
    """Texts that are written by beam search, a row for each beam."""

    def __init__(self, decoder: DecoderGraph, likeliest: BeamGraph, eos: int | None) -> None:
        super().__init__(decoder)
        self._likeliest = likeliest
        self._beams = Beams(decoder.beams, eos)
        self._texts: list[New] = []

    def begin(self, keys: Sequence[KeyT], texts: Sequence[New], logits: Logits | None) -> list[tuple[KeyT, Outcome]]:
        """See ``Lane``."""
        first = len(self.keys)
        self.keys += keys
        self._texts += texts
        for new in texts:
            self._beams.join(new.max_tokens, new.sampling.length_penalty, new.bos)
        if logits is None:
            return []
        return self._advance(first, np.repeat(logits, self._beams.width, axis=0))

    def write(self) -> list[tuple[KeyT, Outcome]]:
        """See ``Lane``."""
        return self._advance(0, self.decoder.step(self._beams.next_ids))

    def leave(self, keys: Sequence[KeyT]) -> None:
        """See ``Lane``."""
        for place in self._remove(keys):
            self._beams.leave(place)
            self._texts[place] = self._texts[-1]
            self._texts.pop()

    def _advance(self, first: int, logits: Logits) -> list[tuple[KeyT, Outcome]]:
        width = self._beams.width
        for place, new in enumerate(self._texts[first:], first):
            if new.sampling.no_repeat_ngram:
                for row, ids in enumerate(self._beams.written(place), (place - first) * width):
                    logits[row, repeating_tokens(ids, new.sampling.no_repeat_ngram)] = -np.inf
        scores, words = self._likeliest.likeliest(logits, 2 * width)
        read = self.decoder.positions[first * width : len(self.keys) * width : width]
        copies, over = self._beams.advance(first, scores, words, read.tolist())
        outcomes: dict[int, Outcome] = {place: _written(best, "length") for place, best in over.items()}
        for place in range(first, len(self.keys)):
            if place not in over and (outcome := self._stop(place)) is not None:
                outcomes[place] = outcome
        self._copy(copies, outcomes)
        ended = [(self.keys[place], outcome) for place, outcome in outcomes.items()]
        if ended:
            self.leave([key for key, _ in ended])
        return ended

    def _stop(self, place: int) -> Outcome | None:
        """The text of a search that its callback ends for a reason, or what the callback raised."""
        should_stop = self._texts[place].text.should_stop
        if should_stop is None:
            return None
        try:
            reason = should_stop(self._beams.written(place)[0])
        except Exception as error:  # it is this text's alone
            return error
        return _written(self._beams.cut(place), reason) if isinstance(reason, str) else None

    def _copy(self, copies: Sequence[Copy], over: Container[int]) -> None:
        self.decoder.copy(copy for copy in copies if copy.target // self._beams.width not in over)


def _written(best: Hypothesis, cut: FinishReason) -> Written:
    return Written(best.ids, "stop" if best.stopped else cut)
