"""The ONNX graphs against PyTorch, and the promise that a row's result does not depend on its company."""

import shutil
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from models.config import TransformerConfig
from models.graph import KEY_BLOCK, Scheme, quantize, write_graphs, write_observed
from models.processor import keep_products_exact
from models.transformer import Transformer
from tests.tiny import KINDS, WRITERS, Kind, tiny_config, tiny_transformer, weights_of

# The very same bits where the processor multiplies 8-bit integers (AVX-512 VNNI); elsewhere nobody has measured, and
# the last bit of a sum may depend on how many rows there are.
CPU = Path("/proc/cpuinfo")
SAME = 0.0 if CPU.exists() and "avx512_vnni" in CPU.read_text(encoding="utf-8") else 1e-5
LENGTHS = np.array([7, 1, 12, 3, 9])


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    keep_products_exact(options)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ragged(config: TransformerConfig, lengths: NDArray[np.int64] = LENGTHS) -> NDArray[np.int64]:
    """Random texts of ``lengths``, padded on the right to the longest."""
    rng = np.random.default_rng(5)
    ids = rng.integers(1, config.vocab_size, (len(lengths), int(lengths.max())))
    return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 0)


def padded(config: TransformerConfig, lengths: NDArray[np.int64] = LENGTHS) -> NDArray[np.int64]:
    """``ragged``, padded to a multiple of four."""
    ids = ragged(config, lengths)
    return np.pad(ids, ((0, 0), (0, -ids.shape[1] % 4)))


def run(graph: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(names, feeds), strict=True))


