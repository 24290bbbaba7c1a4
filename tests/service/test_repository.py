"""Models are loaded, swapped, unloaded and evicted while requests run, and only by whoever may."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.manifest import ArtefactError, write_manifest
from service.app import check_manifest, create_app
from service.engine.types import Overloaded
from service.errors import ModelInUse, ModelNotFound, ModelRefused, ModelUnavailable
from service.metrics import Metrics
from service.models import load_models
from service.repository import MAX_WAITING, Repository
from service.settings import Settings
from tests.service.fakes import MODEL_BYTES, FakeEngine, build, manifest, write_model
from tests.service.test_operations import samples


class SlowEngine(FakeEngine):
    """Loads as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def load(self, models: Any) -> None:
        assert self.go.wait(10)
        super().load(models)


def repository(
    root: Path, names: str, room_for: int | None = None, pinned: tuple[str, ...] = ()
) -> tuple[Repository, SlowEngine]:
    """A repository of sentiment models of these names, one letter each, as many of them in memory as fit."""
    for name in names:
        write_model(root, name, "sentiment")
    engine = SlowEngine()
    made = Repository(
        load_models([root], check_manifest, {"alias": "a"}),
        engine,
        Metrics(),
        roots=[root],
        check=check_manifest,
        max_bytes=None if room_for is None else room_for * MODEL_BYTES,
        pinned=pinned,
    )
    made.fill()
    return made, engine


def revise(folder: Path, revision: str) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, manifest(document["name"], "sentiment", revision=revision))


def in_memory(repository: Repository) -> str:
    states = {name: repository.state(model) for name, model in repository.models.served.items()}
    return "".join(name for name, state in states.items() if state == "loaded")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_requests_load_what_they_need_and_the_idlest_makes_room(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "abc", room_for=2)

    async def use(name: str) -> None:
        async with models.use(models.models.named(name)) as model:
            assert model.name == name
            assert model.key in engine.vocabularies
            assert models.memory_bytes <= 2 * MODEL_BYTES

    async def test() -> None:
        assert in_memory(models) == "ab"
        await use("a")
        await use("c")
        assert in_memory(models) == "ac"
        await use("b")
        assert in_memory(models) == "bc"
        await asyncio.gather(*(use(name) for name in "abcabcabc"))
        assert len(engine.vocabularies) == 2

    run(test)


