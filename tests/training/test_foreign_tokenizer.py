"""Marian's SentencePiece files as one tokenizer, against the library's own."""

import json
import random

import pytest
import sentencepiece
from transformers import MarianTokenizer

from tests.tiny import SENTENCES
from training.errors import TrainingError
from training.foreign_tokenizer import read_tokenizer

# Of two languages: what one of them lacks, and what normalisation and white space may do.
ODD = [
    "  The  quick\tbrown fox\n",
    "ﬁne ½ Ａｕｇｕｓｔ … “quoted”",
    "läuft 東京 läuft über grüne",
    "</s> <pad> x",
    "ß",
    "joules" * 3,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As Marian's makers save it: two models of pieces, one vocabulary, whose order is neither's."""
    folder = tmp_path_factory.mktemp("marian")
    english = [text for text in SENTENCES if "ü" not in text]
    texts = {"source": [*english, "1 < 2 / 3 > 0"], "target": [t for t in SENTENCES if "ü" in t]}
    pieces = set()
    for name, sentences in texts.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 20),
            model_prefix=str(folder / name),
            vocab_size=80,
            hard_vocab_limit=False,
            model_type="unigram",
            minloglevel=2,
        )
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        (folder / f"{name}.vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces |= {model.id_to_piece(number) for number in range(3, model.get_piece_size())}
    order = sorted(pieces)
    random.Random(0).shuffle(order)
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "<unk>", *order, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_reads_and_writes_as_the_library_does(folder):
    ours, theirs = read_tokenizer(folder, None), MarianTokenizer.from_pretrained(folder)
    ours.encode_special_tokens = True  # as the service reads what callers type
    for text in [*SENTENCES, *ODD]:
        plain = theirs.convert_tokens_to_ids(theirs._tokenize(text))
        assert ours.encode(text).ids == [*plain, 0], text
    for text in SENTENCES:
        ids = theirs(text_target=text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_text_of_several_languages_begins_with_its_own(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    last = vocabulary["<pad>"]
    vocabulary |= {">>deu<<": last, ">>nld<<": last + 1, "<pad>": last + 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    ids = read_tokenizer(tmp_path, "nld").encode("bees").ids
    assert ids == [last + 1, *read_tokenizer(folder, None).encode("bees").ids]
    with pytest.raises(TrainingError, match="--target-language, one of deu, nld"):
        read_tokenizer(tmp_path, "de")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda vocabulary: vocabulary.pop("<pad>"), "has no <pad>"),
        (lambda vocabulary: vocabulary.update({"<pad>": 500}), "its ids are not 0 to"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(folder, tmp_path, change, said):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    change(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(TrainingError, match=said):
        read_tokenizer(tmp_path, None)
    (tmp_path / "source.spm").unlink()
    with pytest.raises(TrainingError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, None)
