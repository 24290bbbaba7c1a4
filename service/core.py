"""A request's way through the service, whatever dialect it came in. Knows nothing of HTTP."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from energy.account import Account
from energy.ledger import Ledger
from energy.prediction import Followed, Forecast
from energy.types import NOTHING_BESIDE, Beside, Bill, Ended, Load, Phase, step_beside
from service.books import Books
from service.budgets import keep_within, to_learn, to_predict
from service.caller import Count, caller
from service.classifiers.store import Classifiers
from service.desk import Desk
from service.door import Door
from service.engine.types import EngineClosed, EngineFailed, Item, Output, Overloaded, Ticket, WriteItem, WriteOutput
from service.errors import (
    ClassifierNotFound,
    DailyBudgetSpent,
    DeadlineExceeded,
    EnergyBudgetExceeded,
    InvalidValue,
    KnowledgeBaseNotFound,
    ModelNotFound,
    NotReady,
)
from service.json_text import as_json
from service.knowledge.bases import Knowledge
from service.knowledge.documents import Document
from service.knowledge.ingest import Progress
from service.knowledge.store import Passage
from service.mailbox import Mailbox
from service.metrics import UJ_PER_J, Metrics
from service.models import Model, Models
from service.pace import Pace, Taken
from service.repository import Repository
from service.streaming import Transcript, overhear
from service.tasks.base import Encoded, Task, TaskRequest
from service.tracing import Tracing

NS_PER_MS = 1_000_000
_texts_log = logging.getLogger("wattle.texts")
_SHORT_LETTERS = 1000
"""Up to which texts are tokenised on the event loop: that takes less than handing them to a thread and back."""
_SHORT_TOKENS = 256
"""Up to which what was written is decoded there."""
_REFUSALS = (InvalidValue, ModelNotFound, ClassifierNotFound, KnowledgeBaseNotFound, Overloaded, EngineClosed)
"""What ends a request that asks for what there is not, also no longer, or for more than there is room for."""
T = TypeVar("T")


class Engine(Protocol):
    """What the service asks of an engine."""

    lost: EngineFailed | None
    """Why it has stopped of itself, where it has."""

    def submit(self, model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        """Queue all items or none, for a ``key``'s holder; raises ``Overloaded`` or ``EngineClosed``. Thread-safe."""

    def queue_depth(self) -> int:
        """Items that wait for their first step."""

    def running(self) -> int:
        """Items that are being computed."""


@dataclass(slots=True)
class Charge:
    """A request and, as they become known, its results and what they cost."""

    request_id: str
    task: str
    worker: str
    """What does the work: the name of a model, or of the index of the knowledge bases."""
    bill: Bill = field(init=False)
    """Once the request is over."""
    input_tokens: int = 0
    output_tokens: int = 0
    """Tokens written."""
    queue_ms: float = 0.0
    """From submission to the first step of any of its items."""
    compute_ms: float = 0.0
    """From the first step to the end of the last item; for a single item, the time of its steps."""
    outputs: Sequence[Output] = ()
    results: Sequence[BaseModel] = ()
    computed_s: float | None = None
    """When the engine was done (monotonic clock)."""
    beside: Beside = NOTHING_BESIDE
    """CPU time of what was short and beside the engine."""
    loads: Sequence[Load] | None = None
    """What fell to it of all steps that were recorded, once that is known."""

    def computed(self, outputs: Sequence[Output]) -> None:
        """The engine has done all items."""
        self.outputs, self.computed_s = outputs, time.monotonic()
        self.output_tokens = sum(len(output.output_ids) for output in outputs if isinstance(output, WriteOutput))
        timings = [output.timing for output in outputs]
        self.queue_ms = min((timing.queue_ns for timing in timings), default=0) / NS_PER_MS
        ends_ns = max((timing.queue_ns + timing.compute_ns for timing in timings), default=0)
        self.compute_ms = ends_ns / NS_PER_MS - self.queue_ms

    def ended(self, status: str, key: str | None) -> Ended:
        """What the account keeps of it, once it is over."""
        return (
            self.request_id,
            self.task,
            self.worker,
            status,
            self.input_tokens,
            self.output_tokens,
            self.queue_ms,
            self.compute_ms,
            key,
        )


