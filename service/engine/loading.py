"""Opens model folders: which graphs an architecture has, and which worker runs them."""

import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from energy.attribution import Coefficients
from models.config import TransformerConfig
from models.manifest import ArtefactError, Manifest
from service.engine.devices import CPU, Device, check_works, cuda_is_installed, gpus
from service.engine.executor import Executor
from service.engine.graphs import EncoderGraph, WriteGraphs, open_graph
from service.engine.pages import large_pages
from service.engine.settings import EngineSettings
from service.engine.workers import EncodeWorker, Limits, Worker, WriteWorker, usual_beams

_log = logging.getLogger(__name__)
_GPU_SCHEME = "float16"
"""CUDA has no kernels for products of integers with a scale per row, and its attention over buffers is in halves."""
_AT_ONCE = 4
"""How many graphs are opened at once, at most: while one is, its weights are in memory twice."""


class LoadedModel(Protocol):
    """A verified model folder."""

    @property
    def manifest(self) -> Manifest:
        """What the folder says of itself."""

    @property
    def folder(self) -> Path:
        """Where the graphs lie."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Models whose graphs are in memory."""

    workers: Sequence[Mapping[str, Worker]]
    """For each executor, the worker of each model that it runs."""
    cpu_ns: int
    """What loading took, on all threads."""
    pages: Collection[int]
    """Where the weights lie: the addresses of the large pages that they would fill."""


def open_executors(settings: EngineSettings, coefficients: Mapping[str, Coefficients] | None) -> list[Executor]:
    """Executors without models: on the processor, each with cores of its own where there are enough, and one for each
    GPU. Raises ``DeviceUnavailable``."""
    groups = core_groups(_cores(), settings.executors, settings.threads)
    executors = [
        Executor(f"cpu:{number}", cores, settings.threads, coefficients) for number, cores in enumerate(groups)
    ]
    devices = gpus(settings)
    if not devices and settings.device == "auto" and cuda_is_installed():
        _log.warning("no GPU that CUDA works on: models run on the processor; `--device cuda` says why")
    return [
        *executors,
        *(Executor(device.name, _cores(), 1, coefficients, partial(check_works, device)) for device in devices),
    ]


def executors_of(manifest: Manifest, settings: EngineSettings) -> int:
    """How many executors run a model: all GPUs, or else all groups of cores."""
    return len(_gpus_for(manifest, settings)) or settings.executors


def check_device(manifest: Manifest, settings: EngineSettings) -> None:
    """Raise ``ArtefactError`` for a model that cannot run where ``settings`` want all models to."""
    if settings.device == "cuda" and manifest.quantisation.scheme != _GPU_SCHEME:
        stored = manifest.quantisation.scheme
        raise ArtefactError(
            f"manifest.json: stored as {stored}, and GPUs run {_GPU_SCHEME}: store it anew with `wattle import FOLDER "
            f"--scheme {_GPU_SCHEME}`, or set device to auto"
        )


def runs_on_gpus(manifest: Manifest, settings: EngineSettings) -> bool:
    """Whether a model is run on GPUs. Raises ``DeviceUnavailable``."""
    return bool(_gpus_for(manifest, settings))


def _gpus_for(manifest: Manifest, settings: EngineSettings) -> Sequence[Device]:
    return gpus(settings) if manifest.quantisation.scheme == _GPU_SCHEME else ()


def open_workers(models: Mapping[str, LoadedModel], settings: EngineSettings) -> Opened:
    """Load the graphs of ``models``, several at a time.

    Graphs of one thread are loaded once and shared. Raises ``ArtefactError`` for a model that the engine does not run.
    """
    occupied, began_ns = large_pages(), time.thread_time_ns()
    for model in models.values():
        _check(model, settings)
    on_gpus = {key: model for key, model in models.items() if _gpus_for(model.manifest, settings)}
    on_cores = {key: model for key, model in models.items() if key not in on_gpus}
    groups = core_groups(_cores(), settings.executors, settings.threads)
    workers = []
    with _Openers(min(_AT_ONCE, settings.executors * settings.threads), settings) as openers:
        if settings.threads == 1:
            every = [openers.begin(on_cores, CPU, _cores())] * len(groups)
        else:
            every = [openers.begin(on_cores, CPU, cores) for cores in groups]
        workers += [_workers(on_cores, graphs, settings, CPU) for graphs in every]
    # CUDA fails at times where it opens two at once: https://github.com/docling-project/docling.rs/issues/452
    with _Openers(1, settings) as one_by_one:
        for device in gpus(settings):
            workers.append(_workers(on_gpus, one_by_one.begin(on_gpus, device, _cores()), settings, device))
    cpu_ns = time.thread_time_ns() - began_ns + sum(openers.spent_ns) + sum(one_by_one.spent_ns)
    # Not the buffers, which come later: those are large and mostly empty, and would be filled.
    return Opened(workers, cpu_ns, large_pages() - occupied)


def memory_of(model: LoadedModel, settings: EngineSettings) -> int:
    """Most bytes that ``model`` takes, its weights and the buffers of all executors.

    Raises ``ArtefactError`` as ``rows_that_fit`` does.
    """
    weights, row = _weights_and_row(model, settings)
    return weights + row * rows_that_fit(model, settings) * executors_of(model.manifest, settings)


