"""Wires the service, once: settings in, an ASGI application out. Importing this module does nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from energy.account import Account
from energy.attribution import Coefficients
from energy.calibration import CalibrationError, read_calibration
from energy.carbon import Carbon
from energy.ledger import Ledger
from energy.meters.choose import MeterSettings, choose_meter
from energy.owner import Owner
from energy.sampler import Sampler
from energy.types import Bills, Step
from models.manifest import CALIBRATION_NAME, ArtefactError, Manifest
from service import __version__
from service.books import Books
from service.classifiers.store import Classifiers
from service.core import Service
from service.door import Door
from service.edge import Bounds, Edge
from service.engine.devices import gpus
from service.engine.engine import Engine, engine_settings
from service.engine.loading import check_device
from service.errors import TABLE, WattleError, render
from service.gate import Gate, document_gate
from service.keys import Keyring
from service.knowledge.bases import Knowledge, find_embedder
from service.metrics import Metrics
from service.models import Model, Models, load_models
from service.repository import Repository
from service.routes.classifiers import classifier_routes
from service.routes.dashboard import dashboard_routes
from service.routes.energy import energy_routes
from service.routes.estimate import estimate_routes
from service.routes.huggingface import huggingface_routes
from service.routes.knowledge import knowledge_routes
from service.routes.lean import Shortcut
from service.routes.libretranslate import libretranslate_routes
from service.routes.openai import openai_routes
from service.routes.operations import operations_routes
from service.routes.tasks import task_routes
from service.settings import Settings, wants_traces
from service.tasks import TASKS
from service.tracing import open_tracing

WATCH_INTERVAL_S = 1.0
DESCRIPTION = "Five NLP tasks over HTTP; every answer says what it cost in joules and grams of CO2e."

_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""By default FastAPI looks for somebody's at every request."""

_log = logging.getLogger(__name__)
Build = Callable[[Settings], AbstractContextManager[Service]]


def create_app(settings: Settings, build: Build | None = None) -> FastAPI:
    """The application. ``build`` makes the service at start-up and takes it down at shutdown.

    Raises ``KeysFileError`` where there should be keys and cannot be read.
    """

    tracing = open_tracing() if wants_traces() else None
    keyring = None if settings.api_keys_file is None else Keyring(settings.api_keys_file)
    gate = Gate(keyring, settings.public_pages)
    bounds = Bounds(settings.max_body_bytes, settings.max_header_bytes, settings.max_json_depth)

    door = Door(settings.max_concurrent_requests, key_share=settings.max_key_share)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with (build or build_service)(settings) as service:
            service = replace(service, tracing=tracing)
            app.state.service = service
            watcher = asyncio.create_task(_watch(service))
            yield
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        if tracing is not None:
            tracing.close()

    dialects = (openai_routes(), huggingface_routes(), libretranslate_routes())
    energy = (estimate_routes(), energy_routes(), dashboard_routes())
    routers = (task_routes(), classifier_routes(), knowledge_routes(), *dialects, *energy, operations_routes())
    routes = [route for router in routers for route in router.routes]
    kinds = (*(kind for kind in TABLE if kind is not Exception), WattleError, RequestValidationError, HTTPException)
    app = _App(
        title="Wattle",
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        # Not their routers: FastAPI would make each of their routes a second time, during the first request.
        routes=routes,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            *_cors(settings),
            Middleware(Edge, bounds=bounds, gate=gate, door=door),
            # A span is called by the route that routers have found.
            *([Middleware(Shortcut, routes=routes)] if tracing is None else []),
        ],
        exception_handlers={kind: _answer for kind in kinds},
        telemetry=_NO_TELEMETRY if tracing is None else tracing.fastapi_config,
    )
    app.state.gate = gate
    describe = app.openapi
    app.openapi = lambda: app.openapi_schema or document_gate(describe())  # type: ignore[method-assign]
    return app


class _App(FastAPI):
    """FastAPI, but what ``create_app`` puts before routes stands before FastAPI's own layers too: ``Edge`` answers
    every failure itself, and what takes the short way needs none of them."""

    def build_middleware_stack(self) -> ASGIApp:
        """See ``Starlette``."""
        before, self.user_middleware = self.user_middleware, []
        outermost = super().build_middleware_stack()
        self.user_middleware = before
        # It would answer what nobody foresaw before ``Edge`` can.
        assert isinstance(outermost, ServerErrorMiddleware)
        app = outermost.app
        for kind, args, kwargs in reversed(before):
            app = kind(app, *args, **kwargs)
        return app


def _cors(settings: Settings) -> list[Middleware]:
    """What lets pages of other origins call the service; nothing unless asked for."""
    if not settings.cors_origins:
        return []
    told = ("retry-after", "retry-after-ms", "x-request-id", "x-queue-time", "x-inference-time")
    energy = ("x-energy-joules", "x-energy-quality", "x-energy-gco2e")
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            # OpenAI's client alone sends ten of its own.
            allow_headers=("*",),
            expose_headers=(*told, *energy),
        )
    ]


