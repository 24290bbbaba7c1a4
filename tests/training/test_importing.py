"""Models that the transformers library made, against themselves: logits, texts, and what a folder says."""

import json

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import wattle
from models.manifest import load_manifest
from service.app import create_app
from service.engine.engine import Engine
from service.engine.settings import EngineSettings
from service.engine.types import EncodeItem, Sampling, WriteItem
from service.settings import Settings
from tests.models.test_graph import SAME, Decoder, greedy
from tests.tiny import Loaded
from tests.training.foreign import BOS, EOS, KINDS, PAD, WRITERS, save, word_tokenizer
from training.errors import TrainingError
from training.export import PARITY_LIMIT
from training.importing import import_model
from training.recipe import Storage

WAIT_S = 30.0
LENGTHS = [9, 1, 20, 5, 13]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Imports a kind with a scheme, once; gives their model and ours."""
    root, made = tmp_path_factory.mktemp("imported"), {}

    def get(kind, scheme="none"):
        if kind not in made:
            made[kind] = save(root / "theirs" / kind, kind)
        if (kind, scheme) not in made:
            pair = {"source_language": "en", "target_language": "de"} if kind.startswith("marian") else {}
            out = root / "ours"
            how, texts = Storage(scheme=scheme, block_size=32), root / "texts.txt"
            texts.write_text("w5 w7 w9\n\nw11 w2 w30 w8 w8\nw1\n" * 9)
            if scheme == "calibrated":
                pair["texts"] = texts
            manifest = import_model(root / "theirs" / kind, out, name=f"{kind}-{scheme}", how=how, **pair)
            made[kind, scheme] = Loaded(manifest, out / manifest.name)
        return made[kind], made[kind, scheme]

    return get


def prompts():
    rng = np.random.default_rng(3)
    return [tuple(rng.integers(0, PAD, length).tolist()) for length in LENGTHS]


def answers(loaded, items):
    engine = Engine({"it": loaded}, lambda step: None, EngineSettings())
    try:
        return [ticket.future.result(WAIT_S) for ticket in engine.submit("it", items)]
    finally:
        engine.close()


def write(loaded, texts, **how):
    items = [WriteItem(f"r{n}", ids, Sampling(**{"max_tokens": 12, **how})) for n, ids in enumerate(texts)]
    return [list(output.output_ids) for output in answers(loaded, items)]


@pytest.mark.parametrize("scheme", ["rowwise", "calibrated", "blockwise", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_librarys(imported, kind, scheme):
    """On ragged rows; the import itself refuses what is further off."""
    _, whole = imported(kind)
    assert load_manifest(whole.folder) == whole.manifest
    assert whole.manifest.quantisation.parity_max_error <= PARITY_LIMIT
    _, small = imported(kind, scheme)
    least = {"float16": 0.9999, "blockwise": 0.995, "rowwise": 0.99, "calibrated": 0.98}[scheme]
    assert small.manifest.quantisation.parity_cosine > least
    assert 0 < small.manifest.quantisation.parity_max_error < 1.0
    assert small.manifest.size_bytes < whole.manifest.size_bytes / 1.8


@pytest.mark.parametrize("kind", WRITERS)
def test_reading_in_parts_equals_reading_at_once(imported, kind):
    """A prompt, chunks of each row, then token by token: the logits of each are the library's over the whole text."""
    theirs, ours = imported(kind)
    config, rng = ours.manifest.config, np.random.default_rng(1)
    texts, lengths = rng.integers(0, PAD, (4, 24)), np.array([5, 1, 8, 3])
    inputs = {"input_ids": torch.from_numpy(texts)}
    decoder = Decoder(ours.folder, config, 4, capacity=32)
    if config.architecture == "encoder-decoder":
        sources = np.where(np.arange(8) < lengths[:, None], rng.integers(0, PAD, (4, 8)), PAD)
        decoder.know(sources, lengths)
        mask = torch.from_numpy((np.arange(8) < lengths[:, None]).astype(np.int64))
        inputs = {
            "input_ids": torch.from_numpy(sources),
            "attention_mask": mask,
            "decoder_input_ids": inputs["input_ids"],
        }
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    if kind.startswith("marian"):
        expected[..., PAD] = -np.inf  # which never is written
    starts = np.zeros(4, np.int64)

    def read(chunk, rows=slice(None)):
        at = np.minimum(starts[rows, None] + np.arange(chunk[rows].max()), 23)
        logits = decoder.step(np.take_along_axis(texts[rows], at, 1), starts[rows], chunk[rows], rows)["logits"]
        starts[rows] += chunk[rows]
        np.testing.assert_allclose(logits, expected[np.arange(4), starts - 1][rows], atol=1e-4)

    read(lengths)
    for row in range(4):
        read(np.array([2, 4, 1, 3]), slice(row, row + 1))
    for _ in range(8):
        read(np.ones(4, np.int64))


