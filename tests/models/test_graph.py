"""The ONNX graphs against PyTorch, and the promise that a row's result does not depend on its company."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from models.config import TransformerConfig
from models.graph import quantize, write_graphs
from models.transformer import Transformer
from tests.tiny import KINDS, WRITERS, Kind, tiny_config, tiny_transformer, weights_of

Arrays = dict[str, NDArray[np.generic]]
LENGTHS = np.array([7, 1, 12, 3, 9])


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ragged(config: TransformerConfig, lengths: NDArray[np.int64] = LENGTHS) -> NDArray[np.int64]:
    rng = np.random.default_rng(5)
    ids = rng.integers(1, config.vocab_size, (len(lengths), int(lengths.max())))
    return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 0)


def run(graph: ort.InferenceSession, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(names, feeds), strict=True))


class Decoder:
    """decoder.onnx with rows of buffers, updated in place as the engine does it."""

    def __init__(self, folder: Path, config: TransformerConfig, rows: int, capacity: int = 40) -> None:
        self.config, self.graph = config, session(folder / "decoder.onnx")
        shape = (rows, capacity, config.d_model)
        self.buffers = {
            f"{part}_{i}": np.zeros(shape, np.float32) for part in "kv" for i in range(config.n_decoder_layers)
        }
        self.constant: Arrays = {}

    def step(self, ids: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Arrays:
        rows, tokens = ids.shape
        feeds = {"input_ids": ids, "positions": starts, "lengths": lengths}
        feeds |= {name: array[:rows] for name, array in (self.constant | self.buffers).items()}
        binding = self.graph.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        outputs = {"logits": np.empty((rows, self.config.vocab_size), np.float32)}
        if self.config.extract_head:
            outputs["extract_logits"] = np.empty((rows, tokens), np.float32)
        outputs |= {f"new_{name}": array[:rows] for name, array in self.buffers.items()}
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.graph.run_with_iobinding(binding)
        return outputs


def started(folder: Path, config: TransformerConfig, lengths: NDArray[np.int64], capacity: int = 40) -> Decoder:
    """A decoder whose rows know their sources or prefixes (lengths of ``ragged``), but have read nothing yet."""
    decoder = Decoder(folder, config, len(lengths), capacity)
    if config.architecture == "prefix-lm":
        decoder.constant = {"prefix_lengths": lengths}
    if config.architecture == "encoder-decoder":
        source = {"input_ids": ragged(config, lengths), "lengths": lengths}
        decoder.constant = {"source_lengths": lengths, **run(session(folder / "encoder.onnx"), source)}
    return decoder


@torch.no_grad()
def reference(model: Transformer, ids: NDArray[np.int64], prefixes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits (b, s, words) of every position; ``prefixes`` are the lengths of sources or prefixes."""
    texts, lengths = torch.from_numpy(ids), torch.from_numpy(prefixes)
    if model.config.architecture == "encoder-decoder":
        memory = model.encode(torch.from_numpy(ragged(model.config, prefixes)), lengths)
        hidden = model.decode(texts, memory=memory, memory_lengths=lengths)
    elif model.config.architecture == "prefix-lm":
        types = (torch.arange(texts.size(1)) >= lengths[:, None]).long() if model.config.n_token_types else None
        hidden = model.decode(texts, prefix_lengths=lengths, token_types=types)
    else:
        hidden = model.decode(texts)
    return np.asarray(model.word_logits(hidden).numpy())