@dataclass(slots=True)
class Receipt(Charge):
    """The charge of a task, and the model that does it."""

    model: Model = field(kw_only=True)
    followed: Followed | None = None
    """Where its bill will be compared with what was foretold."""
    taken: Taken | None = None
    """What is short and beside the engine takes; None before any of it."""


ChargeT = TypeVar("ChargeT", bound=Charge)


class Listener(Protocol):
    """Whoever follows a request while it runs; called on the event loop."""

    def accepted(self, receipt: Receipt) -> None:
        """The engine has taken all of the request."""

    def wrote(self, number: int, piece: str) -> None:
        """``piece`` is how the text of a number goes on; what is never told so is in the results."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would cost; ``forecast`` is None as long as nothing like it was billed."""

    model: Model
    input_tokens: int
    forecast: Forecast | None


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that answers a request, wired once by ``create_app``."""

    repository: Repository
    engine: Engine
    account: Account
    ledger: Ledger
    metrics: Metrics
    books: Books
    door: Door
    max_client_batch_size: int
    request_timeout_s: float
    knowledge: Knowledge
    classifiers: Classifiers
    desk: Desk = field(default_factory=Desk)
    mailbox: Mailbox = field(default_factory=Mailbox)
    pace: Pace = field(default_factory=Pace)
    tracing: Tracing | None = None
    log_texts: bool = False

    @property
    def models(self) -> Models:
        """The models that are served just now."""
        return self.repository.models

    async def run(
        self, task: Task[Any, Any], request: TaskRequest, request_id: str, listener: Listener | None = None
    ) -> Receipt:
        """Do what ``request`` asks, and bill it. Raises what ``service.errors`` knows how to answer.

        Cancelling it takes the request's items out of the engine; the work done until then is billed all the same.
        """
        model, texts = self._choose(task, request)
        self._tell_texts(request_id, task=lambda: task.name, request=request.model_dump)
        self._require_budget(request)
        # A reading close to the start of the request's steps makes its figure sharp.
        self.account.wake()
        receipt = Receipt(request_id, task.name, model.name, model=model)
        at_once = self._most_at_once()
        with self._admitted(min(texts, at_once), texts) as count, self._billed(receipt):
            async with self._deadline(request.timeout_s), self.repository.use(model) as model:
                receipt.model = model
                grounded = await self._ground(task, request, request_id)
                is_short = task.letters(grounded) <= _SHORT_LETTERS
                encode = partial(task.encode, grounded, model, request_id)
                encoded = await self._beside(receipt, Phase.PREPROCESS, encode, is_short=is_short)
                receipt.input_tokens = sum(len(item.input_ids) for item in encoded.items)
                # A text that its client breaks off counts as if it had been written to its end.
                count.correct(receipt.input_tokens + _most_written(encoded.items))
                encoded = Encoded(self._foresee(task, request, encoded.items, receipt), encoded.plan)
                items = encoded.items if listener is None else await _overheard(task, encoded, model, listener)
                told = None if listener is None else _Told(task, encoded.plan, receipt, listener)
                receipt.computed(await self._compute(model, items, at_once if task.in_groups else len(items), told))
                count.correct(receipt.input_tokens + receipt.output_tokens)
                if receipt.followed is not None:
                    receipt.followed.written = to_learn(receipt.outputs)
                decode = partial(task.decode, encoded.plan, model, receipt.outputs)
                is_short = is_short and receipt.output_tokens <= _SHORT_TOKENS
                receipt.results = await self._beside(receipt, Phase.POST, decode, is_short=is_short)
                if is_short and grounded is request:
                    receipt.loads = [
                        output.timing.load for output in receipt.outputs if output.timing.load is not None
                    ]
        self._tell_texts(request_id, results=lambda: [result.model_dump() for result in receipt.results])
        return receipt

    async def estimate(self, task: Task[Any, Any], request: TaskRequest, request_id: str) -> Estimate:
        """What ``request`` would cost; nothing runs on a model. Raises what ``run`` raises before anything runs."""
        model, texts = self._choose(task, request)
        if task.lookup(request) is not None:
            raise InvalidValue("knowledge_base", "what is read is known only once it was searched; estimate a context")
        with self._admitted(texts):
            async with self._deadline(request.timeout_s):
                encoded = await asyncio.to_thread(task.encode, request, model, request_id)
        # Bills of an earlier process say nothing of what is not metered now.
        predict = self.books.predictor.predict
        forecast = predict(task.name, model.name, to_predict(encoded.items)) if self.account.is_metered else None
        return Estimate(model, sum(len(item.input_ids) for item in encoded.items), forecast)

    @contextmanager
    def _admitted(self, texts: int, requests: int | None = None) -> Iterator[Count]:
        """Hold places for ``texts`` texts, and count them or so many ``requests`` for their key: the way to all work.

        Raises ``Overloaded``, ``TooManyAtOnce`` and ``RateExceeded``.
        """
        who = caller()
        with self.door.admit(texts, who.tokens, who.key):
            count = who.count(texts if requests is None else requests)
            try:
                yield count
            except (Overloaded, EngineClosed):
                # Whoever is told to come again has had no answer yet.
                count.correct(0)
                raise

    def _deadline(self, asked_s: float | None = None) -> AbstractAsyncContextManager[None]:
        """The time that a request may take: the least of what its body and its header ask for, and of ours."""
        limits_s = (self.request_timeout_s, asked_s, caller().timeout_s)
        return _deadline(min(limit_s for limit_s in limits_s if limit_s is not None))

    def _tell_texts(self, request_id: str, **told: Callable[[], Any]) -> None:
        """Log what is asked or answered, where that is wanted; only then it is written out."""
        if self.log_texts:
            line = {name: write() for name, write in told.items()}
            _texts_log.info("%s", as_json({"request_id": request_id, **line}).decode())

    def _require_day(self) -> None:
        """Raise ``DailyBudgetSpent`` where the day has no joules left, or the caller's key has none."""
        key = caller().key
        own = None if key is None else self.books.today_of(key)
        for standing, name in ((self.books.today(), None), (own, caller().name)):
            if standing is not None and standing.is_spent:
                raise DailyBudgetSpent(standing.limit_uj / UJ_PER_J, standing.resets_in_s, name)

    def _require_budget(self, request: TaskRequest) -> None:
        """Raise ``DailyBudgetSpent``, or ``InvalidValue`` for a budget without meter."""
        self._require_day()
        if request.energy_budget_j is not None and not self.account.is_metered:
            raise InvalidValue("energy_budget_j", "no energy meter is read here, so no budget can be kept")

    def _foresee(
        self, task: Task[Any, Any], request: TaskRequest, items: tuple[Item, ...], receipt: Receipt
    ) -> tuple[Item, ...]:
        """Predict the bill, and hold ``items`` to the request's budget. Raises ``EnergyBudgetExceeded``."""
        if not self.account.is_metered:
            return items
        predictor, texts = self.books.predictor, partial(to_predict, items)
        receipt.followed = predictor.begin(receipt.request_id, receipt.task, receipt.worker, texts)
        if request.energy_budget_j is None:
            return items
        forecast = predictor.predict(receipt.task, receipt.worker, texts())
        budget_uj = round(request.energy_budget_j * UJ_PER_J)
        if forecast is not None and forecast.allocated_uj > budget_uj:
            interval_j = forecast.interval_uj and (
                forecast.interval_uj[0] / UJ_PER_J,
                forecast.interval_uj[1] / UJ_PER_J,
            )
            raise EnergyBudgetExceeded(request.energy_budget_j, forecast.allocated_uj / UJ_PER_J, interval_j)
        return keep_within(items, budget_uj, partial(self.account.spent_uj, receipt.request_id))

    async def search(
        self, base: str, question: str, passages: int, request_id: str, timeout_s: float | None = None
    ) -> tuple[Charge, list[Passage]]:
        """The passages of a knowledge base that bear most on ``question``, and what finding them cost."""
        self._tell_texts(request_id, task=lambda: "search", request=lambda: {"base": base, "question": question})
        self._require_day()
        self.account.wake()
        with self._admitted(1), self._billed(Charge(request_id, "search", self.knowledge.name)) as charge:
            async with self._deadline(timeout_s):
                (found,) = await self.knowledge.search(base, [question], passages, request_id)
        return charge, found

    async def ingest(
        self, base: str, documents: Sequence[Document], request_id: str
    ) -> AsyncGenerator[Progress | Charge]:
        """Put ``documents`` into a knowledge base: tells its progress, and at the end what it cost.

        It may take as long as it shows progress, each step within the time of a request. Whoever stops it keeps the
        documents that are stored. For its key's rate, every document is a request.
        """
        self._require_day()
        self.account.wake()
        charge = Charge(request_id, "ingest", self.knowledge.name)
        # One place at the door: however many they are, documents are worked on one after the other.
        with self._admitted(1, len(documents)), self._billed(charge):
            async with aclosing(self.knowledge.ingest(base, documents, request_id)) as steps:
                while True:
                    async with self._deadline():
                        progress = await anext(steps, None)
                    if progress is None:
                        break
                    yield progress
        yield charge

    async def _ground(self, task: Task[Any, Any], request: TaskRequest, request_id: str) -> TaskRequest:
        """The request with the passages that it wants from a knowledge base, if it wants any."""
        lookup = task.lookup(request)
        if lookup is None:
            return request
        found = await self.knowledge.search(lookup.knowledge_base, lookup.questions, lookup.passages, request_id)
        grounded: TaskRequest = task.ground(request, found)
        return grounded

    def _choose(self, task: Task[Any, Any], request: TaskRequest) -> tuple[Model, int]:
        if not self.models.served:
            raise NotReady("no model is loaded")
        texts, most = task.size(request), task.most_texts or self._most_at_once()
        if texts > most:
            raise InvalidValue(task.texts, f"holds {texts} texts; at most {most} are allowed")
        return task.choose(request, self.models), texts

    def _most_at_once(self) -> int:
        """How many texts of one request may be inside: more than its key may have would be refused for ever."""
        key = caller().key
        return min(self.max_client_batch_size, (key and key.concurrency) or self.max_client_batch_size)

    async def _beside(self, receipt: Receipt, phase: Phase, work: Callable[[], T], *, is_short: bool) -> T:
        """Do ``work`` and keep its CPU time: where it is short, which is charged in the end; else it is done on a
        thread of the pool, and recorded as a step beside the executors."""
        if not is_short:
            return await asyncio.to_thread(self._recorded, receipt, phase, work)
        await self.desk.turn()
        if not self.account.is_metered:
            return work()
        if receipt.taken is None:
            receipt.taken = self.pace.begin(receipt.task, receipt.worker)
        if phase in receipt.taken:
            receipt.beside = receipt.taken[phase]
            return work()
        began_ns = time.thread_time_ns()
        try:
            return work()
        finally:
            took_ns = time.thread_time_ns() - began_ns
            receipt.beside = self.pace.learn(receipt.task, receipt.worker, phase, took_ns)

    def _recorded(self, receipt: Receipt, phase: Phase, work: Callable[[], T]) -> T:
        started_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        try:
            return work()
        finally:
            cpu_ns, ended_ns = time.thread_time_ns() - cpu_ns, time.monotonic_ns()
            step = step_beside(receipt.worker, receipt.request_id, phase, started_ns, ended_ns, cpu_ns)
            self.account.record(step)

    async def _compute(
        self, model: Model, items: Sequence[Item], at_once: int, told: "_Told | None" = None
    ) -> list[Output]:
        """Have ``items`` computed, ``at_once`` at a time: others' come in between. All are timed from the first on.

        Raises what the engine raises. The first group is refused where there is no room, the others wait for it.
        """
        outputs: list[Output] = []
        started_ns = time.monotonic_ns()
        for first in range(0, len(items), max(1, at_once)):
            before_ns = time.monotonic_ns() - started_ns if first else 0
            tickets = await self._submit(model, items[first : first + at_once], is_patient=first > 0)
            try:
                if told is None:
                    outputs += [_delayed(output, before_ns) for output in await self._outputs(tickets)]
                    continue
                if not first:
                    told.accepted()
                for ticket in tickets:
                    outputs.append(_delayed(await self.mailbox.wait(ticket.future), before_ns))
                    told.done(outputs)
            finally:
                # Where one item has failed or nobody waits any longer, the others' rows are free at once.
                for ticket in tickets:
                    ticket.future.cancel()
        return outputs

    async def _submit(self, model: Model, items: Sequence[Item], *, is_patient: bool) -> list[Ticket]:
        while True:
            try:
                return self.engine.submit(model.key, items, caller().name or "")
            except Overloaded as overload:
                if not is_patient:
                    raise
                await asyncio.sleep(overload.retry_after_s)

    async def _outputs(self, tickets: Sequence[Ticket]) -> list[Output]:
        if len(tickets) == 1:
            return [await self.mailbox.wait(tickets[0].future)]
        return await asyncio.gather(*(self.mailbox.wait(ticket.future) for ticket in tickets))

    @contextmanager
    def _billed(self, charge: ChargeT) -> Iterator[ChargeT]:
        """Close the account of a request, however it ends."""
        status = "failed"
        key, started_s = caller().name, time.monotonic()
        try:
            yield charge
            status = "ok"
        except _REFUSALS:
            status = "refused"
            raise
        except DeadlineExceeded:
            status = "timed_out"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "cancelled"
            raise
        finally:
            charge.bill = self.account.close(charge.ended(status, key), charge.beside, charge.loads)
            self.metrics.request_over(charge, status, time.monotonic() - started_s)
            if self.tracing is not None:
                self.tracing.request_over(charge, status, started_s)


