"""What a request will probably cost, learned from the bills of those before it. Knows nothing of models or HTTP.

A request's work is counted in the same units as when its bill was made (``energy.attribution``), apart for reading
and for writing; how many joules a unit costs, and how long a text becomes, are fitted to what was settled.
"""

import threading
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from energy.attribution import DEFAULTS, Coefficients
from energy.types import Bill, Bills, SettledRecord

_DECAY = 0.99
"""Weight of a bill after each later one: about the last hundred count, so that a change of load is followed."""
_TIE = 0.001
"""How strongly each of the two rates is held to one for both, as a share of what was seen of it: as long as all
requests are alike, nothing tells reading from writing, and both cost the same per unit of work."""
_COMPARED = 200
"""Latest predictions that are compared with their bills."""
_ENOUGH = 10
"""Comparisons from which on an interval is given."""
_FOLLOWED = 4
"""Requests of one task on one model that are followed at a time. Where more run, the next to be followed is the first
that comes after one of them is settled, whatever it is like; the bills of all would say no more than theirs."""
COVERAGE = 0.8
"""Share of the compared bills that lay in the interval."""


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence that a request's model reads, and what it may write after it."""

    input_tokens: int
    max_output_tokens: int = 0
    """0 where nothing is written."""
    beams: int = 1


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a ``Text`` that was to be written."""

    output_tokens: int
    ended: bool
    """Whether it ended by itself; otherwise it was cut and would have become longer."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a request is expected to cost."""

    output_tokens: int
    active_uj: int
    allocated_uj: int
    gco2e: float
    interval_uj: tuple[int, int] | None
    """Of ``allocated_uj``: the bills of ``COVERAGE`` of the compared requests would lie in it; None before there are
    enough of them."""
    relative_error: float | None
    """Median of |predicted - billed| / billed over the compared requests; None before there are any."""
    compared: int


class _Fit:
    """Least squares of several targets on two features, by rates that are not negative; older samples fade.

    A sample's error counts relative to its size, so that long requests don't drown short ones.
    """

    def __init__(self, targets: int) -> None:
        self._xx, self._xy, self._yy = 0.0, 0.0, 0.0
        self._moments = [(0.0, 0.0)] * targets

    def learn(self, x: float, y: float, values: Sequence[float]) -> None:
        """One sample: its two features, at least one of them positive, and its targets."""
        weight = 1 / (x + y) ** 2
        self._xx = _DECAY * self._xx + weight * x * x
        self._xy = _DECAY * self._xy + weight * x * y
        self._yy = _DECAY * self._yy + weight * y * y
        self._moments = [
            (_DECAY * a + weight * x * value, _DECAY * b + weight * y * value)
            for (a, b), value in zip(self._moments, values, strict=True)
        ]

    def predict(self, x: float, y: float) -> list[float]:
        """The expected targets."""
        return [p * x + q * y for p, q in map(self._rates, self._moments)]

    def _rates(self, moments: tuple[float, float]) -> tuple[float, float]:
        a, b = moments
        # The one rate that fits best for both features alike.
        common = (a + b) / (self._xx + 2 * self._xy + self._yy)
        xx, yy = self._xx * (1 + _TIE), self._yy * (1 + _TIE)
        a, b = a + _TIE * self._xx * common, b + _TIE * self._yy * common
        determinant = xx * yy - self._xy**2
        if not determinant:
            # One of the features was always zero.
            return common, common
        p, q = (a * yy - b * self._xy) / determinant, (b * xx - a * self._xy) / determinant
        if p < 0:
            return 0.0, b / yy
        if q < 0:
            return a / xx, 0.0
        return p, q


