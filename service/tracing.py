"""Spans of requests for OpenTelemetry, exported over OTLP as the OTEL_* variables say. Knows no tasks.

FastAPI makes the span of the HTTP request and reads the caller's ``traceparent``; below it comes one with the bill as
it was when the request was over (the ledger has the final one), and below that the engine's. The SDK comes with the
extra [otel]; nothing of it is imported unless it is asked for.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from service import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from service.core import Charge

UJ_PER_J = 1_000_000
_NS_PER_MS = 1_000_000
_NS_PER_S = 1_000_000_000
_ERRORS = ("failed", "timed_out")
"""Other ends are the caller's doing."""
_PROBES = ("/livez", "/readyz", "/metrics")
_log = logging.getLogger(__name__)


class Tracing:
    """Spans of requests, sent to ``provider``."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("wattle", __version__)

    @property
    def fastapi_config(self) -> Any:
        """What FastAPI is told: spans of requests, except where a machine asks every few seconds, and nothing else."""
        return {
            "tracer_provider": self._provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope["path"] in _PROBES,
        }

    def request_over(self, charge: "Charge", status: str, started_s: float) -> None:
        """The span of a request that began at ``started_s`` (monotonic clock) and ends now, and its engine's."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        now_ns, now_s = time.time_ns(), time.monotonic()
        model = charge.worker
        attributes: dict[str, str | int | float | bool] = {
            # GenAI semantic conventions.
            "gen_ai.operation.name": charge.task,
            "gen_ai.provider.name": "wattle",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": charge.request_id,
            "gen_ai.usage.input_tokens": charge.input_tokens,
            "gen_ai.usage.output_tokens": charge.output_tokens,
            "wattle.status": status,
            "wattle.energy.quality": charge.bill.quality,
            "wattle.energy.settled": charge.bill.settled,
        }
        if charge.bill.allocated_uj is not None and charge.bill.active_uj is not None:
            attributes["wattle.energy.joules"] = charge.bill.allocated_uj / UJ_PER_J
            attributes["wattle.energy.active_joules"] = charge.bill.active_uj / UJ_PER_J
        if charge.bill.gco2e is not None:
            attributes["wattle.carbon.grams"] = charge.bill.gco2e
        started_ns = now_ns - round((now_s - started_s) * _NS_PER_S)
        span = self._tracer.start_span(f"{charge.task} {model}", attributes=attributes, start_time=started_ns)
        if status in _ERRORS:
            span.set_attribute("error.type", status)
            span.set_status(StatusCode.ERROR)
        if charge.computed_s is not None:
            ended_ns = now_ns - round((now_s - charge.computed_s) * _NS_PER_S)
            took_ns = round((charge.queue_ms + charge.compute_ms) * _NS_PER_MS)
            engine = self._tracer.start_span(
                "engine",
                set_span_in_context(span),
                attributes={
                    "wattle.queue.seconds": charge.queue_ms / 1000,
                    "wattle.compute.seconds": charge.compute_ms / 1000,
                },
                start_time=max(started_ns, ended_ns - took_ns),
            )
            engine.end(ended_ns)
        span.end(now_ns)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def open_tracing() -> Tracing | None:
    """The tracing that the OTEL_* variables describe; None, with a line in the log, where its package is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("no traces are exported: OTEL_* asks for them, but OpenTelemetry is not installed: extra [otel]")
        return None
    named = {"service.name": "wattle", "service.version": __version__, **OTELResourceDetector().detect().attributes}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
