"""What a GPU is given, on the processor's memory: all of it but the provider."""

import ctypes
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from energy.types import Phase, Step
from models.manifest import ArtefactError, GenerationDefaults
from service.engine import devices, loading
from service.engine.buffers import Buffers, Move
from service.engine.devices import CPU, DeviceLogits, DeviceRows, DeviceUnavailable, Recording, gpus
from service.engine.engine import Engine
from service.engine.graphs import DecoderGraph, EncoderGraph, WriteGraphs, open_graph
from service.engine.loading import check_device, open_executors
from service.engine.settings import EngineSettings
from service.engine.types import EngineFailed, Item, Sampling, WriteItem, WriteOutput
from service.engine.workers import WriteWorker
from tests.tiny import BOS, EOS, WRITERS, Kind, Loaded, load_tiny, tiny_config, write_tiny

WAIT_S = 30.0
LIMIT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("halves")
    kinds: tuple[Kind, ...] = (*WRITERS, "classify")
    found = {kind: load_tiny(root, kind, scheme="float16") for kind in kinds}
    return {**found, "single": load_tiny(root, "decoder", "single")}


def item(number: int, **how: Any) -> WriteItem:
    random = np.random.default_rng(number)
    ids = tuple(random.integers(6, 90, int(random.integers(2, 20))).tolist())
    return WriteItem(f"r{number}", ids, Sampling(**{"max_tokens": LIMIT, **how}))


def mixed(count: int) -> list[Item]:
    """Greedy, by chance and by beams."""
    ways: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 3}, {"beams": 3}, {"no_repeat_ngram": 2})
    return [item(number, **ways[number % len(ways)]) for number in range(count)]


def written(running: Engine, model: str, items: Sequence[Item]) -> list[tuple[int, ...]]:
    outputs = [ticket.future.result(WAIT_S) for ticket in running.submit(model, items)]
    return [output.output_ids for output in outputs if isinstance(output, WriteOutput)]


def plain_greedy(model: Loaded, ids: Sequence[int]) -> tuple[int, ...]:
    """One text by the same graph, with arrays of this process and an argmax of its own."""
    config, graph = model.manifest.config, open_graph(model.folder / "decoder.onnx", 1)
    shape = (1, config.kv_heads, 64, config.head_dim)
    memory = {f"{part}_{i}": np.zeros(shape, np.float16) for i in range(config.n_decoder_layers) for part in "kv"}
    feeds: dict[str, Any] = {}
    prompt = np.array([ids], dtype=np.int64)
    if config.architecture == "encoder-decoder":
        source = EncoderGraph(open_graph(model.folder / "encoder.onnx", 1), 0)
        feeds = {**source.run([ids]), "source_lengths": np.array([len(ids)])}
        prompt = np.array([[BOS]])
    if config.architecture == "prefix-lm":
        feeds["prefix_lengths"] = np.array([len(ids)])
    found: list[int] = []
    position = 0
    while len(found) < LIMIT:
        binding = graph.io_binding()
        width = prompt.shape[1]
        inputs = {"input_ids": prompt, "positions": np.array([position]), "lengths": np.array([width])}
        if config.architecture != "prefix-lm":
            inputs["total"] = np.array(position + width, dtype=np.int32)
        for name, array in (feeds | inputs).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in memory.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new_{name}", value)
        binding.bind_output("logits")
        graph.run_with_iobinding(binding)
        token = int(binding.get_outputs()[-1].numpy()[0].argmax())
        if token == EOS:
            break
        position += width
        found.append(token)
        prompt = np.array([[token]])
    return tuple(found)


@pytest.mark.parametrize("kind", WRITERS)
def test_texts_are_those_of_a_plain_loop_alone_and_in_company(models: dict[str, Loaded], kind: Kind) -> None:
    # Small pieces and few rows: prompts are read in parts and handed over, texts move as others end.
    limits = EngineSettings(max_rows=8, max_piece_tokens=8)
    running = Engine({kind: models[kind]}, lambda step: None, limits)
    try:
        greedy = [item(number) for number in range(6)]
        assert written(running, kind, greedy) == [plain_greedy(models[kind], each.input_ids) for each in greedy]
        together = written(running, kind, mixed(16))
        assert [written(running, kind, [each])[0] for each in mixed(16)] == together
    finally:
        running.close()