@pytest.fixture(params=["none", "blockwise"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def built(folder: Path, kind: Kind, scheme: str = "none") -> tuple[TransformerConfig, Transformer]:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    write_graphs(folder, config, weights_of(model), scheme, block_size=32)  # type: ignore[arg-type]
    return config, model


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
def test_an_encoder_equals_pytorch_on_ragged_rows(tmp_path: Path, kind: Kind) -> None:
    config, model = built(tmp_path, kind)
    ids = ragged(config)
    feeds = {"input_ids": ids, "lengths": LENGTHS}
    types = np.random.default_rng(0).integers(0, 2, ids.shape) if config.n_token_types else None
    if types is not None:
        feeds["token_types"] = types
    logits = run(session(tmp_path / "model.onnx"), feeds)["logits"]
    lengths = torch.from_numpy(LENGTHS)
    with torch.no_grad():
        hidden = model.encode(torch.from_numpy(ids), lengths, None if types is None else torch.from_numpy(types))
        expected = model.label_logits(hidden, lengths) if config.head == "classify" else model.span_logits(hidden)
    assert logits.shape == expected.shape
    for row, length in enumerate(LENGTHS):
        real = slice(None) if config.head == "classify" else slice(length)
        np.testing.assert_allclose(logits[row][real], expected[row][real].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", WRITERS)
def test_prefill_and_single_steps_equal_a_full_recompute(tmp_path: Path, kind: Kind) -> None:
    """Ragged rows read a first chunk, then three ragged chunks, then token by token; logits equal PyTorch's."""
    config, model = built(tmp_path, kind)
    prefixes = np.array([5, 1, 8, 3, 7])
    firsts = np.array([1, 1, 1, 1, 1]) if kind == "encoder-decoder" else prefixes
    texts = np.random.default_rng(1).integers(1, config.vocab_size, (5, 30))
    expected = reference(model, texts, prefixes)
    decoder = started(tmp_path, config, prefixes)
    starts = np.zeros(5, np.int64)
    for lengths in (firsts, np.array([2, 4, 1, 3, 2]), *[np.ones(5, np.int64)] * 10):
        at = np.minimum(starts[:, None] + np.arange(lengths.max()), 29)
        logits = decoder.step(np.take_along_axis(texts, at, 1), starts, lengths)["logits"]
        starts = starts + lengths
        np.testing.assert_allclose(logits, expected[np.arange(5), starts - 1], atol=1e-4)


@pytest.mark.parametrize("kind", ["prefix-lm", "bert-prefix-lm"])
def test_extract_scores_equal_pytorch(tmp_path: Path, kind: Kind) -> None:
    config, model = built(tmp_path, kind)
    ids, lengths = ragged(config), torch.from_numpy(LENGTHS)
    scores = started(tmp_path, config, LENGTHS).step(ids, np.zeros(5, np.int64), LENGTHS)["extract_logits"]
    with torch.no_grad():
        expected = model.extract_logits(model.decode(torch.from_numpy(ids), prefix_lengths=lengths)).numpy()
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(scores[row, :length], expected[row, :length], atol=1e-4)


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
def test_an_encoded_row_is_the_same_alone_and_in_company(tmp_path: Path, kind: Kind, scheme: str) -> None:
    config, _ = built(tmp_path, kind, scheme)
    graph = session(tmp_path / "model.onnx")

    def logits(rows: slice, width: int) -> NDArray[np.float32]:
        feeds: Arrays = {"input_ids": ragged(config)[rows, :width], "lengths": LENGTHS[rows]}
        if config.n_token_types:
            feeds["token_types"] = np.zeros_like(feeds["input_ids"])
        return run(graph, feeds)["logits"]

    together = logits(slice(None), int(LENGTHS.max()))
    for row, length in enumerate(LENGTHS):
        alone = logits(slice(row, row + 1), length)[0]
        in_company = together[row] if config.head == "classify" else together[row, :length]
        np.testing.assert_allclose(in_company, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", WRITERS)
def test_greedy_text_is_the_same_alone_and_in_company(tmp_path: Path, kind: Kind, scheme: str) -> None:
    config, _ = built(tmp_path, kind, scheme)

    def greedy(rows: list[int], capacity: int) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
        lengths = LENGTHS[rows]
        decoder = started(tmp_path, config, LENGTHS, capacity)
        decoder.constant = {name: array[rows] for name, array in decoder.constant.items()}
        ids, starts = ragged(config)[rows, : lengths.max()], np.zeros(len(rows), np.int64)
        if kind == "encoder-decoder":
            ids, lengths = np.full((len(rows), 1), 2), np.ones(len(rows), np.int64)
        texts, all_logits = [], []
        for _ in range(15):
            all_logits.append(decoder.step(ids, starts, lengths)["logits"].copy())
            starts, lengths = starts + lengths, np.ones_like(lengths)
            ids = all_logits[-1].argmax(-1)[:, None]
            texts.append(ids[:, 0])
        return np.stack(texts, 1).tolist(), all_logits

    together, logits = greedy([0, 1, 2, 3, 4], capacity=40)
    assert len({tuple(text) for text in together}) == 5  # else the rows would prove nothing
    for row in range(5):
        alone, alone_logits = greedy([row], capacity=64)
        assert alone == [together[row]]
        for step in range(15):
            np.testing.assert_allclose(logits[step][row], alone_logits[step][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "block_size", "least"), [(8, 32, 0.999), (8, 64, 0.999), (4, 16, 0.97)])
@pytest.mark.parametrize("kind", WRITERS)
def test_quantised_logits_stay_close(tmp_path: Path, kind: Kind, bits: int, block_size: int, least: float) -> None:
    config = tiny_config(kind)
    weights = weights_of(tiny_transformer(config))
    prefixes = np.array([5, 1, 8, 3, 7])
    logits = []
    for name, scheme in (("plain", "none"), ("quantised", "blockwise")):
        (tmp_path / name).mkdir()
        write_graphs(tmp_path / name, config, weights, scheme, bits, block_size)  # type: ignore[arg-type]
        decoder = started(tmp_path / name, config, prefixes)
        logits.append(decoder.step(ragged(config, prefixes), np.zeros(5, np.int64), prefixes)["logits"])
    plain, quantised = logits
    cosine = (plain * quantised).sum() / np.linalg.norm(plain) / np.linalg.norm(quantised)
    assert cosine > least


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_give_the_weights_back(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    weight[2] = 0
    codes, scales = quantize(weight, bits, 16)
    assert codes.shape == (6, 4, 16 * bits // 8) and scales.shape == (6, 4)
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(6, 4, 16)
    back = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    # Half a step, and one step where the code above the highest is cut off.
    assert (np.abs(back - weight.reshape(6, 4, 16)) <= np.abs(scales[..., None]) * 1.001).all()
    assert np.abs(back - weight.reshape(6, 4, 16)).mean() < np.abs(scales).mean() / 3


def test_a_row_that_blocks_cannot_cut_is_refused(tmp_path: Path) -> None:
    config = tiny_config("decoder").model_copy(update={"d_model": 24})
    with pytest.raises(ValueError, match="24 numbers"):
        write_graphs(tmp_path, config, weights_of(tiny_transformer(config)), "blockwise")


def test_shared_weights_lie_once_on_disk_and_the_folder_can_move(tmp_path: Path) -> None:
    """Encoder, decoder and output layer of a translator share the embedding; nothing is stored twice."""
    config = tiny_config("encoder-decoder")
    weights = weights_of(tiny_transformer(config))
    numbers = sum(array.size for array in weights.values())
    for scheme, bytes_per_number in (("none", 4), ("blockwise", 1 + 4 / 32)):
        folder, moved = tmp_path / scheme, tmp_path / "elsewhere" / scheme
        folder.mkdir()
        files = write_graphs(folder, config, weights, scheme, block_size=32)  # type: ignore[arg-type]
        assert sorted(files) == sorted(folder.iterdir())
        assert sum(file.stat().st_size for file in files) < numbers * bytes_per_number + 50_000
        lengths = np.array([3, 5])
        before = run(session(folder / "encoder.onnx"), {"input_ids": ragged(config, lengths), "lengths": lengths})
        moved.parent.mkdir(exist_ok=True)
        shutil.move(folder, moved)
        after = run(session(moved / "encoder.onnx"), {"input_ids": ragged(config, lengths), "lengths": lengths})
        assert all(np.array_equal(before[name], after[name]) for name in before)
        session(moved / "decoder.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_stays_small(tmp_path: Path, kind: Kind) -> None:
    """The graphs hold structure, the weights lie beside them."""
    built(tmp_path, kind, "blockwise")
    for graph in tmp_path.glob("*.onnx"):
        assert graph.stat().st_size < 40_000
