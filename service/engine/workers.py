"""What one executor does for one model: takes jobs, and turns them into steps. Knows nothing of threads or clocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from energy.types import Phase, Work
from models.manifest import ArtefactError, Manifest
from service.engine.batching import form_batch, padded_width
from service.engine.graphs import DecoderGraph, EncoderGraph
from service.engine.rows import Rows, continue_rows
from service.engine.texts import Text, Written, begin
from service.engine.types import EncodeItem, Item, Ticket, WriteItem

Result = NDArray[np.float32] | Written | Exception
"""Logits, a text, or what went wrong with this item alone."""


@dataclass(slots=True, eq=False)
class Job:
    """An item on its way through the engine."""

    item: Item
    submitted_ns: int
    ticket: Ticket = field(default_factory=Ticket)
    started_ns: int | None = None
    compute_ns: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that it brings along."""
        return len(self.item.input_ids)

    @property
    def rows(self) -> int:
        """Rows that it occupies."""
        return self.item.sampling.beams if isinstance(self.item, WriteItem) else 1

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any longer."""
        return self.ticket.future.cancelled()


@dataclass(frozen=True, slots=True)
class Turn:
    """One step that is ready to run."""

    jobs: tuple[Job, ...]
    work: tuple[Work, ...]
    """Of each of ``jobs``."""
    padding_tokens: int
    run: Callable[[], list[tuple[Job, Result]]]
    """The forward pass and what follows from it; returns the jobs that have ended."""
    abandon: Callable[[], None]
    """Called where ``run`` raised: forgets the jobs."""


class Worker(Protocol):
    """An executor's hands for one model."""

    @property
    def jobs(self) -> Sequence[Job]:
        """What it has taken and not finished."""

    @property
    def busy(self) -> bool:
        """Whether it has a step to run even without new jobs."""

    def take(self, waiting: Sequence[Job], most: int) -> list[Job]:
        """Which of the ``waiting`` jobs, up to ``most``, it can begin now; they must not be offered again."""

    def turn(self) -> Turn | None:
        """The next step; None where all jobs were cancelled meanwhile."""

    def warm_up(self) -> None:
        """Run every graph once, so that the first request finds it ready."""


