"""A service with fake parts, and a client to it."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.core import Service
from service.models import Model, load_model
from service.settings import Settings
from tests.service.fakes import FakeAccount, FakeEngine, build, wait_until, write_models


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(models_folder: Path) -> dict[str, Model]:
    """The tiny model of each task."""
    return {folder.name.removeprefix("tiny-"): load_model(folder) for folder in models_folder.iterdir()}


@pytest.fixture(scope="session")
def settings(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    places = {name: tmp_path_factory.mktemp(name) for name in ("knowledge", "classifiers")}
    return Settings(models=(models_folder,), model_aliases={"gpt-4o-mini": "tiny-generate"}, **places)


@pytest.fixture(scope="session")
def app(settings: Settings) -> FastAPI:
    return create_app(settings, build)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client to a service that has just started."""
    with TestClient(app) as client:
        yield client


@pytest.fixture
def engine(client: TestClient) -> FakeEngine:
    return client.app.state.service.engine


@pytest.fixture
def account(client: TestClient) -> FakeAccount:
    return client.app.state.service.account


@pytest.fixture(scope="session")
def live(settings: Settings) -> Iterator[tuple[FastAPI, str]]:
    """Another such service on a real socket, and its address."""
    app = create_app(settings, build)
    with on_a_socket(app) as address:
        yield app, address


@contextmanager
def on_a_socket(app: FastAPI) -> Iterator[str]:
    """Serve ``app``; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def service(live: tuple[FastAPI, str]) -> Service:
    """The parts of the service on the socket, but for its metrics as if it had just started."""
    service: Service = live[0].state.service
    for part, fresh in (
        (service.engine, FakeEngine(service.engine.vocabularies)),
        (service.account, FakeAccount(service.ledger)),
    ):
        vars(part).clear()
        vars(part).update(vars(fresh))
    return service


@pytest.fixture
def address(live: tuple[FastAPI, str], service: Service) -> str:
    """Where it listens."""
    return live[1]


@pytest.fixture
def embedder(service: Service, models: dict[str, Model]) -> Iterator[str]:
    """The name of a model that embeds, served beside the others: a vector of the counts of three words."""
    name, model = "tiny-embed", models["sentiment"]
    manifest = model.manifest.model_copy(update={"name": name, "tasks": ()})
    before = service.models
    service.repository.models = before.replacing(dataclasses.replace(model, manifest=manifest))
    service.repository.fill()
    yield name
    service.repository.models = before