def test_a_model_in_use_is_evicted_when_its_requests_are_over(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab", room_for=1)

    async def use_b() -> None:
        async with models.use(models.models.named("b")):
            assert list(engine.vocabularies) == ["b#1"]

    async def test() -> None:
        async with models.use(models.models.named("a")):
            waiting = asyncio.create_task(use_b())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            assert list(engine.vocabularies) == ["a"]
        await waiting

    run(test)


def test_requests_that_wait_for_a_model_are_bounded(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab", room_for=1)
    engine.go.clear()

    async def use_b() -> str:
        async with models.use(models.models.named("b")) as model:
            return model.name

    async def test() -> None:
        waiting = [asyncio.create_task(use_b()) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0.05)
        assert models.state(models.models.named("b")) == "loading"
        with pytest.raises(Overloaded):
            await use_b()
        waiting[0].cancel()
        await asyncio.sleep(0.05)
        engine.go.set()
        # Whoever began the load has gone, and it goes on for the others.
        assert await asyncio.gather(*waiting[1:]) == ["b"] * (MAX_WAITING - 1)
        assert list(engine.vocabularies) == ["b#1"]

    run(test)


def test_a_new_revision_takes_over_and_the_old_one_finishes(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab")

    async def test() -> None:
        async with models.use(models.models.named("a")) as old:
            revise(tmp_path / "a", "2")
            new = await models.load("a")
            assert new.manifest.revision == "2"
            async with models.use(models.models.named("a")) as used:
                assert used is new
            await asyncio.sleep(0.05)
            assert old.key in engine.vocabularies
            assert models.memory_bytes == 3 * MODEL_BYTES
        while old.key in engine.vocabularies:
            await asyncio.sleep(0.01)
        assert set(engine.vocabularies) == {new.key, "b"}
        # Whoever chose the old one before and comes now gets the new one.
        async with models.use(old) as used:
            assert used is new
        assert list(models.models.served) == ["a", "b"]

    run(test)


def test_an_altered_folder_is_refused_and_what_is_in_memory_goes_on(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab", room_for=1)
    (tmp_path / "a" / "model.onnx").write_bytes(b"altered")

    async def test() -> None:
        with pytest.raises(ModelRefused, match=r"model\.onnx") as refused:
            await models.load("a")
        assert str(tmp_path) not in str(refused.value)
        assert in_memory(models) == "a"
        assert [each.folder_name for each in models.models.refused] == ["a"]
        engine.load_failure = ArtefactError("model.onnx: is no graph")
        with pytest.raises(ModelUnavailable, match="is no graph"):
            async with models.use(models.models.named("b")):
                raise AssertionError("it cannot be loaded")
        # What made room is on disk, where it is damaged; both are refused from now on.
        engine.load_failure = None
        with pytest.raises(ModelUnavailable, match=r"model\.onnx"):
            async with models.use(models.models.named("a")):
                raise AssertionError("it is altered")
        assert (list(models.models.served), models.memory_bytes) == ([], 0)
        revise(tmp_path / "a", "2")
        await models.load("a")
        assert in_memory(models) == "a"
        assert [each.folder_name for each in models.models.refused] == ["b"]

    run(test)


def test_a_folder_may_be_loaded_by_its_name_and_nothing_beyond_the_roots(tmp_path: Path) -> None:
    models, _ = repository(tmp_path / "served", "a")
    write_model(tmp_path / "elsewhere", "z", "sentiment")
    (tmp_path / "served" / "a").rename(tmp_path / "served" / "old")
    write_model(tmp_path / "served", "a", "sentiment", revision="2").rename(tmp_path / "served" / "new")

    async def test() -> None:
        assert (await models.load("new")).manifest.revision == "2"
        assert (await models.load(str(tmp_path / "served" / "old"))).manifest.revision == "1"
        outside = tmp_path / "elsewhere" / "z"
        for name in (str(outside), "../elsewhere/z", "elsewhere/z", "z", "", ".", "..", "/", "\0"):
            with pytest.raises(ModelNotFound):
                await models.load(name)

    run(test)


def test_an_unloaded_model_is_unknown_until_it_is_loaded_again(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab", pinned=("b",))

    async def test() -> None:
        async with models.use(models.models.named("alias")):
            unloading = asyncio.create_task(models.unload("a"))
            await asyncio.sleep(0.05)
            assert not unloading.done()
            assert not models.models.aliases
            with pytest.raises(ModelNotFound):
                models.models.named("alias")
        assert (await unloading).name == "a"
        assert list(engine.vocabularies) == ["b"]
        await models.load("a")
        assert models.models.aliases == {"alias": "a"}
        for change in (models.load, models.unload):
            with pytest.raises(ModelInUse, match="knowledge bases"):
                await change("b")

    run(test)


def test_a_model_unloaded_while_it_is_loading_does_not_come_back(tmp_path: Path) -> None:
    models, engine = repository(tmp_path, "ab", room_for=1)
    engine.go.clear()

    async def use_b() -> None:
        async with models.use(models.models.named("b")):
            pass

    async def test() -> None:
        using = asyncio.create_task(use_b())
        await asyncio.sleep(0.05)
        unloading = asyncio.create_task(models.unload("b"))
        await asyncio.sleep(0.05)
        assert models.state(models.models.named("b")) == "loading"
        engine.go.set()
        assert (await unloading).name == "b"
        assert list(models.models.served) == ["a"]
        assert not engine.vocabularies
        # It was served, or told that the model has gone.
        assert isinstance(*await asyncio.gather(using, return_exceptions=True), ModelNotFound | None)

    run(test)


def test_a_model_that_can_never_fit_evicts_nobody(tmp_path: Path) -> None:
    models, _ = repository(tmp_path, "ab", room_for=1, pinned=("a",))

    async def test() -> None:
        with pytest.raises(ModelUnavailable, match="raise max_models_mb"):
            async with models.use(models.models.named("b")):
                raise AssertionError("it does not fit")
        assert in_memory(models) == "a"

    run(test)


@pytest.fixture
def near(tmp_path: Path) -> Iterator[TestClient]:
    """A client on the service's own machine; the service holds two of three models in memory."""
    for name in "abc":
        write_model(tmp_path / "models", name, "sentiment")
    settings = Settings(models=(tmp_path / "models",), max_models_mb=2 * MODEL_BYTES // 1_000_000, state=tmp_path)
    with TestClient(create_app(settings, build), client=("127.0.0.1", 1)) as client:
        yield client


def test_the_routes_tell_where_models_are(near: TestClient, tmp_path: Path) -> None:
    states = {model["name"]: model["state"] for model in near.get("/readyz").json()["models"]}
    assert states == {"a": "loaded", "b": "loaded", "c": "on disk"}
    assert near.get("/readyz/c").status_code == 503
    assert near.post("/v1/sentiment", json={"input": "good", "model": "c"}).json()["model"] == "c"
    assert near.get("/readyz/c").json()["memory_mb"] == MODEL_BYTES / 1e6
    assert (near.get("/readyz/a").status_code, near.get("/readyz/z").status_code) == (503, 404)
    revise(tmp_path / "models" / "b", "2")
    loaded = near.post("/v1/models/load", json={"model": "b"})
    assert (loaded.status_code, loaded.json()["revision"]) == (200, "2")
    assert near.post("/v1/models/unload", json={"model": "b"}).status_code == 200
    assert near.post("/v1/sentiment", json={"input": "good", "model": "b"}).status_code == 404
    (tmp_path / "models" / "b" / "model.onnx").unlink()
    refused = near.post("/v1/models/load", json={"model": "b"}).json()["error"]
    assert (refused["code"], refused["param"]) == ("model_refused", "model")
    found = samples(near)
    assert found["wattle_models_memory_bytes"][()] <= 2 * MODEL_BYTES
    assert sum(found["wattle_model_load_seconds_count"].values()) == 2
    assert found["wattle_model_unloads_total"]["a", "evicted"] == 1
    assert found["wattle_model_unloads_total"]["b", "asked"] == 1


@pytest.mark.parametrize("action", ["load", "unload"])
def test_only_a_client_on_this_machine_changes_what_is_served(near: TestClient, action: str) -> None:
    far = TestClient(near.app, client=("203.0.113.7", 1))
    for client, headers in ((far, {}), (near, {"x-forwarded-for": "203.0.113.7"}), (near, {"forwarded": "for=_a"})):
        refused = client.post(f"/v1/models/{action}", json={"model": "a"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")
    assert near.get("/readyz/a").status_code == 200
