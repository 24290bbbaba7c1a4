"""Tokenizers: byte-level BPE learned from text, or a trunk's WordPieces cut to those that the data uses.

Knows nothing of models; text in, a ``tokenizers.Tokenizer`` out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from training.errors import TrainingError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TOKENS = ("<|user|>", "<|assistant|>")

# Tweets as SemEval and TweetEval give them: masked, and with two characters left escaped.
_HANDLES = (
    normalizers.Replace(Regex(r"@\w+"), "@user"),
    normalizers.Replace(Regex(r"https?://\S+"), "http"),
    normalizers.Replace("\\u2019", "'"),
    normalizers.Replace("\\u002c", ","),
)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer must have. Raises ``TrainingError``."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise TrainingError(f"the tokenizer has no {token}: it belongs to another task; delete the run's folder")
    return found


def learn_byte_bpe(texts: Iterable[str], vocab_size: int, *, end_every_text: bool, chat: bool) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019): every text can be written, there is no unknown token.

    ``end_every_text`` makes the tokenizer append the end token, as an encoder's source wants it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not chat)
    # The space that a text is given in front, so that its first word is read as any other, is no part of it.
    tokenizer.decoder = (
        decoders.ByteLevel() if chat else decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *(CHAT_TOKENS if chat else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if end_every_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, token_id(tokenizer, EOS))]
        )
    return tokenizer


def prune_word_pieces(
    trunk: Tokenizer, texts: Iterable[str], vocab_size: int, *, mask_handles: bool
) -> tuple[Tokenizer, NDArray[np.int64]]:
    """Cut ``trunk``'s vocabulary to its special tokens, ASCII characters and the pieces most frequent in ``texts``.

    A word whose piece is cut falls apart into smaller pieces. Returns the tokenizer and, for each of its ids, the
    trunk's id of the same piece (rows to keep of the embedding).
    """
    vocabulary = trunk.get_vocab()
    counts: Counter[int] = Counter()
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == 4096:
            counts.update(id for encoding in trunk.encode_batch(block) for id in encoding.ids)
            block.clear()
    counts.update(id for encoding in trunk.encode_batch(block) for id in encoding.ids)

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    characters = [piece for piece in vocabulary if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    frequent = sorted((p for p in vocabulary if counts[vocabulary[p]]), key=lambda p: -counts[vocabulary[p]])
    kept = list(dict.fromkeys((*special, *sorted(characters), *frequent)))[:vocab_size]

    document = json.loads(trunk.to_str())
    document["model"]["vocab"] = {piece: index for index, piece in enumerate(kept)}
    document["truncation"] = document["padding"] = None
    document["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(_with_special_ids(document, kept)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if mask_handles:
        tokenizer.normalizer = normalizers.Sequence([*_HANDLES, tokenizer.normalizer])
    return tokenizer, np.array([vocabulary[piece] for piece in kept], dtype=np.int64)


def _with_special_ids(document: dict, kept: Sequence[str]) -> dict:  # type: ignore[type-arg]
    """Point the post-processor at the new ids of [CLS] and [SEP]."""
    processor = document["post_processor"]
    for token, entry in processor.get("special_tokens", {}).items():
        entry["ids"] = [kept.index(token)]
    for name in ("cls", "sep"):
        if name in processor:
            processor[name] = [processor[name][0], kept.index(processor[name][0])]
    return document