def test_a_gpu_runs_what_is_stored_for_it_and_the_processor_the_rest(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Made of the processor's memory, and named as the first GPU.
    monkeypatch.setattr(loading, "gpus", lambda settings: (CPU,))
    steps: list[Step] = []
    chosen = {name: models[name] for name in ("decoder", "single", "classify")}
    running = Engine(chosen, steps.append, EngineSettings(executors=2, device="auto"))
    try:
        for model in ("decoder", "single"):
            written(running, model, [item(number) for number in range(4)])
    finally:
        running.close()
    where = {(step.model, step.device) for step in steps if step.device != "cpu"}
    assert where == {("decoder", "gpu:0"), ("classify", "gpu:0"), ("single", "cpu:0"), ("single", "cpu:1")}


def test_on_a_device_few_numbers_of_texts_are_enough(models: dict[str, Loaded]) -> None:
    model = models["encoder-decoder"]
    config, sessions = (
        model.manifest.config,
        [open_graph(model.folder / name, 1) for name in ("decoder.onnx", "beams.onnx", "encoder.onnx")],
    )
    graphs = WriteGraphs(config, 0, *sessions, device=CPU)
    plain, beams, many = graphs.decoder(13, 1), graphs.decoder(5, 3), graphs.decoder(40, 1)
    assert [used + plain.padding_rows(used) for used in range(1, 14)] == [1, 2, 4, 4, 8, 8, 8, 8, *[13] * 5]
    assert [used + beams.padding_rows(used) for used in (3, 6, 9, 12, 15)] == [3, 6, 12, 12, 15]
    assert [used + many.padding_rows(used) for used in (16, 17, 24, 25, 33)] == [16, 24, 24, 32, 40]
    for decoder in (plain, beams):
        decoder.read_sources(0, [[7, 8, 9]] * 4)
        decoder.warm_up()
        assert not decoder.positions.any()
    assert sorted(plain._recordings) == [1, 2, 4, 8, 13]
    assert sorted(beams._recordings) == [3, 6, 12, 15]
    # What steps along leaves no trace.
    alone = np.array(plain.step([BOS]))
    plain.read_sources(0, [[7, 8, 9]] * 4)
    together = np.array(plain.step([BOS] * 3))
    assert plain.positions.tolist() == [1] * 3 + [0] * 10
    assert (together == together[:1]).all()
    assert np.abs(together - alone).max() < 0.01  # products of a single row sum halves in another order


def test_a_device_has_memory_for_every_number_of_beams_that_may_be_written_at_once(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "gpus", lambda settings: (CPU,))
    usual, model = GenerationDefaults(max_tokens=16, beams=4), models["decoder"]
    manifest = model.manifest.model_copy(update={"generation": usual})
    config = manifest.config
    row = 2 * 2 * config.n_decoder_layers * config.kv_width * config.max_positions
    limits = EngineSettings(max_model_bytes=manifest.size_bytes + 3 * 12 * row)
    running = Engine({"decoder": Loaded(manifest, model.folder)}, lambda step: None, limits)
    try:
        # Of 12 rows each: for one beam, for the usual four, and for any other number.
        [worker] = [each.workers["decoder"] for each in running._executors if each.device == "gpu:0"]
        assert isinstance(worker, WriteWorker)
        assert {beams: len(lane.decoder.positions) for beams, lane in worker._lanes.items()} == {1: 12, 4: 12}
        many = [item(number, beams=1 + number % 5) for number in range(20)]
        together = written(running, "decoder", many)
        assert len(worker._lanes) == 3
        assert [written(running, "decoder", [each])[0] for each in many] == together
    finally:
        running.close()


def test_rows_that_step_along_are_padding(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "gpus", lambda settings: (CPU,))
    steps: list[Step] = []
    running = Engine({"decoder": models["decoder"]}, steps.append, EngineSettings(device="auto"))
    try:
        written(running, "decoder", [item(number) for number in range(3)])
    finally:
        running.close()
    writing = [step for step in steps if step.work is not None and step.work.phase is Phase.DECODE]
    assert {(len(step.work.tokens), step.padding_tokens) for step in writing if step.work} >= {(3, 1)}


@pytest.mark.parametrize("lost", ["at the check", "as texts are forgotten"])
def test_who_loses_a_gpu_computes_nothing_more_and_says_so(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "gpus", lambda settings: (CPU,))
    devices.check_works(CPU)
    running = Engine({name: models[name] for name in ("decoder", "single")}, lambda step: None, EngineSettings())

    def illegal(*_: Any) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    try:
        written(running, "decoder", [item(0)])
        # A step that fails on a device that goes on fails alone.
        monkeypatch.setattr(Recording, "run", illegal)
        with pytest.raises(RuntimeError, match="CUDA failure 700"):
            written(running, "decoder", [item(1)])
        assert running.lost is None
        if lost == "at the check":
            monkeypatch.setattr(devices, "_copier", illegal)
        else:
            monkeypatch.setattr(DecoderGraph, "move", illegal)
        tickets = running.submit("decoder", [item(number) for number in range(2, 40)])
        for ticket in tickets:
            with pytest.raises(EngineFailed, match="gpu:0 has failed"):
                ticket.future.result(WAIT_S)
        with pytest.raises(EngineFailed, match="gpu:0 has failed"):
            running.submit("single", [item(40)])
        assert "must be started anew" in caplog.text
    finally:
        running.close()


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpus.cache_clear()
    assert gpus(EngineSettings(device="cpu")) == ()
    assert gpus(EngineSettings(device="auto", gpus=(7,))) == ()
    with pytest.raises(DeviceUnavailable, match=r"GPU 7: it needs the extra \[gpu\]"):
        gpus(EngineSettings(device="cuda", gpus=(7,)))
    # Who has not installed what runs on GPUs expects none.
    open_executors(EngineSettings(device="auto", gpus=(7,)), {})
    assert not caplog.records
    installed = [devices._PROVIDER, "CPUExecutionProvider"]
    monkeypatch.setattr(devices.ort, "get_available_providers", lambda: installed)
    with warnings.catch_warnings(action="ignore"):  # the package for the processor says that it knows no CUDA
        assert gpus(EngineSettings(device="auto", gpus=(8,))) == ()
    open_executors(EngineSettings(device="auto", gpus=(8,)), {})
    assert "run on the processor" in caplog.text


def test_a_model_that_no_gpu_runs_is_refused_only_where_all_must(models: dict[str, Loaded]) -> None:
    for device in ("auto", "cpu"):
        check_device(models["single"].manifest, EngineSettings(device=device))  # type: ignore[arg-type]
    check_device(models["decoder"].manifest, EngineSettings(device="cuda"))
    with pytest.raises(ArtefactError, match="`wattle import FOLDER --scheme float16`"):
        check_device(models["single"].manifest, EngineSettings(device="cuda"))


def contents(rows: DeviceRows) -> dict[str, list[float]]:
    """What stands at the beginning of each row of each region; all of a row must be alike."""
    found = {}
    for name, region in rows._regions.items():
        array = np.ctypeslib.as_array((ctypes.c_uint16 * int(np.prod(region.shape))).from_address(region.address))
        values = array.view(np.float16).reshape(region.shape[0], -1)
        assert (values == values[:, :1]).all()
        found[name] = values[:, 0].tolist()
    return found


@pytest.mark.parametrize("most_numbers", [devices._MOST_NUMBERS, 128 * 5, 1])
def test_rows_of_all_regions_are_copied(monkeypatch: pytest.MonkeyPatch, most_numbers: int) -> None:
    monkeypatch.setattr(devices, "_MOST_NUMBERS", most_numbers)
    rows, other = (DeviceRows(CPU, ["k", "v"], (count, 2, 16, 4)) for count in (5, 1))
    assert contents(rows) == {"k": [0.0] * 5, "v": [0.0] * 5}
    numbers = np.arange(10, dtype=np.float16).reshape(-1, 1, 1, 1)
    rows._memory.update_inplace(np.ones((10, 2, 16, 4), np.float16) * numbers)
    # One after the other: what was copied to row 1 goes on to 3, and not what is copied to it later.
    rows.copy([Move(0, 1, 0, 9), Move(1, 3, 2, 9), Move(4, 1, 0, 9), Move(2, 0, 0, 9)])
    assert contents(rows) == {"k": [2.0, 4.0, 2.0, 0.0, 4.0], "v": [7.0, 9.0, 7.0, 5.0, 9.0]}
    other._memory.update_inplace(np.full((2, 2, 16, 4), 33, np.float16))
    rows.adopt(2, other, 5)
    rows.copy([])
    assert contents(rows) == {"k": [2.0, 4.0, 33.0, 0.0, 4.0], "v": [7.0, 9.0, 33.0, 5.0, 9.0]}


@given(copies=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
@settings(deadline=None)
def test_copies_are_those_of_the_host(copies: list[tuple[int, int]]) -> None:
    rows, host = DeviceRows(CPU, ["k"], (5, 1, 16, 1)), Buffers(["k"], 5, 1, 1, 16)
    numbers = np.arange(5, dtype=np.float16).reshape(-1, 1, 1, 1)
    rows._memory.update_inplace(np.ones((5, 1, 16, 1), np.float16) * numbers)
    host.arrays["k"][:] = numbers
    moves = [Move(source, target, 0, host.capacity) for source, target in copies]
    rows.copy(moves)
    host.copy(moves)
    assert contents(rows)["k"] == host.arrays["k"][:, 0, 0, 0].tolist()


def test_logits_are_fetched_only_when_they_are_looked_at() -> None:
    value = ort.OrtValue.ortvalue_from_numpy(np.array([[0.0, 2.0], [5.0, 1.0]], dtype=np.float32))
    logits = DeviceLogits(value, np.array([1, 0]))
    assert logits.argmax(-1).tolist() == [1, 0]
    assert logits.value is value
    assert logits[1].tolist() == [5.0, 1.0]
    logits[1, [0]] = -np.inf
    # What the device holds is another now.
    assert logits.value is None
    assert np.asarray(logits).tolist() == [[0.0, 2.0], [-np.inf, 1.0]]


def test_the_graph_that_copies_is_what_it_says() -> None:
    graph = onnx.load_from_string(devices._COPY).graph
    assert list(graph.node) == [
        helper.make_node("Gather", ["from", "source"], ["rows"]),
        helper.make_node("Shape", ["rows"], ["shape"]),
        helper.make_node("Expand", ["target", "shape"], ["places"]),
        helper.make_node("ScatterElements", ["to", "places", "rows"], ["y"], axis=0),
    ]
    kinds = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}
    halves, places = TensorProto.FLOAT16, TensorProto.INT32
    assert kinds == {"from": halves, "source": places, "to": halves, "target": places, "y": halves}


def test_half_precision_is_near_single(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("classify", "span", "bert-span")
    for kind in kinds:
        logits = []
        for scheme in ("none", "float16"):
            folder = tmp_path / f"{kind}-{scheme}"
            write_tiny(folder, kind, name=kind, scheme=scheme)  # type: ignore[arg-type]
            graph = EncoderGraph(open_graph(folder / "model.onnx", 1), 0)
            types = [[0] * 3, [0] * 6] if tiny_config(kind).n_token_types else []
            logits.append(graph.run([[7, 8, 9], [10, 11, 12, 13, 14, 15]], types)["logits"])
        assert logits[1].dtype == np.float32
        assert 0 < np.abs(logits[0] - logits[1]).max() < 0.02