class _Latest:
    """The latest numbers, by size."""

    def __init__(self, count: int) -> None:
        self._arrived: deque[float] = deque(maxlen=count)
        self.ordered: list[float] = []

    def add(self, number: float) -> None:
        """One more; the oldest goes where there are too many."""
        if len(self._arrived) == self._arrived.maxlen:
            del self.ordered[bisect_left(self.ordered, self._arrived[0])]
        self._arrived.append(number)
        insort(self.ordered, number)

    @property
    def median(self) -> float | None:
        """The middle by size; None where there are none."""
        count = len(self.ordered)
        return (self.ordered[(count - 1) // 2] + self.ordered[count // 2]) / 2 if count else None


@dataclass(slots=True)
class _History:
    """What is known of one task on one model."""

    coefficients: Coefficients
    cost: _Fit = field(default_factory=lambda: _Fit(3))
    """Active and allocated microjoules and grams, on work of reading and of writing."""
    length: _Fit | None = None
    """Tokens written, on 1 and tokens read; None before any text."""
    billed_over_predicted: _Latest = field(default_factory=lambda: _Latest(_COMPARED))
    relative_errors: _Latest = field(default_factory=lambda: _Latest(_COMPARED))


@dataclass(slots=True)
class Followed:
    """A request that runs, and whose bill will be compared and learned from."""

    key: tuple[str, str]
    """Task and model."""
    texts: Sequence[Text]
    forecast: Forecast | None
    written: Sequence[Written] | None = None
    """An entry for each of its texts, once they are computed; whoever runs it puts it here before its bill is settled.
    """


class Predictor:
    """Predicts the bills of one process; every method may be called from any thread.

    A request that is begun must be settled, whatever became of it. Of many that run at once some are followed: their
    predictions are compared with their bills, and learned from.
    """

    def __init__(self, coefficients: Mapping[str, Coefficients] | None = None) -> None:
        """``coefficients`` are by model, for those that were calibrated, and may come to hold more of them."""
        self._coefficients = {} if coefficients is None else coefficients
        self._lock = threading.Lock()
        self._histories: dict[tuple[str, str], _History] = {}
        self._followed: dict[str, Followed] = {}
        self._count: Counter[tuple[str, str]] = Counter()
        """How many are followed."""

    def predict(self, task: str, model: str, texts: Sequence[Text]) -> Forecast | None:
        """What a request would cost; None before anything like it was billed."""
        with self._lock:
            history = self._histories.get((task, model))
            return None if history is None else _forecast(history, texts)

    def begin(self, request_id: str, task: str, model: str, texts: Callable[[], Sequence[Text]]) -> Followed | None:
        """A request will now run: foretell it, if it is to be followed; nobody asks for the ``texts`` of others."""
        key = task, model
        if self._count[key] >= _FOLLOWED:
            return None
        known = texts()
        followed = Followed(key, known, self.predict(task, model, known))
        with self._lock:
            self._followed[request_id] = followed
            self._count[key] += 1
        return followed

    def settled(self, bills: Iterable[Bills]) -> list[tuple[SettledRecord, float]]:
        """Learn from bills; returns those that had been predicted, with the relative error of that."""
        with self._lock:
            followed = [
                each[number]
                for each in bills
                for number, request in enumerate(each.requests)
                if request[0] in self._followed
            ]
            errors = [
                (record, self._compare(record, self._followed.pop(record.bill.request_id))) for record in followed
            ]
        return [(record, error) for record, error in errors if error is not None]

    def learn_past(self, records: Iterable[SettledRecord]) -> None:
        """Learn from the bills of an earlier process, oldest first, each as if it had been for a single text."""
        with self._lock:
            for record in records:
                request, figures = record.request, _figures(record.bill)
                if request.status == "ok" and request.input_tokens and figures is not None:
                    text = Text(request.input_tokens, request.output_tokens)
                    self._learn(record, figures, [text], [Written(request.output_tokens, ended=True)])

    def _compare(self, record: SettledRecord, followed: Followed) -> float | None:
        """Learn from a bill; returns the relative error of its prediction, None where there was none."""
        self._count[followed.key] -= 1
        figures = _figures(record.bill)
        if followed.written is None or figures is None:
            return None
        history = self._learn(record, figures, followed.texts, followed.written)
        if followed.forecast is None or not followed.forecast.allocated_uj:
            return None
        ratio = figures[1] / followed.forecast.allocated_uj
        relative_error = abs(1 / ratio - 1)
        history.billed_over_predicted.add(ratio)
        history.relative_errors.add(relative_error)
        return relative_error

    def _learn(
        self, record: SettledRecord, figures: Sequence[float], texts: Sequence[Text], written: Sequence[Written]
    ) -> _History:
        key = record.request.task, record.request.model
        if key not in self._histories:
            self._histories[key] = _History(self._coefficients.get(record.request.model, DEFAULTS))
        history = self._histories[key]
        work = _work(history.coefficients, texts, [each.output_tokens for each in written])
        history.cost.learn(*work, figures)
        for text, end in zip(texts, written, strict=True):
            if text.max_output_tokens:
                _learn_length(history, text, end)
        return history


def _forecast(history: _History, texts: Sequence[Text]) -> Forecast:
    lengths = [_expected_length(history, text) for text in texts]
    active_uj, allocated_uj, gco2e = history.cost.predict(*_work(history.coefficients, texts, lengths))
    ratios = history.billed_over_predicted.ordered
    interval_uj = None
    if len(ratios) >= _ENOUGH:
        tail = int(len(ratios) * (1 - COVERAGE) / 2)
        interval_uj = round(allocated_uj * ratios[tail]), round(allocated_uj * ratios[-1 - tail])
    return Forecast(
        output_tokens=round(sum(lengths)),
        active_uj=round(active_uj),
        allocated_uj=round(allocated_uj),
        gco2e=gco2e,
        interval_uj=interval_uj,
        relative_error=history.relative_errors.median,
        compared=len(ratios),
    )


def _work(known: Coefficients, texts: Sequence[Text], lengths: Sequence[float]) -> tuple[float, float]:
    """Units of work of reading ``texts`` in one step, and of writing that many tokens to each side by side."""
    reading = known.fixed + known.prefill_token * sum(text.input_tokens for text in texts)
    writing = known.fixed * max(lengths, default=0)
    for text, length in zip(texts, lengths, strict=True):
        context_tokens = length * (text.input_tokens + length / 2)
        writing += text.beams * (known.decode_token * length + known.context_token * context_tokens)
    return reading, writing


def _figures(bill: Bill) -> tuple[float, float, float] | None:
    """What is predicted of a bill; None where it is not known, or nothing can be relative to it."""
    if bill.active_uj is None or not bill.allocated_uj or bill.gco2e is None:
        return None
    return bill.active_uj, bill.allocated_uj, bill.gco2e


def _learn_length(history: _History, text: Text, end: Written) -> None:
    tokens: float = end.output_tokens
    if history.length is None:
        history.length = _Fit(1)
    elif not end.ended:
        # All that is known is that the text would have been longer.
        tokens = max(tokens, history.length.predict(1, text.input_tokens)[0])
    history.length.learn(1, text.input_tokens, [tokens])


def _expected_length(history: _History, text: Text) -> float:
    """Tokens that will be written after a text."""
    if not text.max_output_tokens:
        return 0.0
    if history.length is None:
        # Only texts that write nothing were seen, as when a task has a mode of each kind.
        return float(text.max_output_tokens)
    return min(history.length.predict(1, text.input_tokens)[0], text.max_output_tokens)
