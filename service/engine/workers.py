"""What one executor does for one model: takes jobs, and turns them into steps. Knows nothing of threads."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from energy.types import Phase, Work
from models.manifest import Manifest
from service.engine.batching import PACKED_PADDING_SHARE, PADDING_SHARE, form_batch, padded_width
from service.engine.buffers import Floats
from service.engine.devices import Logits, first_rows
from service.engine.graphs import EncoderGraph, WriteGraphs
from service.engine.lanes import BeamLane, Lane, New, PlainLane
from service.engine.prefixes import Prefixes
from service.engine.texts import Text, Written
from service.engine.types import Answer, EncodeItem, Item, Ticket, WriteItem

_TOGETHER = 4
"""Sources are read together once there is one for each whole so many texts that are being written."""
_HELD_NS = 20_000_000
"""Or once the first of them has waited for so long."""
Result = Floats | Written | Exception
"""Logits, a text, or what went wrong with this item alone."""


@dataclass(slots=True, eq=False)
class Job:
    """An item on its way through the engine."""

    item: Item
    submitted_ns: int
    key: str = ""
    """Whose it is; empty where there are no keys."""
    ticket: Ticket = field(default_factory=Ticket)
    started_ns: int | None = None
    compute_ns: int = 0
    load_ns: float = 0.0
    """About what falls to it of its steps' loads."""

    @property
    def tokens(self) -> int:
        """Tokens that it brings along."""
        return len(self.item.input_ids)

    @property
    def rows(self) -> int:
        """Rows that it occupies."""
        return self.item.sampling.beams if isinstance(self.item, WriteItem) else 1

    @property
    def is_watched(self) -> bool:
        """Whether something looks at every token of its text, and may end it."""
        return isinstance(self.item, WriteItem) and self.item.should_stop is not None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any longer."""
        return self.ticket.future.is_cancelled


@dataclass(frozen=True, slots=True)
class Turn:
    """One step that is ready to run."""

    jobs: tuple[Job, ...]
    work: Work
    """Of ``jobs`` in one forward pass."""
    padding_tokens: int
    run: Callable[[], Sequence[tuple[Job, Result]]]
    """A forward pass and what follows from it; returns the jobs that have ended."""
    abandon: Callable[[], None]
    """Called where ``run`` raised: forgets the jobs."""
    repeats: bool = False
    """Whether ``run`` may be called again, for one token more of each job, as long as none of them ends."""


class Worker(Protocol):
    """An executor's hands for one model."""

    @property
    def jobs(self) -> Sequence[Job]:
        """What it has taken and not finished."""

    @property
    def busy(self) -> bool:
        """Whether it has a step to run even without new jobs."""

    def load(self, jobs: Sequence[Job]) -> int:
        """How much work ``jobs`` are, in the unit in which executors divide it among them."""

    def holds_off(self, waiting: Sequence[Job], share: int) -> bool:
        """Whether it had rather see more come before it takes a load of about ``share`` from the ``waiting`` jobs. May
        be asked at any time, by its executor's thread."""

    def take(self, waiting: Sequence[Job], share: int) -> list[Job]:
        """Which of the ``waiting`` jobs it can begin now, a load of about ``share``; they must not come again."""

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

    def load(self, jobs: Sequence[Job]) -> int:
        """See ``Worker``. Tokens: all of them are computed in one step, and who has more of them ends later."""
        return sum(job.tokens for job in jobs)

    def holds_off(self, waiting: Sequence[Job], share: int) -> bool:
        """See ``Worker``. Its steps are full enough without."""
        return False

    def take(self, waiting: Sequence[Job], share: int) -> list[Job]:
        """See ``Worker``."""
        lengths = [job.tokens for job in waiting]
        places = form_batch(lengths, len(lengths), self._max_batch_tokens, PACKED_PADDING_SHARE, share)
        self._jobs = [waiting[place] for place in places]
        return self._jobs

    def turn(self) -> Turn | None:
        """See ``Worker``."""
        jobs = tuple(job for job in self._jobs if not job.cancelled)
        if not jobs:
            self._forget()
            return None
        work = _reading(Phase.ENCODE, jobs)
        return Turn(jobs, work, _padding(work), lambda: self._encode(jobs), self._forget)

    def warm_up(self) -> None:
        """See ``Worker``."""
        self._graph.run([[0]])

    def _encode(self, jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
        types = [job.item.token_types if isinstance(job.item, EncodeItem) else () for job in jobs]
        outputs = self._graph.run([job.item.input_ids for job in jobs], types)
        self._forget()
        return [(job, _of(job, row, outputs)) for row, job in enumerate(jobs)]

    def _forget(self) -> None:
        self._jobs = []


def _of(job: Job, row: int, outputs: Mapping[str, Floats]) -> Floats:
    """What ``job`` wants of the outputs of a step."""
    wants_vector = isinstance(job.item, EncodeItem) and job.item.wants_vector
    output: Floats = outputs["vector" if wants_vector and "vector" in outputs else "logits"][row]
    # A span head scores every token, padding too.
    return output[: job.tokens].copy() if output.ndim == 2 else output


class _Reader:
    """A prompt that is read piece by piece, in a buffer of its own, and what follows it so far."""

    def __init__(self, job: Job, read: int) -> None:
        self.job, self.read = job, read


class WriteWorker:
    """Everything that writes, by continuous batching: jobs come and go between steps, each with rows of its own.

    A step lets new jobs read their prompts or sources, or one long prompt a piece further, or every row of a lane
    read one token. There is a lane for each number of beams that somebody asks for; lanes take turns.
    """

    def __init__(self, manifest: Manifest, graphs: WriteGraphs, limits: "Limits") -> None:
        self._manifest, self._graphs, self._limits = manifest, graphs, limits
        self._lanes: dict[int, Lane[Job]] = {}
        """By number of beams, the one that has waited longest for a step first."""
        self._new: list[Job] = []
        self._reader: _Reader | None = None
        self._reader_waits = False
        self._cancellations = Answer.cancellations
        """How many there had been when it last looked whose they are."""
        self._prefixes = Prefixes(limits.prefix_bytes)
        # A prefix is read in both directions, all of it at once.
        self._reads_in_pieces = manifest.config.architecture == "decoder"
        self._usual = usual_beams(manifest, limits.rows)

    @property
    def jobs(self) -> Sequence[Job]:
        """See ``Worker``."""
        reading = [] if self._reader is None else [self._reader.job]
        return [*self._new, *reading, *(job for lane in self._lanes.values() for job in lane.keys)]

    @property
    def busy(self) -> bool:
        """See ``Worker``."""
        return self._reader is not None or any(lane.keys for lane in self._lanes.values())

    def load(self, jobs: Sequence[Job]) -> int:
        """See ``Worker``. Texts: each of them takes part in every step until it ends."""
        return len(jobs)

    def holds_off(self, waiting: Sequence[Job], share: int) -> bool:
        """See ``Worker``. A source is short, so that reading one is mostly what a step costs however small it is."""
        if self._graphs.source is None:
            return False
        texts = sum([len(lane.keys) for lane in self._lanes.values()])
        return share < texts // _TOGETHER and time.monotonic_ns() - waiting[0].submitted_ns < _HELD_NS

    def take(self, waiting: Sequence[Job], share: int) -> list[Job]:
        """See ``Worker``; never more than ``share``."""
        self._new = []
        free = self._limits.rows - sum(job.rows for job in self.jobs)
        known = {job: self._known(job) for job in waiting} if self._reads_in_pieces else {}
        slow = {job for job, prefix in known.items() if prefix or job.tokens > self._limits.piece_tokens}
        candidates = [job for job in waiting if self._reader is None or job not in slow]
        # In order of arrival: one that needs many rows is not overtaken until it starves.
        if not candidates or candidates[0].rows > free:
            return []
        first = candidates[0]
        if not self._has_memory_for(first.rows):
            return []
        if first in slow:
            self._reader = _Reader(first, 0)
            self._reader_waits = False
            if known[first]:
                self._graphs.reader.recall(0, known[first])
                self._reader.read = known[first][0].shape[1]
            else:
                self._graphs.reader.forget()
            return [first]
        # Those who begin together go into one lane.
        alike = [job for job in candidates if job.rows == first.rows and job not in slow][: free // first.rows]
        padding_share = PADDING_SHARE if self._graphs.source is None else PACKED_PADDING_SHARE
        chosen = form_batch([job.tokens for job in alike], share, self._limits.batch_tokens, padding_share)
        self._new = [alike[place] for place in chosen]
        return self._new

    def turn(self) -> Turn | None:
        """See ``Worker``."""
        if Answer.cancellations != self._cancellations:
            self._cancellations = Answer.cancellations
            self._forget_cancelled()
        if self._new:
            return self._reading(tuple(self._new))
        writing = [beams for beams, lane in self._lanes.items() if lane.keys]
        # A long prompt and the texts that are being written take turns.
        if self._reader is not None and not (writing and self._reader_waits):
            self._reader_waits = True
            return self._reading_on(self._reader)
        self._reader_waits = False
        if not writing:
            return None
        lane = self._lanes[writing[0]] = self._lanes.pop(writing[0])
        return self._writing(lane, is_alone=len(writing) == 1 and self._reader is None)

    def _forget_cancelled(self) -> None:
        self._new = [job for job in self._new if not job.cancelled]
        if self._reader is not None and self._reader.job.cancelled:
            self._reader = None
        for lane in self._lanes.values():
            lane.leave([job for job in lane.keys if job.cancelled])

    def warm_up(self) -> None:
        """See ``Worker``."""
        # Others get their buffers when somebody asks for them.
        for beams in self._usual if self._graphs.on_device else (1,):
            decoder = self._lane(beams).decoder
            if self._graphs.source is None:
                decoder.prefill(0, [[0]])
            else:
                decoder.read_sources(0, [[0]])
            decoder.warm_up()

    def _reading(self, jobs: tuple[Job, ...]) -> Turn:
        if self._graphs.source is None:
            phase, run = Phase.PREFILL, self._read_prompts
        else:
            phase, run = Phase.ENCODE, self._read_sources
        work = _reading(phase, jobs)
        return Turn(jobs, work, _padding(work), lambda: run(jobs), lambda: self._drop(jobs))

    def _reading_on(self, reader: _Reader) -> Turn:
        job = reader.job
        piece = job.item.input_ids[reader.read : reader.read + self._limits.piece_tokens]
        work = Work(Phase.PREFILL, [job.item.request_id], [len(piece)], [reader.read])
        return Turn((job,), work, 0, lambda: self._read_on(reader, piece), lambda: self._drop((job,)))

    def _writing(self, lane: Lane[Job], is_alone: bool) -> Turn:
        jobs, decoder = tuple(lane.keys), lane.decoder
        names = [job.item.request_id for job in jobs]
        work = Work(Phase.DECODE, names, [decoder.beams] * len(jobs), decoder.contexts(len(jobs)))
        # Who looks at a text's tokens may want to know what those before have cost, which the end of a step tells.
        repeats = is_alone and not any([job.is_watched for job in jobs])
        padding = decoder.padding_rows(len(jobs) * decoder.beams)
        return Turn(jobs, work, padding, lane.write, lambda: self._drop(jobs), repeats)

    def _read_sources(self, jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
        lane = self._lane(jobs[0].rows)
        lane.decoder.read_sources(len(lane.keys), [job.item.input_ids for job in jobs])
        return self._begin(lane, jobs, None)

    def _read_prompts(self, jobs: Sequence[Job]) -> list[tuple[Job, Result]]:
        lane = self._lane(jobs[0].rows)
        # Those that only have their tokens scored come last, so that their rows are free at once.
        jobs = sorted(jobs, key=lambda job: not isinstance(job.item, WriteItem))
        writers = [job for job in jobs if isinstance(job.item, WriteItem)]
        prompts = [job.item.input_ids for job in jobs]
        logits, extracted = lane.decoder.prefill(len(lane.keys) * lane.decoder.beams, prompts)
        scored: list[tuple[Job, Result]] = [
            (job, extracted[row, : job.tokens]) for row, job in enumerate(jobs) if job not in writers
        ]
        if self._reads_in_pieces:
            for text, job in enumerate(writers, len(lane.keys)):
                self._prefixes.keep(job.item.input_ids, partial(lane.decoder.remember, text))
        return scored + self._begin(lane, writers, first_rows(logits, len(writers)))

    def _read_on(self, reader: _Reader, piece: Sequence[int]) -> list[tuple[Job, Result]]:
        logits = self._graphs.reader.read_on(piece)
        reader.read += len(piece)
        job = reader.job
        if reader.read < job.tokens:
            return []
        self._reader = None
        self._prefixes.keep(job.item.input_ids, partial(self._graphs.reader.remember, 0))
        lane = self._lane(job.rows)
        lane.decoder.adopt(len(lane.keys), self._graphs.reader)
        return self._begin(lane, [job], logits)

    def _known(self, job: Job) -> list[Floats]:
        return self._prefixes.find(job.item.input_ids) if isinstance(job.item, WriteItem) else []

    def _begin(self, lane: Lane[Job], jobs: Sequence[Job], logits: Logits | None) -> list[tuple[Job, Result]]:
        self._new = []
        return list(lane.begin(jobs, [self._start(job.item) for job in jobs], logits))

    def _start(self, item: Item) -> New:
        assert isinstance(item, WriteItem)
        limit, special = self._manifest.config.max_positions, self._manifest.special_ids
        if self._graphs.source is None:
            # A prompt and its text share the positions.
            limit -= len(item.input_ids)
        max_tokens = min(item.sampling.max_tokens, limit)
        return New(Text(item, max_tokens, special.eos), item.sampling, max_tokens, special.bos or 0)

    def _has_memory_for(self, beams: int) -> bool:
        """Whether there may be a lane of so many beams: a device has memory for one that is not usual. On the host its
        rows take memory as they are used."""
        unusual = {job.rows for job in self.jobs} - {*self._usual} if self._graphs.on_device else set()
        return beams in self._usual or unusual <= {beams}

    def _lane(self, beams: int) -> Lane[Job]:
        if beams not in self._lanes:
            is_usual = beams in self._usual
            if self._graphs.on_device and not is_usual:
                # Nobody writes in those: see ``_has_memory_for``.
                self._lanes = {each: lane for each, lane in self._lanes.items() if each in self._usual}
            decoder = self._graphs.decoder(self._limits.rows // beams, beams, records=is_usual)
            if beams == 1:
                self._lanes[beams] = PlainLane(decoder)
            else:
                self._lanes[beams] = BeamLane(decoder, self._graphs.beams, self._manifest.special_ids.eos)
        return self._lanes[beams]

    def _drop(self, jobs: Sequence[Job]) -> None:
        self._new = []
        if self._reader is not None and self._reader.job in jobs:
            self._reader = None
        for lane in self._lanes.values():
            lane.leave([job for job in lane.keys if job in jobs])


def usual_beams(manifest: Manifest, rows: int) -> list[int]:
    """With how many beams a model's texts are written mostly, where it has so many ``rows``."""
    default = manifest.generation.beams if manifest.generation else 1
    return sorted({1, min(default, rows)})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a worker that writes takes on at once."""

    rows: int
    """Of all lanes together."""
    batch_tokens: int
    """Of one forward pass over new prompts or sources, counted with padding."""
    piece_tokens: int
    """Of a prompt that one step reads; longer ones are read in pieces, between the steps of other texts."""
    prefix_bytes: int
    """Of the beginnings of prompts that are kept for prompts to come."""


def _reading(phase: Phase, jobs: Sequence[Job]) -> Work:
    return Work(phase, [job.item.request_id for job in jobs], [job.tokens for job in jobs])


def _padding(work: Work) -> int:
    lengths = work.tokens
    return padded_width(max(lengths)) * len(lengths) - sum(lengths)
