"""The tokenizer of a Hugging Face folder: as it is, or built from the SentencePiece files of a Marian folder.

Knows nothing of models.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from training.errors import TrainingError

_UNIGRAM = 1  # of SentencePiece's model types
_NORMAL = 1  # of its types of pieces
_LAST_RESORT = 1_000.0
"""So far below every other piece score those that only stand for what has no other."""
_MARIAN_FILES = ("vocab.json", "source.spm")


def read_tokenizer(folder: Path, target_language: str | None) -> Tokenizer:
    """``tokenizer.json``, or what Marian has in its place; ``target_language`` is one of several that it writes.

    Raises ``TrainingError`` where there is neither.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TrainingError(f"{path}: cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    missing = [name for name in _MARIAN_FILES if not (folder / name).exists()]
    if missing:
        raise TrainingError(
            f"{folder}: has no tokenizer.json (of Marian, {' and '.join(_MARIAN_FILES)} would do); where transformers "
            "can load its tokenizer, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one"
        )
    return _marian_tokenizer(folder, target_language)


def _marian_tokenizer(folder: Path, target_language: str | None) -> Tokenizer:
    """One Unigram tokenizer (Kudo 2018): the ids of ``vocab.json`` with the scores of ``source.spm``.

    A letter that only the target knows is read as itself, not as unknown. Its longer pieces are written, and never
    read: each is kept with a space at its end, which no text has after normalisation, and which the decoder takes off.
    """
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    source = sentencepiece.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at run time
    source.ParseFromString((folder / "source.spm").read_bytes())
    if source.trainer_spec.model_type != _UNIGRAM:
        raise TrainingError(f"{folder / 'source.spm'}: only SentencePiece's unigram models can be converted")
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
        raise TrainingError(f"{folder / 'vocab.json'}: its ids are not 0 to {len(pieces) - 1}")
    codes = [piece for piece in pieces if piece.startswith(">>") and piece.endswith("<<")]
    control = ["</s>", "<unk>", "<pad>", *codes]
    for name in control[:3]:
        if name not in vocabulary:
            raise TrainingError(f"{folder / 'vocab.json'}: has no {name}")
    scores = {piece.piece: piece.score for piece in source.pieces if piece.type == _NORMAL}
    lowest = min(scores.values())

    def entry(piece: str) -> tuple[str, float]:
        if piece in scores:
            return piece, scores[piece]
        if piece in control or len(piece) == 1:
            return piece, lowest - _LAST_RESORT
        return f"{piece} ", lowest

    tokenizer = Tokenizer(models.Unigram([entry(piece) for piece in pieces], unk_id=vocabulary["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *_charsmap(source.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(" ", ""), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    start = _language_code(folder, codes, target_language)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A </s>".strip(), special_tokens=[(token, vocabulary[token]) for token in control]
    )
    return tokenizer


def _charsmap(compiled: bytes) -> list[normalizers.Normalizer]:
    return [normalizers.Precompiled(compiled)] if compiled else []


def _language_code(folder: Path, codes: list[str], target: str | None) -> str:
    """What a text begins with for a model that writes several languages."""
    wanted = f">>{target}<<"
    if codes and wanted not in codes:
        known = ", ".join(code.strip("<>") for code in codes)
        raise TrainingError(f"{folder}: give --target-language, one of {known}; it begins every text")
    return wanted if codes else ""
