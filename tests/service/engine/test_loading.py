"""Loading: graphs are opened beside one another, and it shows nowhere but in the time."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.manifest import ArtefactError
from service.engine import loading
from service.engine.devices import CPU, Device
from service.engine.loading import open_workers
from service.engine.settings import EngineSettings
from tests.tiny import Kind, Loaded, load_tiny

WAIT_S = 30.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("classify", "encoder-decoder")
    return {kind: load_tiny(root, kind) for kind in kinds}


def test_graphs_are_opened_beside_one_another(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    both, open_graph = threading.Barrier(2, timeout=WAIT_S), loading.open_graph

    def meet(path: Path, *rest: Any) -> Any:
        both.wait()
        return open_graph(path, *rest)

    monkeypatch.setattr(loading, "open_graph", meet)
    opened = open_workers(models, EngineSettings(executors=2))
    assert [list(workers) for workers in opened.workers] == [list(models)] * 2


def test_their_cpu_time_is_that_of_all_threads(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.local()

    def clock_ns() -> int:
        """Goes on by 1,000 each time that a thread asks."""
        asked.ns = getattr(asked, "ns", 0) + 1_000
        return int(asked.ns)

    monkeypatch.setattr(time, "thread_time_ns", clock_ns)
    # One graph of the one, three of the other, and the thread that loads.
    assert open_workers(models, EngineSettings(executors=2)).cpu_ns == 5_000


def test_threads_of_a_session_are_made_on_the_cores_of_its_executor(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, open_graph = threading.local(), loading.open_graph
    opened: list[tuple[str, list[int]]] = []

    @contextmanager
    def on(cores: list[int]) -> Iterator[None]:
        bound.to = cores
        yield

    def note(path: Path, threads: int, device: Device, bits: int) -> Any:
        opened.append((path.name, bound.to))
        return open_graph(path, 1, device, bits)

    monkeypatch.setattr(loading, "_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(loading, "_on", on)
    monkeypatch.setattr(loading, "open_graph", note)
    one = {"classify": models["classify"]}
    open_workers(one, EngineSettings(executors=2, threads=2))
    assert sorted(opened) == [("model.onnx", [0, 1]), ("model.onnx", [2, 3])]
    opened.clear()
    open_workers(one, EngineSettings(executors=2))
    assert opened == [("model.onnx", [0, 1, 2, 3])], "shared, so no executor's own"


def test_the_first_error_in_the_order_of_models_is_told(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_failed = threading.Event()

    def fail(path: Path, threads: int, device: Device = CPU, bits: int = 8) -> Any:
        if path.parent.name == "classify":
            assert second_failed.wait(WAIT_S)
        else:
            second_failed.set()
        raise RuntimeError(f"{path.parent.name} cannot be opened")

    monkeypatch.setattr(loading, "open_graph", fail)
    with pytest.raises(RuntimeError, match="classify cannot be opened"):
        open_workers(models, EngineSettings(executors=2))


def test_nothing_is_opened_for_a_model_that_is_not_run(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(loading, "open_graph", lambda path, *_: opened.append(path))
    with pytest.raises(ArtefactError, match="max_model_mb"):
        open_workers(models, EngineSettings(max_model_bytes=1))
    assert opened == []
