"""A span per request where OpenTelemetry is asked for, and nothing of it where not."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from energy.types import Quality
from service import app as app_module
from service.app import create_app
from service.settings import Settings, wants_traces
from service.tracing import Tracing, open_tracing
from tests.service.fakes import FakeAccount, FakeEngine, build

ROOT = Path(__file__).parents[2]
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(
    settings: Settings, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    """A client to a service that traces."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app_module, "open_tracing", lambda: Tracing(provider))
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    with TestClient(create_app(settings, build)) as client:
        yield client


def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan, ReadableSpan]:
    """The engine's, the task's and the HTTP request's."""
    engine, task, http = exporter.get_finished_spans()
    return engine, task, http


def test_a_request_is_a_span_with_its_energy(client: TestClient, exporter: InMemorySpanExporter) -> None:
    answer = client.post("/v1/translate", json={"input": "good dog"}).json()
    _, span, http = spans(exporter)
    assert (http.name, http.kind, http.parent) == ("POST /v1/translate", SpanKind.SERVER, None)
    assert (span.name, span.parent) == ("translate tiny-translate", http.context)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "translate",
        "gen_ai.provider.name": "wattle",
        "gen_ai.request.model": "tiny-translate",
        "gen_ai.response.model": "tiny-translate",
        "gen_ai.response.id": answer["id"],
        "gen_ai.usage.input_tokens": answer["usage"]["input_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["output_tokens"],
        "wattle.status": "ok",
        "wattle.energy.quality": "measured",
        "wattle.energy.settled": True,
        "wattle.energy.joules": 2.0,
        "wattle.energy.active_joules": 1.5,
        "wattle.carbon.grams": 0.25,
    }


def test_the_engine_s_time_is_a_child_inside_it(client: TestClient, exporter: InMemorySpanExporter) -> None:
    client.post("/v1/sentiment", json={"input": "good"})
    engine, task, http = spans(exporter)
    assert (engine.name, engine.parent) == ("engine", task.context)
    assert dict(engine.attributes or {}) == {"wattle.queue.seconds": 0.002, "wattle.compute.seconds": 0.005}
    times = (http.start_time, task.start_time, engine.start_time, engine.end_time, task.end_time, http.end_time)
    assert list(times) == sorted(time for time in times if time is not None)


def test_a_caller_s_trace_goes_on(client: TestClient, exporter: InMemorySpanExporter) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    client.post("/v1/sentiment", json={"input": "good"}, headers={"traceparent": f"00-{trace}-{caller}-01"})
    found = spans(exporter)
    assert found[-1].parent is not None and f"{found[-1].parent.span_id:016x}" == caller
    assert [f"{span.context.trace_id:032x}" for span in found] == [trace] * 3


def test_probes_are_no_spans(client: TestClient, exporter: InMemorySpanExporter) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    assert exporter.get_finished_spans() == ()


def test_a_failure_is_an_error_and_a_refusal_is_not(client: TestClient, exporter: InMemorySpanExporter) -> None:
    engine: FakeEngine = client.app.state.service.engine  # type: ignore[attr-defined]
    client.post("/v1/sentiment", json={"input": "good " * 500})
    engine.failure = RuntimeError("broken")
    client.post("/v1/sentiment", json={"input": "good"})
    refused, _, failed, _ = exporter.get_finished_spans()
    assert (refused.attributes or {})["wattle.status"] == "refused"
    assert refused.status.status_code is StatusCode.UNSET
    assert (failed.attributes or {})["error.type"] == "failed"
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.events == ()


def test_energy_that_is_unknown_is_absent(client: TestClient, exporter: InMemorySpanExporter) -> None:
    account: FakeAccount = client.app.state.service.account  # type: ignore[attr-defined]
    account.quality = Quality.UNAVAILABLE
    client.post("/v1/sentiment", json={"input": "good"})
    attributes = spans(exporter)[1].attributes or {}
    assert attributes["wattle.energy.quality"] == "unavailable"
    assert not {"wattle.energy.joules", "wattle.energy.active_joules", "wattle.carbon.grams"} & set(attributes)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({ENDPOINT: "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_SERVICE_NAME": "wattle"}, False),
    ],
)
def test_the_standard_variables_decide(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wants_traces() is wanted


def test_spans_reach_a_collector_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        tracing = open_tracing()
        assert tracing is not None
        tracing._tracer.start_span("a span").end()
        tracing.close()
        server.shutdown()
        thread.join()
    (resource_spans,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    named = {each.key: each.value.string_value for each in resource_spans.resource.attributes}
    assert (named["service.name"], named["deployment.environment.name"]) == ("wattle", "test")
    assert resource_spans.scope_spans[0].spans[0].name == "a span"


def test_a_missing_package_is_said_and_the_service_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        assert open_tracing() is None
    assert "extra [otel]" in caplog.text


def test_nothing_is_imported_where_nothing_is_asked_for() -> None:
    script = (
        "import sys; from service.app import create_app; from service.settings import Settings\n"
        "create_app(Settings()); print('opentelemetry.sdk' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