class EncodeWorker:
    """Encoders: every step is a batch of whole sequences, and all of it ends with the step."""

    def __init__(self, graph: EncoderGraph, max_batch_tokens: int) -> None:
        self._graph, self._max_batch_tokens = graph, max_batch_tokens
        self._jobs: list[Job] = []

    @property
    def jobs(self) -> Sequence[Job]:
        """See ``Worker``."""
        return self._jobs

    @property
    def busy(self) -> bool:
        """See ``Worker``."""
        return False

    def take(self, waiting: Sequence[Job], most: int) -> list[Job]:
        """See ``Worker``."""
        places = form_batch([job.tokens for job in waiting], most, self._max_batch_tokens)
        self._jobs = [waiting[place] for place in places]
        return self._jobs

    def turn(self) -> Turn | None:
        """See ``Worker``."""
        jobs = tuple(job for job in self._jobs if not job.cancelled)
        if not jobs:
            self._forget()
            return None
        work = tuple(Work(job.item.request_id, Phase.ENCODE, job.tokens) for job in jobs)
        return Turn(jobs, work, _padding(jobs), lambda: self._encode(jobs), self._forget)

    def warm_up(self) -> None:
        """See ``Worker``."""
        self._graph.run([[0]])

    def _encode(self, jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
        types = [job.item.token_types if isinstance(job.item, EncodeItem) else () for job in jobs]
        logits = self._graph.run([job.item.input_ids for job in jobs], types)["logits"]
        self._forget()
        # A span head scores every token, padding too.
        return [
            (job, row[: job.tokens].copy() if row.ndim == 2 else row) for job, row in zip(jobs, logits, strict=True)
        ]

    def _forget(self) -> None:
        self._jobs = []


class _Source(NamedTuple):
    """What reads sources, and the id that a text over one starts from."""

    graph: EncoderGraph
    bos: int


class _Place:
    """A job that occupies rows, and what it does there: write a text, or (None) have its tokens scored."""

    def __init__(self, job: Job, text: Text | None) -> None:
        self.job, self.text = job, text
        self.rows: list[int] = []
        self.next_ids: Sequence[int] = ()
        """What each of the rows reads next."""


class WriteWorker:
    """Everything that writes, by continuous batching: jobs come and go between steps, each with rows of its own.

    A step either lets new jobs read their prompts or sources, or lets every row read one token.
    """

    def __init__(
        self,
        manifest: Manifest,
        decoder: DecoderGraph,
        source: EncoderGraph | None,
        max_rows: int,
        max_batch_tokens: int,
    ) -> None:
        """``source`` reads the sources of an encoder-decoder; other models read prompts.

        Raises ``ArtefactError`` where nothing says how a text over a source begins.
        """
        self._manifest, self._decoder = manifest, decoder
        self._source: _Source | None = None
        if source is not None:
            bos = manifest.special_ids.bos
            if bos is None:
                raise ArtefactError("manifest.json: an encoder-decoder needs the special id bos")
            self._source = _Source(source, bos)
        self._max_batch_tokens = max_batch_tokens
        self._rows: Rows[_Place] = Rows(max_rows)
        self._new: list[Job] = []

    @property
    def jobs(self) -> Sequence[Job]:
        """See ``Worker``."""
        return [*self._new, *(place.job for place in self._rows.owners)]

    @property
    def busy(self) -> bool:
        """See ``Worker``."""
        return self._rows.used > 0

    def take(self, waiting: Sequence[Job], most: int) -> list[Job]:
        """See ``Worker``."""
        fitting: list[int] = []
        rows = 0
        for job in waiting:
            rows += job.rows
            # In order of arrival: one that needs many rows is not overtaken until it starves.
            if rows > self._rows.free:
                break
            fitting.append(job.tokens)
        self._new = []
        if fitting:
            self._new = [waiting[place] for place in form_batch(fitting, most, self._max_batch_tokens)]
        return self._new

    def turn(self) -> Turn | None:
        """See ``Worker``."""
        self._new = [job for job in self._new if not job.cancelled]
        for place in self._rows.owners:
            if place.job.cancelled:
                self._leave(place)
        if self._new:
            return self._reading(tuple(self._new))
        if self._rows.used:
            return self._writing()
        return None

    def warm_up(self) -> None:
        """See ``Worker``."""
        if self._source is None:
            self._decoder.prefill(0, [[0]])
        else:
            self._decoder.know_source(0, 1, {name: rows[0] for name, rows in self._source.graph.run([[0]]).items()})
        self._decoder.step([0])

    def _reading(self, jobs: tuple[Job, ...]) -> Turn:
        source = self._source
        if source is None:
            phase, run = Phase.PREFILL, lambda: self._read_prompts(jobs)
        else:
            phase, run = Phase.ENCODE, lambda: self._read_sources(jobs, source)
        work = tuple(Work(job.item.request_id, phase, job.tokens) for job in jobs)
        return Turn(jobs, work, _padding(jobs), run, lambda: self._drop(jobs))

    def _writing(self) -> Turn:
        places = self._rows.owners
        jobs = tuple(place.job for place in places)
        work = tuple(
            Work(
                place.job.item.request_id,
                Phase.DECODE,
                len(place.rows),
                sum(self._decoder.context(row) for row in place.rows),
            )
            for place in places
        )
        return Turn(jobs, work, 0, lambda: self._write(places), lambda: self._drop(jobs))

    def _read_sources(self, jobs: Sequence[Job], source: _Source) -> list[tuple[Job, Result]]:
        crosses = source.graph.run([job.item.input_ids for job in jobs])
        for number, place in enumerate(self._join(jobs)):
            place.next_ids = [source.bos] * len(place.rows)
            for row in place.rows:
                self._decoder.know_source(
                    row, place.job.tokens, {name: rows[number] for name, rows in crosses.items()}
                )
        return []

    def _read_prompts(self, jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
        places = self._join(jobs)
        logits, extracted = self._decoder.prefill(places[0].rows[0], [job.item.input_ids for job in jobs])
        results: list[Result | None] = []
        for number, place in enumerate(places):
            if place.text is None:
                results.append(extracted[number, : place.job.tokens])
                continue
            for row in place.rows[1:]:
                self._decoder.fork(place.rows[0], row)
            results.append(self._advance(place, logits[[number] * len(place.rows)]))
        return self._ended(places, results)

    def _write(self, places: Sequence[_Place]) -> list[tuple[Job, Result]]:
        next_ids = [0] * self._rows.used
        for place in places:
            for row, token in zip(place.rows, place.next_ids, strict=True):
                next_ids[row] = token
        logits = self._decoder.step(next_ids)
        return self._ended(places, [self._advance(place, logits[place.rows]) for place in places])

    def _advance(self, place: _Place, logits: NDArray[np.float32]) -> Result | None:
        """Choose the next tokens of one text from the logits of its rows; None as long as it goes on."""
        if place.text is None:
            return None
        try:
            outcome = place.text.advance(logits)
        except Exception as error:  # a callback's, perhaps: it is this text's alone
            return error
        if isinstance(outcome, Written):
            return outcome
        place.rows, copies = continue_rows(place.rows, outcome)
        for copy in copies:
            self._decoder.fork(copy.source, copy.target)
        place.next_ids = place.text.next_ids
        return None

    def _ended(self, places: Sequence[_Place], results: Sequence[Result | None]) -> list[tuple[Job, Result]]:
        """Free the rows of the jobs that have a result."""
        ended = []
        for place, result in zip(places, results, strict=True):
            if result is not None:
                ended.append((place.job, result))
                self._leave(place)
        return ended

    def _join(self, jobs: Sequence[Job]) -> list[_Place]:
        places = [_Place(job, self._text(job.item)) for job in jobs]
        self._rows.join(places, [job.rows for job in jobs])
        self._new = []
        return places

    def _text(self, item: Item) -> Text | None:
        if not isinstance(item, WriteItem):
            return None
        limit = self._manifest.config.max_positions
        if self._source is None:
            # A prompt and its text share the positions.
            limit -= len(item.input_ids)
        max_tokens = min(item.sampling.max_tokens, limit)
        return begin(item.sampling, max_tokens, self._manifest.special_ids.eos, item.should_stop)

    def _leave(self, place: _Place) -> None:
        for move in self._rows.leave(place):
            self._decoder.move(move.source, move.target)

    def _drop(self, jobs: Sequence[Job]) -> None:
        self._new = []
        for place in self._rows.owners:
            if place.job in jobs:
                self._leave(place)


def _padding(jobs: Sequence[Job]) -> int:
    lengths = [job.tokens for job in jobs]
    return padded_width(max(lengths)) * len(lengths) - sum(lengths)