@pytest.mark.parametrize("kind", WRITERS)
def test_texts_are_the_librarys(imported, kind):
    """Greedy, word for word, of a ragged batch."""
    theirs, ours = imported(kind)
    expected = []
    for ids in prompts():
        with torch.no_grad():
            text = theirs.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=12
            )[0].tolist()
        text = text[1:] if kind.startswith("marian") else text[len(ids) :]
        expected.append(text[: text.index(EOS)] if EOS in text else text)
    # Else they would prove little.
    assert len({tuple(text) for text in expected}) == len(expected)
    assert sum(len(set(text)) for text in expected) > 12
    assert write(ours, prompts()) == expected


@pytest.mark.parametrize("scheme", ["rowwise", "blockwise"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_text_is_the_same_alone_and_in_company(imported, kind, scheme):
    """With eight bits: the same bits of every logit, and so the same text."""
    _, ours = imported(kind, scheme)
    lengths = np.array(LENGTHS)
    ids = np.full((5, 20), PAD)
    for row, prompt in enumerate(prompts()):
        ids[row, : len(prompt)] = prompt
    texts, together = greedy(ours.folder, ours.manifest.config, ids, lengths, capacity=48)
    for row, length in enumerate(lengths):
        alone, logits = greedy(
            ours.folder, ours.manifest.config, ids[[row], : -(-length // 4) * 4], lengths[[row]], capacity=48
        )
        assert alone == [texts[row]]
        np.testing.assert_allclose(together[row], logits[0], rtol=0, atol=SAME)
    together = write(ours, prompts())
    assert [write(ours, [ids])[0] for ids in prompts()] == together


@pytest.mark.parametrize("scheme", ["rowwise", "blockwise"])
@pytest.mark.parametrize("kind", ["bert", "bert-sentiment", "distilbert", "distilbert-sentiment", "bert-answer"])
def test_an_encoded_text_is_the_same_alone_and_in_company(imported, kind, scheme):
    _, ours = imported(kind, scheme)
    items = [EncodeItem(f"r{n}", ids) for n, ids in enumerate(prompts())]
    together = [output.logits for output in answers(ours, items)]
    for item, logits in zip(items, together, strict=True):
        np.testing.assert_allclose(logits, answers(ours, [item])[0].logits, rtol=0, atol=SAME)
    assert together[0].shape == {"bert": (64,), "distilbert": (64,), "bert-answer": (9, 2)}.get(kind, (3,))


def test_a_sentence_encoder_pools_as_its_folder_says(tmp_path):
    theirs = save(tmp_path / "theirs", "bert")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (tmp_path / "theirs" / "modules.json").write_text(json.dumps(modules))
    pooling = tmp_path / "theirs" / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_cls_token": True}))
    manifest = import_model(tmp_path / "theirs", tmp_path, name="ours", how=Storage(scheme="none"))
    ids = prompts()[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).last_hidden_state[0, 0].numpy()
    (output,) = answers(Loaded(manifest, tmp_path / "ours"), [EncodeItem("r", ids)])
    np.testing.assert_allclose(output.logits, expected, atol=1e-4)

    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(TrainingError, match=r"1_Pooling/config.json: pools by \['max_tokens'\]"):
        import_model(tmp_path / "theirs", tmp_path)
    modules.append({"type": "sentence_transformers.models.Dense"})
    (tmp_path / "theirs" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TrainingError, match=r"modules\.json: Dense"):
        import_model(tmp_path / "theirs", tmp_path)


def test_what_a_folder_says_beside_its_weights(tmp_path):
    save(tmp_path / "Tiny_Llama 1", "llama")
    folder = tmp_path / "Tiny_Llama 1"
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    said["eos_token"] = {"content": "<eos>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    manifest = import_model(folder, tmp_path / "out", max_positions=32)
    assert manifest.name == "tiny_llama-1"
    assert manifest.tasks == ("generate",)
    assert manifest.languages == ("und",)
    assert manifest.licence == manifest.parent.licence == "apache-2.0"
    assert manifest.config.max_positions == 32
    assert manifest.max_input_tokens + manifest.generation.max_tokens <= 32
    assert (manifest.generation.temperature, manifest.generation.top_k, manifest.generation.top_p) == (0.6, 0, 0.9)
    special = manifest.special_ids
    assert (special.pad, special.bos, special.eos) == (PAD, BOS, EOS)
    assert manifest.chat_template == '{% set bos_token = "<bos>" %}' + said["chat_template"]
    assert "Imported from Tiny_Llama 1 (apache-2.0)" in (tmp_path / "out" / "tiny_llama-1" / "README.md").read_text()


def test_imported_by_the_command_line_and_served(tmp_path, capsys):
    for kind in ("llama", "marian", "bert-sentiment", "distilbert-answer", "bert"):
        save(tmp_path / kind, kind)
        pair = ["--source-language", "en", "--target-language", "de"] if kind == "marian" else []
        assert wattle.main(["import", str(tmp_path / kind), "--out", str(tmp_path / "out"), *pair]) == 0
        assert f"{tmp_path / 'out' / kind}: " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "llama", "marian", "bert-sentiment", "distilbert-answer", "bert"
    }  # fmt: skip
    assert wattle.main(["models", "--models", str(tmp_path / "out")]) == 0
    bodies = {
        "translate": {"input": ["w1 w2", "w3"], "target": "de"},
        "generate": {"input": "w1 w2 w3", "max_tokens": 5},
        "sentiment": {"input": "w1 w2 w3"},
        "answer": {"question": "w1 w2", "context": "w3 w4 w5", "abstain": False},
    }
    settings = Settings(models=(tmp_path / "out",), ledger=tmp_path / "ledger.sqlite")
    with TestClient(create_app(settings)) as client:
        for task, body in bodies.items():
            answer = client.post(f"/v1/{task}", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["energy"]["active_j"] > 0
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the graphs can express 'silu'"),
        ("llama", {"head_dim": 32}, "head_dim is 32; the graphs can express 16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_scaling or rope_parameters is .*'linear'",
        ),
        ("mistral", {"sliding_window": 16}, "sliding_window is 16, .*--max-positions 16"),
        ("marian", {"activation_function": "gelu_new"}, "activation_function is 'gelu_new'; .* 'relu' or 'gelu' or"),
        ("marian", {"scale_embedding": False}, "scale_embedding is False"),
        ("marian", {"decoder_ffn_dim": 64}, "decoder_ffn_dim is 64; the graphs can express 128"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ("bert-sentiment", {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, "id2label names label_0, label_1; "),
        ("distilbert", {"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_what_the_graphs_cannot_express_is_said(tmp_path, kind, changes, said):
    save(tmp_path / kind, kind, **changes)
    with pytest.raises(TrainingError, match=f"config.json: {said}"):
        import_model(tmp_path / kind, tmp_path / "out", source_language="en", target_language="de")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "names GPT2LMHeadModel; importable are BertForQ"),
        ("config.json", {"architectures": None}, "names nothing; importable"),
        ("config.json", {"model_type": "unheard-of"}, "config.json cannot be read"),
        ("config.json", {"num_hidden_layers": 3}, "the weights lack model.layers.2"),
        ("config.json", {"intermediate_size": 64}, "the weights cannot be loaded"),
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "the weights cannot be loaded"),
        ("tokenizer.json", None, "has no tokenizer.json .*save_pretrained"),
        ("tokenizer.json", "{", "tokenizer.json: cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds no JSON object"),
        ("generation_config.json", "{", "generation_config.json: cannot be read as JSON"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, capsys, file, change, said):
    save(tmp_path / "theirs", "llama")
    path = tmp_path / "theirs" / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TrainingError, match=said):
        import_model(tmp_path / "theirs", tmp_path / "out")
    capsys.readouterr()
    assert wattle.main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("wattle: ") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "needs --texts FILE"), (b"\n \n", "holds no texts"), (b"\xff", "cannot be read")],
)
def test_scales_are_not_fixed_on_nothing(tmp_path, content, said):
    save(tmp_path / "theirs", "bert")
    texts = tmp_path / "texts.txt" if content is not None else None
    if texts is not None:
        texts.write_bytes(content)
    with pytest.raises(TrainingError, match=said):
        import_model(tmp_path / "theirs", tmp_path, name="ours", how=Storage(scheme="calibrated"), texts=texts)
    assert not (tmp_path / "ours").exists()


def test_texts_that_nothing_would_be_fixed_on_are_refused(tmp_path):
    save(tmp_path / "theirs", "bert")
    with pytest.raises(TrainingError, match="rowwise has none: add --scheme calibrated"):
        import_model(tmp_path / "theirs", tmp_path, name="ours", how=Storage(), texts=tmp_path / "texts.txt")


def test_a_tokenizer_with_words_that_the_model_lacks_is_refused(tmp_path):
    save(tmp_path / "theirs", "bert")
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    with pytest.raises(TrainingError, match="the tokenizer's id 96 is beyond the model's 96 words"):
        import_model(tmp_path / "theirs", tmp_path / "out")


def test_a_translator_must_say_its_languages(tmp_path):
    save(tmp_path / "theirs", "marian")
    with pytest.raises(TrainingError, match="give --source-language and --target-language"):
        import_model(tmp_path / "theirs", tmp_path / "out", source_language="en")
    path = tmp_path / "theirs" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source_lang": "en", "target_lang": "fi"}))
    assert import_model(tmp_path / "theirs", tmp_path / "out").languages == ("en", "fi")
    with pytest.raises(TrainingError, match="'Finnish' can be no model's name"):
        import_model(tmp_path / "theirs", tmp_path / "out", name="Finnish")
    with pytest.raises(TrainingError, match="nor a name that the Hub could know"):
        import_model(tmp_path / "no" / "such" / "folder", tmp_path / "out")