class _Told:
    """Tells a listener what the outputs of a request add to its texts."""

    def __init__(self, task: Task[Any, Any], plan: Any, receipt: Receipt, listener: Listener) -> None:
        self._task, self._plan, self._receipt, self._listener = task, plan, receipt, listener

    def accepted(self) -> None:
        """The engine has taken the first items."""
        self._listener.accepted(self._receipt)

    def done(self, outputs: Sequence[Output]) -> None:
        """There is one more of ``outputs``, which come in their order."""
        if piece := self._task.part(self._plan, self._receipt.model, outputs):
            self._listener.wrote(self._task.result_of(self._plan, len(outputs) - 1), piece)


async def _overheard(task: Task[Any, Any], encoded: Encoded[Any], model: Model, listener: Listener) -> Sequence[Item]:
    def transcribe() -> list[Transcript | None]:
        return [task.transcript(encoded.plan, model, number) for number in range(len(encoded.items))]

    def wrote(number: int, piece: str) -> None:
        listener.wrote(task.result_of(encoded.plan, number), piece)

    return list(overhear(encoded.items, await asyncio.to_thread(transcribe), wrote))


def _most_written(items: Sequence[Item]) -> int:
    return sum(item.sampling.max_tokens for item in items if isinstance(item, WriteItem))


def _delayed(output: Output, before_ns: int) -> Output:
    """An output of what was submitted only after so long."""
    if not before_ns:
        return output
    return replace(output, timing=replace(output.timing, queue_ns=output.timing.queue_ns + before_ns))


@asynccontextmanager
async def _deadline(limit_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise DeadlineExceeded(limit_s) from None
