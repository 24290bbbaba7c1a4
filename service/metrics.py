"""What `/metrics` shows, for Prometheus. No label ever tells one caller from another.

Names follow text-embeddings-inference; joules end in ``_joules_total``, as Kepler's do.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from energy.account import Totals
from energy.ledger import Ledger
from energy.types import RequestRecord, Step

if TYPE_CHECKING:
    from service.core import Charge

UJ_PER_J = 1_000_000
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_JOULES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_RELATIVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
_TOKENS = (8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384)


MetricT = TypeVar("MetricT", bound=MetricWrapperBase)
T = TypeVar("T")
_TOGETHER = 32
"""Of steps and of requests, how many are counted at once."""


class _Labelled(Generic[MetricT]):
    """A metric, by the values of its labels: the library's own look-up costs more than counting."""

    def __init__(self, metric: MetricT) -> None:
        self._metric = metric
        self._known: dict[tuple[str, ...], MetricT] = {}

    def __call__(self, *values: str) -> MetricT:
        """Raises ``ValueError`` for the wrong number of values."""
        child = self._known.get(values)
        if child is None:
            child = self._known[values] = self._metric.labels(*values)
        return child


class Metrics:
    """The metrics of one service. Methods may be called from any thread."""

    def __init__(self) -> None:
        # Another gauge per counter, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._steps: deque[Step] = deque()
        self._over: deque[tuple[Charge, str, float]] = deque()
        """What is still to be counted: one by one, between other work, counting takes three times as long."""
        by_model = ("task", "model")
        self._requests = _Labelled(
            Counter("wattle_request_count", "Requests that are over.", (*by_model, "status"), registry=self._registry)
        )
        self._input_tokens = _Labelled(
            Counter("wattle_input_tokens", "Tokens read.", by_model, registry=self._registry)
        )
        self._output_tokens = _Labelled(
            Counter("wattle_output_tokens", "Tokens written.", by_model, registry=self._registry)
        )
        self._queue = self._histogram("wattle_queue_duration_seconds", "From submission to the first step.", _SECONDS)
        self._inference = self._histogram("wattle_inference_duration_seconds", "From the first step on.", _SECONDS)
        self._duration = self._histogram("wattle_request_duration_seconds", "The whole request.", _SECONDS)
        self._energy = _Labelled(
            Histogram(
                "wattle_request_energy_joules",
                "Allocated energy per request, as billed when it was over.",
                (*by_model, "quality"),
                buckets=_JOULES,
                registry=self._registry,
            )
        )
        self._carbon = _Labelled(
            Counter(
                "wattle_carbon_grams",
                "CO2-equivalent of the allocated energy of requests, as billed when they were over.",
                by_model,
                registry=self._registry,
            )
        )
        self._prediction = _Labelled(
            Histogram(
                "wattle_energy_prediction_relative_error",
                "|predicted - billed| / billed allocated energy, of requests that were predicted before they ran.",
                by_model,
                buckets=_RELATIVE,
                registry=self._registry,
            )
        )
        self._loads = Histogram(
            "wattle_model_load_seconds",
            "Loads of models while the service runs, from verifying the folder to the first request.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._unloads = Counter(
            "wattle_model_unloads",
            "Models that have left memory, and why.",
            ("model", "reason"),
            registry=self._registry,
        )
        self._batch_size = _Labelled(
            Histogram("wattle_batch_next_size", "Rows of a step.", ("model",), buckets=_SIZES, registry=self._registry)
        )
        self._batch_tokens = _Labelled(
            Histogram(
                "wattle_batch_next_tokens",
                "Tokens of a forward pass, counted with padding.",
                ("model",),
                buckets=_TOKENS,
                registry=self._registry,
            )
        )

    def watch_models(self, memory_bytes: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Show, at every scrape, what the models in memory take at most, and how many requests wait for one."""
        memory = Gauge("wattle_models_memory_bytes", "Most that the models in memory take.", registry=self._registry)
        memory.set_function(memory_bytes)
        wait = Gauge("wattle_models_waiting", "Requests that wait for a model's loading.", registry=self._registry)
        wait.set_function(waiting)

    def model_loaded(self, model: str, elapsed_s: float) -> None:
        """Count a model that was loaded while the service ran."""
        self._loads.labels(model).observe(elapsed_s)

    def model_left(self, model: str, reason: str) -> None:
        """Count a model that has left memory."""
        self._unloads.labels(model, reason).inc()

    def watch(
        self,
        waiting: Callable[[], int],
        running: Callable[[], int],
        totals: Callable[[], Totals],
        ledger: Ledger,
    ) -> None:
        """Show, at every scrape, the engine's state, the ledger's, and the energy account in one snapshot."""
        self._registry.register(_Live(waiting, running, totals, ledger))

    def step(self, step: Step) -> None:
        """Count a step of the engine; one without work is a warm-up."""
        if step.work is None:
            return
        self._steps.append(step)
        if len(self._steps) >= _TOGETHER:
            self._count()

    def request_over(self, charge: "Charge", status: str, elapsed_s: float) -> None:
        """Count a request, however it ended."""
        self._over.append((charge, status, elapsed_s))
        if len(self._over) >= _TOGETHER:
            self._count()

    def _count(self) -> None:
        """Count what is left to be counted."""
        for step in _taken(self._steps):
            self._count_step(step)
        for over in _taken(self._over):
            self._count_request(*over)

    def _count_step(self, step: Step) -> None:
        assert step.work is not None
        self._batch_size(step.model).observe(len(step.work.request_ids))
        self._batch_tokens(step.model).observe(sum(step.work.tokens) + step.padding_tokens)

    def _count_request(self, charge: "Charge", status: str, elapsed_s: float) -> None:
        labels = (charge.task, charge.worker)
        self._requests(*labels, status).inc()
        self._duration(*labels).observe(elapsed_s)
        if charge.outputs:
            self._input_tokens(*labels).inc(charge.input_tokens)
            self._output_tokens(*labels).inc(charge.output_tokens)
            self._queue(*labels).observe(charge.queue_ms / 1000)
            self._inference(*labels).observe(charge.compute_ms / 1000)
        if charge.bill.allocated_uj is not None:
            self._energy(*labels, charge.bill.quality).observe(charge.bill.allocated_uj / UJ_PER_J)
        if charge.bill.gco2e is not None:
            self._carbon(*labels).inc(charge.bill.gco2e)

    def predicted(self, request: RequestRecord, relative_error: float) -> None:
        """Count a prediction that has met its bill."""
        self._prediction(request.task, request.model).observe(relative_error)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        self._count()
        return generate_latest(self._registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> _Labelled[Histogram]:
        return _Labelled(Histogram(name, documentation, ("task", "model"), buckets=buckets, registry=self._registry))


def _taken(waiting: deque[T]) -> Iterator[T]:
    """All that waits, which others may be taking as well."""
    while True:
        try:
            yield waiting.popleft()
        except IndexError:
            return


class _Live(Collector):
    """Figures that others keep and that are only read."""

    def __init__(
        self,
        waiting: Callable[[], int],
        running: Callable[[], int],
        totals: Callable[[], Totals],
        ledger: Ledger,
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._totals = totals
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """All of them; the energy from a single snapshot, so that every scrape balances."""
        yield GaugeMetricFamily("wattle_queue_size", "Items that wait for their first step.", self._waiting())
        yield GaugeMetricFamily("wattle_running_size", "Items that are being computed.", self._running())
        yield GaugeMetricFamily(
            "wattle_ledger_healthy", "1 where the ledger's latest write succeeded, else 0.", self._ledger.healthy
        )
        yield CounterMetricFamily(
            "wattle_ledger_dropped_records",
            "Records lost because too many waited for a ledger that could not be written.",
            self._ledger.dropped,
        )
        totals = self._totals()
        meter = CounterMetricFamily(
            "wattle_meter_energy_joules",
            "Energy counted and settled: the sum of attributed and unattributed.",
            labels=("device", "source"),
        )
        open_ = GaugeMetricFamily(
            "wattle_open_energy_joules", "Energy counted but not yet settled.", labels=("device",)
        )
        residual = GaugeMetricFamily(
            "wattle_energy_residual_joules",
            "What was counted less what is settled or open: 0, or there is an error in the books.",
            labels=("device",),
        )
        for total in totals.meters:
            meter.add_metric((total.device, total.source), total.settled_uj / UJ_PER_J)
            open_.add_metric((total.device,), total.open_uj / UJ_PER_J)
            residual.add_metric((total.device,), total.residual_uj / UJ_PER_J)
        attributed = CounterMetricFamily(
            "wattle_attributed_energy_joules",
            "Energy on the bills of requests that are over.",
            labels=("device", "model", "task", "phase", "quality"),
        )
        for share in totals.attributed:
            key = (share.device, share.model, share.task, share.phase, share.quality)
            attributed.add_metric(key, share.energy_uj / UJ_PER_J)
        unattributed = CounterMetricFamily(
            "wattle_unattributed_energy_joules", "Energy on no bill, and why.", labels=("device", "reason")
        )
        for rest in totals.unattributed:
            unattributed.add_metric((rest.device, rest.reason), rest.energy_uj / UJ_PER_J)
        yield from (meter, open_, residual, attributed, unattributed)
