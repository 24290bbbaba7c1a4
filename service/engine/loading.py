"""Opens model folders: which graphs an architecture has, and which worker runs them."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from models.manifest import ArtefactError, Manifest
from service.engine.devices import CPU, Device, gpus
from service.engine.executor import Executor
from service.engine.graphs import EncoderGraph, WriteGraphs, open_graph
from service.engine.pages import enlarge_pages, large_pages
from service.engine.settings import EngineSettings
from service.engine.workers import EncodeWorker, Limits, Worker, WriteWorker

_GPU_SCHEME = "float16"
"""CUDA has no kernels for products of integers with a scale per row, and its attention over buffers is in halves."""
_log = logging.getLogger(__name__)


class LoadedModel(Protocol):
    """A verified model folder."""

    @property
    def manifest(self) -> Manifest:
        """What the folder says of itself."""

    @property
    def folder(self) -> Path:
        """Where the graphs lie."""


def open_executors(settings: EngineSettings) -> list[Executor]:
    """Executors without models: on the processor, each with cores of its own where there are enough, and one for each
    GPU. Raises ``DeviceUnavailable``."""
    groups = core_groups(_cores(), settings.executors, settings.threads)
    executors = [Executor(f"cpu:{number}", cores, settings.threads) for number, cores in enumerate(groups)]
    return [*executors, *(Executor(device.name, _cores(), 1) for device in gpus(settings))]


def executors_of(manifest: Manifest, settings: EngineSettings) -> int:
    """How many executors run a model: all GPUs, or else all groups of cores."""
    return len(_gpus_for(manifest, settings)) or settings.executors


def check_device(manifest: Manifest, settings: EngineSettings) -> None:
    """Raise ``ArtefactError`` for a model that cannot run where ``settings`` want all models to."""
    if settings.device == "cuda" and manifest.quantisation.scheme != _GPU_SCHEME:
        stored = manifest.quantisation.scheme
        raise ArtefactError(
            f"manifest.json: stored as {stored}, and GPUs run {_GPU_SCHEME}: run `wattle export` with scheme = "
            f'"{_GPU_SCHEME}" under [export] of its recipe, or `wattle import --scheme {_GPU_SCHEME}`; or set device '
            "to auto"
        )


def _gpus_for(manifest: Manifest, settings: EngineSettings) -> Sequence[Device]:
    return gpus(settings) if manifest.quantisation.scheme == _GPU_SCHEME else ()


def open_workers(models: Mapping[str, LoadedModel], settings: EngineSettings) -> list[dict[str, Worker]]:
    """Load the graphs of ``models``: for each executor, the worker of each model.

    Graphs of one thread are loaded once and shared. Raises ``ArtefactError`` for a model that the engine does not run.
    """
    occupied = large_pages()
    opened = []
    sessions: dict[Path, ort.InferenceSession] = {}
    for cores in core_groups(_cores(), settings.executors, settings.threads):
        if settings.threads > 1:
            sessions = {}
        # Threads stay on the cores of the thread that makes them: those of a session on its executor's.
        here = {key: model for key, model in models.items() if not _gpus_for(model.manifest, settings)}
        with _on(cores):
            opened.append({key: _open(model, sessions, settings, CPU) for key, model in here.items()})
    for device in gpus(settings):
        here = {key: model for key, model in models.items() if _gpus_for(model.manifest, settings)}
        opened.append({key: _open(model, {}, settings, device) for key, model in here.items()})
    # Not the buffers: those are large and mostly empty, and would be filled.
    _log.debug("%d MB lie in large pages", enlarge_pages(occupied) // 1_000_000)
    return opened


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
    number_bytes = 2 if model.manifest.quantisation.scheme == _GPU_SCHEME else 4
    kinds = 4 if config.architecture == "encoder-decoder" else 2  # keys and values, of the text and of its source
    row = number_bytes * kinds * config.n_decoder_layers * config.kv_width * config.max_positions
    return copies * model.manifest.size_bytes, row


def core_groups(cores: list[int], groups: int, threads: int) -> list[list[int]]:
    """Which cores each of ``groups`` gets: ``threads`` of its own, or all where there are too few."""
    if groups * threads > len(cores):
        return [cores] * groups
    return [cores[group * threads : (group + 1) * threads] for group in range(groups)]


def _open(
    model: LoadedModel, sessions: dict[Path, ort.InferenceSession], settings: EngineSettings, device: Device
) -> Worker:
    manifest, config = model.manifest, model.manifest.config
    check_device(manifest, settings)
    rows = rows_that_fit(model, settings)
    if manifest.layout != "wattle":
        raise ArtefactError(f"manifest.json: graphs of the layout {manifest.layout} are not run")

    def session(name: str) -> ort.InferenceSession:
        path = model.folder / name
        if path not in sessions:
            sessions[path] = open_graph(path, settings.threads, device, manifest.quantisation.bits)
        return sessions[path]

    pad_id = manifest.special_ids.pad
    if config.architecture == "encoder":
        return EncodeWorker(EncoderGraph(session("model.onnx"), pad_id), settings.max_batch_tokens)
    if config.has_encoder and manifest.special_ids.bos is None:
        raise ArtefactError("manifest.json: an encoder-decoder needs the special id bos, from which its texts start")
    source = session("encoder.onnx") if config.has_encoder else None
    halves = manifest.quantisation.scheme == _GPU_SCHEME
    decoder, beams = session("decoder.onnx"), session("beams.onnx")
    graphs = WriteGraphs(config, pad_id, decoder, beams, source, device if halves else None)
    limits = Limits(rows, settings.max_batch_tokens, settings.max_piece_tokens, settings.prefix_bytes)
    return WriteWorker(manifest, graphs, limits)


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