@contextmanager
def build_service(settings: Settings) -> Iterator[Service]:
    """Everything that answers requests, ready to; what runs when it is left gets time to finish."""
    models = open_models(settings)
    metrics = Metrics()
    coefficients = read_coefficients(models.served.values(), settings.state)
    ledger = Ledger(settings.ledger, settings.ledger_max_days, settings.ledger_max_mb)
    books = Books(metrics, settings.daily_budget_j, coefficients)
    books.restore(ledger)
    account = open_account(settings, ledger, books.settled)

    def record(step: Step) -> None:
        account.record(step)
        metrics.step(step)

    try:
        with Sampler(account, settings.sample_interval_ms / 1000):
            shared_by = coefficients if account.is_metered else None
            engine = Engine({}, record, engine_settings(settings), shared_by)
            embedder = find_embedder(models)
            repository = Repository(
                models,
                engine,
                metrics,
                roots=settings.models,
                check=partial(check_model, settings),
                on_load=lambda model: _recalibrate(coefficients, model, settings.state),
                max_bytes=None if settings.max_models_mb is None else settings.max_models_mb * 1_000_000,
                pinned=() if embedder is None else (embedder.name,),
            )
            repository.fill()
            # From what warming up took, the first request's bill can be foretold.
            account.sample()
            metrics.watch(engine.queue_depth, engine.running, account.totals, ledger)
            knowledge = Knowledge(settings.knowledge, settings.max_documents, engine, embedder, account.record)
            try:
                yield Service(
                    repository=repository,
                    engine=engine,
                    account=account,
                    ledger=ledger,
                    metrics=metrics,
                    books=books,
                    door=Door(settings.max_concurrent_requests, settings.max_queue_tokens, settings.max_key_share),
                    max_client_batch_size=settings.max_client_batch_size,
                    request_timeout_s=settings.request_timeout_s,
                    knowledge=knowledge,
                    classifiers=Classifiers(settings.classifiers),
                    log_texts=settings.log_texts,
                )
            finally:
                engine.drain(settings.drain_timeout_s)
                knowledge.close()
                engine.close()
    finally:
        account.shutdown()


def open_models(settings: Settings) -> Models:
    """The models that ``settings`` name; logs those that are refused."""
    models = load_models(settings.models, partial(check_model, settings), settings.model_aliases)
    for refusal in models.refused:
        _log.error("refused the model %s: %s", refusal.folder_name, refusal.reason)
    for alias, name in settings.model_aliases.items():
        if alias not in models.aliases:
            _log.error("the alias %s names the model %s, which is not served", alias, name)
    return models


def read_coefficients(models: Iterable[Model], state: Path) -> dict[str, Coefficients]:
    """What ``wattle calibrate`` found for ``models``; logs for which of them that cannot be used."""
    known = {}
    for model in models:
        name = model.name
        try:
            found = read_calibration(name, model.manifest.revision, *calibration_places(model, state))
        except CalibrationError as error:
            _log.warning("the default coefficients are used for %s: %s", name, error)
        else:
            if found is not None:
                known[name] = found.fit.coefficients
    return known


def _recalibrate(coefficients: dict[str, Coefficients], model: Model, state: Path) -> None:
    """Take over what was found for a model that has just been loaded; another revision's is not its own."""
    coefficients.pop(model.name, None)
    coefficients.update(read_coefficients([model], state))


def calibration_places(model: Model, state: Path) -> tuple[Path, Path]:
    """Where a model's calibration lies: beside its manifest, or in the state folder where that is read-only."""
    return model.folder / CALIBRATION_NAME, state / "calibration" / f"{model.name}.json"


def meter_settings(settings: Settings, gpu_numbers: tuple[int, ...] | None) -> MeterSettings:
    """What ``settings`` say of meters, for the GPUs of these numbers; None is all of them."""
    return MeterSettings(
        meter=settings.meter,
        gpus=gpu_numbers,
        powercap_root=settings.powercap_root,
        watts_per_core=settings.watts_per_core,
    )


def open_account(
    settings: Settings,
    ledger: Ledger,
    on_settled: Callable[[Sequence[Bills]], None] | None = None,
) -> Account:
    """The energy account that ``settings`` describe; logs which meter it reads, or why there is none.

    ``on_settled`` is called with the final bills.
    """
    devices = gpus(engine_settings(settings))
    choice = choose_meter(meter_settings(settings, tuple(device.index for device in devices)))
    for finding in choice.findings:
        _log.info("meter %s %s: %s", finding.source, "used" if finding.used else "not used", finding.detail)
    carbon = Carbon(
        settings.grid_zone, settings.pue, settings.embodied_kg, settings.life_years, settings.machine_share
    )
    _log.info("carbon: %s, %g gCO2e/kWh", carbon.assumptions.zone, carbon.assumptions.gco2e_per_kwh)
    account = Account(
        choice.meter,
        carbon,
        ledger,
        executors=settings.executors + len(devices),
        owner=Owner(settings.state),
        on_settled=on_settled,
    )
    if settings.daily_budget_j is not None and not account.is_metered:
        _log.warning("no energy meter is read, so the daily budget of %g J cannot be kept", settings.daily_budget_j)
    return account


def check_model(settings: Settings, manifest: Manifest) -> None:
    """Raise ``ArtefactError`` for a model that cannot be served as ``settings`` want it to be."""
    check_manifest(manifest)
    check_device(manifest, engine_settings(settings))


def check_manifest(manifest: Manifest) -> None:
    """Raise ``ArtefactError`` where a model lacks what the engine or one of its tasks needs."""
    if manifest.layout != "wattle":
        raise ArtefactError(f"manifest.json: graphs of the layout {manifest.layout} are not served")
    for task in TASKS:
        if task.name in manifest.tasks:
            task.check(manifest)


async def _watch(service: Service) -> None:
    """Keep the account's counters for the dashboard."""
    while True:
        service.books.live.tick(await asyncio.to_thread(service.account.totals))
        await asyncio.sleep(WATCH_INTERVAL_S)


async def _answer(request: Request, error: Exception) -> Response:
    return render(error)