def rows_that_fit(model: LoadedModel, settings: EngineSettings) -> int:
    """How many rows an executor can give to ``model``.

    Raises ``ArtefactError`` where the memory that one model may take does not hold it with a single row.
    """
    (weights, row), executors = _weights_and_row(model, settings), executors_of(model.manifest, settings)
    left = settings.max_model_bytes - weights
    rows = min(settings.max_rows, left // (row * executors)) if row else settings.max_rows
    if left < 0 or rows < 1:
        raise ArtefactError(
            f"it takes {(weights + row * executors) / 1e6:,.0f} MB with one text for each executor, and a "
            f"model may take {settings.max_model_bytes / 1e6:,.0f} MB: raise max_model_mb or lower the executors"
        )
    return rows


def _weights_and_row(model: LoadedModel, settings: EngineSettings) -> tuple[int, int]:
    """Bytes of the weights of all executors, and of one row of one executor."""
    config = model.manifest.config
    # Each session keeps the weights as it computes with them, and those of one thread are shared.
    on_gpus = len(_gpus_for(model.manifest, settings))
    copies = on_gpus or (1 if settings.threads == 1 else settings.executors)
    halves = model.manifest.quantisation.scheme == _GPU_SCHEME
    number_bytes = 2 if halves else 4
    kinds = 4 if config.architecture == "encoder-decoder" else 2  # keys and values, of the text and of its source
    row = number_bytes * kinds * config.n_decoder_layers * config.kv_width * config.max_positions
    if halves:
        # Buffers for the usual numbers of beams, and for one other, are taken as a whole.
        row *= len(usual_beams(model.manifest, settings.max_rows)) + 1
    return copies * model.manifest.size_bytes, row


def core_groups(cores: list[int], groups: int, threads: int) -> list[list[int]]:
    """Which cores each of ``groups`` gets: ``threads`` of its own, or all where there are too few."""
    if groups * threads > len(cores):
        return [cores] * groups
    return [cores[group * threads : (group + 1) * threads] for group in range(groups)]


Graphs = Mapping[Path, "Future[ort.InferenceSession]"]


class _Openers:
    """Threads that open graphs beside one another, in the order in which they are asked for."""

    def __init__(self, at_once: int, settings: EngineSettings) -> None:
        self._pool, self._threads = ThreadPoolExecutor(at_once, "open"), settings.threads
        self.spent_ns: list[int] = []
        """CPU time of each graph that was opened."""

    def __enter__(self) -> "_Openers":
        return self

    def __exit__(self, *_: object) -> None:
        # Where one graph fails, nobody waits for those that come after it.
        self._pool.shutdown(cancel_futures=True)

    def begin(self, models: Mapping[str, LoadedModel], device: Device, cores: list[int]) -> Graphs:
        """Have all graphs of ``models`` opened, their threads bound to ``cores``."""
        return {
            model.folder / name: self._pool.submit(self._open, model, name, device, cores)
            for model in models.values()
            for name in _graph_names(model.manifest.config)
        }

    def _open(self, model: LoadedModel, name: str, device: Device, cores: list[int]) -> ort.InferenceSession:
        began_ns = time.thread_time_ns()
        # Threads stay on the cores of the thread that makes them: those of a session on its executor's.
        with _on(cores):
            session = open_graph(model.folder / name, self._threads, device, model.manifest.quantisation.bits)
        self.spent_ns.append(time.thread_time_ns() - began_ns)
        return session


def _graph_names(config: TransformerConfig) -> Sequence[str]:
    if config.architecture == "encoder":
        return ("model.onnx",)
    return ("encoder.onnx", "decoder.onnx", "beams.onnx") if config.has_encoder else ("decoder.onnx", "beams.onnx")


def _check(model: LoadedModel, settings: EngineSettings) -> None:
    """Raise ``ArtefactError`` for a model that the engine does not run."""
    manifest = model.manifest
    check_device(manifest, settings)
    rows_that_fit(model, settings)
    if manifest.layout != "wattle":
        raise ArtefactError(f"manifest.json: graphs of the layout {manifest.layout} are not run")
    if manifest.config.architecture == "encoder-decoder" and manifest.special_ids.bos is None:
        raise ArtefactError("manifest.json: an encoder-decoder needs the special id bos, from which its texts start")


def _workers(
    models: Mapping[str, LoadedModel], graphs: Graphs, settings: EngineSettings, device: Device
) -> dict[str, Worker]:
    """The workers of one executor. Raises what opening the first of ``graphs`` that failed raised."""
    return {key: _worker(model, graphs, settings, device) for key, model in models.items()}


def _worker(model: LoadedModel, graphs: Graphs, settings: EngineSettings, device: Device) -> Worker:
    manifest, config, pad_id = model.manifest, model.manifest.config, model.manifest.special_ids.pad
    sessions = {name: graphs[model.folder / name].result() for name in _graph_names(config)}
    if config.architecture == "encoder":
        return EncodeWorker(EncoderGraph(sessions["model.onnx"], pad_id), settings.max_batch_tokens)
    decoder, beams, source = sessions["decoder.onnx"], sessions["beams.onnx"], sessions.get("encoder.onnx")
    halves = manifest.quantisation.scheme == _GPU_SCHEME
    made = WriteGraphs(config, pad_id, decoder, beams, source, device if halves else None)
    rows = rows_that_fit(model, settings)
    # A GPU has read what it read before in less time than it would be fetched from the host.
    prefix_bytes = 0 if halves else settings.prefix_bytes
    limits = Limits(rows, settings.max_batch_tokens, settings.max_piece_tokens, prefix_bytes)
    return WriteWorker(manifest, made, limits)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def _on(cores: list[int]) -> Iterator[None]:
    """Bind the calling thread to ``cores`` for a while, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