class Decoder:
    """decoder.onnx with rows of buffers that are updated in place, as an engine uses it."""

    def __init__(self, folder: Path, config: TransformerConfig, rows: int, capacity: int = 48) -> None:
        self.folder, self.config, self.graph = folder, config, session(folder / "decoder.onnx")
        shape = (rows, config.kv_heads, capacity, config.head_dim)
        self.buffers: dict[str, Any] = {
            f"{part}_{i}": np.zeros(shape, np.float32) for part in "kv" for i in range(config.n_decoder_layers)
        }
        self.known: dict[str, Any] = {}

    def know(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Let the rows know their sources, or the lengths of their prefixes."""
        if self.config.architecture == "prefix-lm":
            self.known = {"prefix_lengths": lengths}
        if self.config.architecture == "encoder-decoder":
            crosses = run(session(self.folder / "encoder.onnx"), {"input_ids": ids, "lengths": lengths})
            room = ((0, 0), (0, 0), (0, -ids.shape[1] % KEY_BLOCK), (0, 0))
            self.known = {name: np.pad(cross, room) for name, cross in crosses.items()}
            self.known["source_lengths"] = lengths

    def step(
        self, ids: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], of: slice = slice(None)
    ) -> dict[str, Any]:
        """Let the rows ``of`` the buffers read ``ids``."""
        rows, tokens = ids.shape
        buffers = {name: array[of] for name, array in self.buffers.items()}
        known = {name: array[of] for name, array in self.known.items()}
        feeds = {"input_ids": ids, "positions": starts, "lengths": lengths, **known, **buffers}
        binding = self.graph.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        outputs = {"logits": np.empty((rows, self.config.vocab_size), np.float32)}
        if self.config.extract_head:
            outputs["extract_logits"] = np.empty((rows, tokens), np.float32)
        outputs |= {f"new_{name}": array for name, array in buffers.items()}
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.graph.run_with_iobinding(binding)
        return outputs


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


@pytest.fixture(params=["none", "blockwise", "rowwise", "calibrated"])
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return cast(Scheme, request.param)


def built(folder: Path, kind: Kind, scheme: Scheme = "none") -> tuple[TransformerConfig, Transformer]:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    weights = weights_of(model)
    # Some matrices have a fixed scale, and others one per row.
    peaks = {name: 4.0 for name in weights if name.endswith(("qkv.weight", "up.weight", "token.weight"))}
    write_graphs(folder, config, weights, scheme, block_size=32, peaks=peaks)
    return config, model


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
def test_an_encoder_equals_pytorch_on_ragged_rows(tmp_path: Path, kind: Kind) -> None:
    config, model = built(tmp_path, kind)
    ids = ragged(config)
    feeds: dict[str, Any] = {"input_ids": ids, "lengths": LENGTHS}
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
    """Ragged rows read a first chunk together, another one each alone, then token by token; logits equal PyTorch's."""
    config, model = built(tmp_path, kind)
    prefixes = np.array([5, 1, 8, 3, 7])
    firsts = np.array([1, 1, 1, 1, 1]) if kind == "encoder-decoder" else prefixes
    texts = np.random.default_rng(1).integers(1, config.vocab_size, (5, 30))
    expected = reference(model, texts, prefixes)
    decoder = Decoder(tmp_path, config, 5, capacity=30)
    decoder.know(ragged(config, prefixes), prefixes)
    starts = np.zeros(5, np.int64)

    def read(lengths: NDArray[np.int64], rows: slice = slice(None)) -> None:
        at = np.minimum(starts[rows, None] + np.arange(lengths[rows].max()), 29)
        logits = decoder.step(np.take_along_axis(texts[rows], at, 1), starts[rows], lengths[rows], rows)["logits"]
        starts[rows] += lengths[rows]
        np.testing.assert_allclose(logits, expected[np.arange(5), starts - 1][rows], atol=1e-4)

    read(firsts)
    for row in range(5):
        read(np.array([2, 4, 1, 3, 2]), slice(row, row + 1))
    for _ in range(10):
        read(np.ones(5, np.int64))


@pytest.mark.parametrize("kind", ["prefix-lm", "bert-prefix-lm"])
def test_extract_scores_equal_pytorch(tmp_path: Path, kind: Kind) -> None:
    config, model = built(tmp_path, kind)
    ids, lengths = ragged(config), torch.from_numpy(LENGTHS)
    decoder = Decoder(tmp_path, config, 5)
    decoder.know(ids, LENGTHS)
    scores = decoder.step(ids, np.zeros(5, np.int64), LENGTHS)["extract_logits"]
    with torch.no_grad():
        expected = model.extract_logits(model.decode(torch.from_numpy(ids), prefix_lengths=lengths)).numpy()
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(scores[row, :length], expected[row, :length], atol=1e-4)


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
def test_an_encoded_row_is_the_same_alone_and_in_company(tmp_path: Path, kind: Kind, scheme: Scheme) -> None:
    config, _ = built(tmp_path, kind, scheme)
    graph = session(tmp_path / "model.onnx")

    def logits(rows: list[int]) -> NDArray[np.float32]:
        width = -(-int(LENGTHS[rows].max()) // 4) * 4
        feeds: dict[str, Any] = {"input_ids": padded(config)[rows, :width], "lengths": LENGTHS[rows]}
        if config.n_token_types:
            feeds["token_types"] = np.zeros_like(feeds["input_ids"])
        return run(graph, feeds)["logits"]

    together = logits([0, 1, 2, 3, 4])
    for row, length in enumerate(LENGTHS):
        real = slice(None) if config.head == "classify" else slice(length)
        np.testing.assert_allclose(together[row][real], logits([row])[0][real], rtol=0, atol=SAME)


def test_vectors_equal_pytorch_and_are_the_same_in_company(tmp_path: Path, scheme: Scheme) -> None:
    config, model = built(tmp_path, "classify", scheme)
    graph = session(tmp_path / "model.onnx")
    ids, lengths = padded(config), LENGTHS
    vectors = run(graph, {"input_ids": ids, "lengths": lengths})["vector"]
    assert vectors.shape == (5, 2 * config.d_model)
    if scheme == "none":
        with torch.no_grad():
            expected = model.vectors(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
        np.testing.assert_allclose(vectors, expected, atol=1e-4)
    for row, length in enumerate(lengths):
        alone = {"input_ids": ids[[row], : -(-length // 4) * 4], "lengths": lengths[[row]]}
        np.testing.assert_allclose(vectors[row], run(graph, alone)["vector"][0], rtol=0, atol=SAME)


def greedy(
    folder: Path, config: TransformerConfig, ids: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> tuple[list[list[int]], NDArray[np.float32]]:
    """Fifteen tokens after each row of ``ids``, and the logits of each ``(rows, 15, words)``."""
    starts = np.zeros(len(ids), np.int64)
    decoder = Decoder(folder, config, len(ids), capacity)
    decoder.know(ids, lengths)
    if config.architecture == "encoder-decoder":
        ids, lengths = np.full((len(ids), 1), 2), np.ones(len(ids), np.int64)
    logits = []
    for _ in range(15):
        logits.append(decoder.step(ids, starts, lengths)["logits"].copy())
        starts, lengths = starts + lengths, np.ones_like(lengths)
        ids = logits[-1].argmax(-1)[:, None]
    by_row = np.stack(logits, axis=1)
    return by_row.argmax(-1).tolist(), by_row


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("is_long", [False, True])
def test_a_written_row_is_the_same_alone_and_in_company(
    tmp_path: Path, kind: Kind, scheme: Scheme, is_long: bool
) -> None:
    config, lengths = tiny_config(kind), LENGTHS
    if is_long:
        wide = {"d_model": 128, "n_heads": 2, "d_ff": 256, "max_positions": 256}
        config, lengths = config.model_copy(update=wide), np.array([37, 5, 150, 64, 2])
    write_graphs(tmp_path, config, weights_of(tiny_transformer(config)), scheme, block_size=64)
    texts, together = greedy(tmp_path, config, padded(config, lengths), lengths, capacity=176)
    assert len({tuple(text) for text in texts}) == 5  # else the rows would prove nothing
    for row in range(5):
        alone = padded(config, lengths)[[row], : -(-lengths[row] // 4) * 4]
        text, logits = greedy(tmp_path, config, alone, lengths[[row]], capacity=192)
        assert text == [texts[row]]
        np.testing.assert_allclose(together[row], logits[0], rtol=0, atol=SAME)


@pytest.mark.parametrize(("bits", "block_size", "least"), [(8, 32, 0.998), (8, 64, 0.998), (4, 16, 0.9)])
@pytest.mark.parametrize("kind", WRITERS)
def test_quantised_logits_stay_close(
    tmp_path: Path, kind: Kind, bits: Literal[4, 8], block_size: int, least: float
) -> None:
    config = tiny_config(kind)
    weights = weights_of(tiny_transformer(config))
    prefixes = np.array([5, 1, 8, 3, 7])
    ids = ragged(config, prefixes)
    logits = []
    schemes: tuple[Scheme, ...] = ("none", "blockwise")
    for scheme in schemes:
        folder = tmp_path / scheme
        folder.mkdir()
        write_graphs(folder, config, weights, scheme, bits, block_size)
        decoder = Decoder(folder, config, 5)
        decoder.know(ids, prefixes)
        logits.append(decoder.step(ids, np.zeros(5, np.int64), prefixes)["logits"])
    plain, quantised = logits
    assert not np.array_equal(plain, quantised)
    assert (plain * quantised).sum() / np.linalg.norm(plain) / np.linalg.norm(quantised) > least


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_observed_is_a_scale_that_cuts_nothing_off(tmp_path: Path, kind: Kind) -> None:
    config = tiny_config(kind)
    weights = weights_of(tiny_transformer(config))
    whole, observed = first_outputs(tmp_path / "observed", config, weights, None), {}
    for name in [name for name in whole if name.startswith("peaks.")]:
        observed[name.removeprefix("peaks.")] = float(whole.pop(name).max())
    matrices = {name for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name}
    assert matrices - observed.keys() <= {"head.out.weight", "head.extract.weight"}
    fixed = first_outputs(tmp_path / "fixed", config, weights, observed)
    halved = {name: peak / 4 for name, peak in observed.items()}
    cut = first_outputs(tmp_path / "cut", config, weights, halved)
    assert whole.keys() == fixed.keys() == cut.keys()
    error = {name: float(np.abs(fixed[name] - whole[name]).max()) for name in whole}
    for name in ("logits", "cross_k_1"):
        if name in whole:
            assert error[name] <= 0.1 * np.abs(whole[name]).max()
            assert np.abs(cut[name] - whole[name]).max() > 2 * error[name]


def test_one_of_two_matrices_with_the_same_input_may_have_a_fixed_scale(tmp_path: Path) -> None:
    config = tiny_config("encoder-decoder")
    weights = weights_of(tiny_transformer(config))
    peak = first_outputs(tmp_path / "observed", config, weights, None)["peaks.decoder.0.cross.kv.weight"].max()
    by_rows = first_outputs(tmp_path / "by-rows", config, weights, {})
    for fixed, other in ((0, 1), (1, 0)):
        peaks = {f"decoder.{fixed}.cross.kv.weight": float(peak)}
        found = first_outputs(tmp_path / str(fixed), config, weights, peaks)
        np.testing.assert_array_equal(found[f"cross_v_{other}"], by_rows[f"cross_v_{other}"])
        error = np.abs(found[f"cross_v_{fixed}"] - by_rows[f"cross_v_{fixed}"]).max()
        assert 0 < error <= 0.1 * np.abs(by_rows[f"cross_v_{fixed}"]).max()


def first_outputs(
    folder: Path, config: TransformerConfig, weights: Any, peaks: dict[str, float] | None
) -> dict[str, NDArray[np.float32]]:
    """All outputs for texts that are read at once; of observed graphs where there are no ``peaks``."""
    folder.mkdir()
    if peaks is None:
        write_observed(folder, config, weights)
    else:
        write_graphs(folder, config, weights, "calibrated", peaks=peaks)
    feeds: dict[str, Any] = {"input_ids": padded(config), "lengths": LENGTHS}
    if config.architecture == "encoder":
        if config.n_token_types:
            feeds["token_types"] = np.zeros_like(feeds["input_ids"])
        return run(session(folder / "model.onnx"), feeds)
    found = {}
    if config.architecture == "encoder-decoder":
        found = run(session(folder / "encoder.onnx"), feeds)
        feeds |= {name: cross for name, cross in found.items() if name.startswith("cross")}
        feeds["source_lengths"] = LENGTHS
    if config.architecture == "prefix-lm":
        feeds["prefix_lengths"] = LENGTHS
    shape = (len(LENGTHS), config.kv_heads, feeds["input_ids"].shape[1], config.head_dim)
    for layer in range(config.n_decoder_layers):
        feeds |= {f"{part}_{layer}": np.zeros(shape, np.float32) for part in "kv"}
    feeds["positions"] = np.zeros_like(LENGTHS)
    return found | run(session(folder / "decoder.onnx"), feeds)


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
    sizes: dict[Scheme, float] = {"none": 4, "blockwise": 1 + 4 / 32}
    for scheme, bytes_per_number in sizes.items():
        folder, moved = tmp_path / scheme, tmp_path / "elsewhere" / scheme
        folder.mkdir()
        files = write_graphs(folder, config, weights, scheme, block_size=32)
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
