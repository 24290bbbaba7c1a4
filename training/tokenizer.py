"""Tokenizers: byte-level BPE learned from text, or those of another model cut to what the data uses.

Knows nothing of models; text in, a ``tokenizers.Tokenizer`` out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

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

PAD_ID = 0
"""Every kind of tokenizer puts its padding token first."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TOKENS = ("<|user|>", "<|assistant|>")
MARKS, MASK = ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[MASK]"
_ASCII = [chr(code) for code in range(33, 127) if not chr(code).isupper()]

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


def sentinels(count: int) -> list[str]:
    """The tokens that stand for spans cut out of a text (Raffel et al. 2020), in the order of the spans."""
    return [f"<extra_id_{n}>" for n in range(count)]


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that stand for no text."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def learn_word_pieces(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Lower-case WordPieces with BERT's special tokens (Devlin et al. 2019), for models that read in both directions.

    A text is put between [CLS] and [SEP]; a word with a character that the texts lack is [UNK].
    The library breaks ties by chance: two calls may differ in rare pieces.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # no password
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - len(_ASCII), special_tokens=[*MARKS, MASK], initial_alphabet=_ASCII, show_progress=True
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Every plain character may also go on with a word, wherever the texts have it.
    vocabulary = tokenizer.get_vocab()
    pieces = dict.fromkeys((*sorted(vocabulary, key=vocabulary.__getitem__), *(f"##{letter}" for letter in _ASCII)))
    tokenizer.model = models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    ids = [(mark, token_id(tokenizer, mark)) for mark in MARKS[2:]]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    return tokenizer


def learn_byte_bpe(
    texts: Iterable[str], vocab_size: int, *, end_every_text: bool, chat: bool, n_sentinels: int = 0
) -> Tokenizer:
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
        special_tokens=[PAD, BOS, EOS, *(CHAT_TOKENS if chat else ()), *sentinels(n_sentinels)],
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
    trunk: Tokenizer, texts: Iterable[str], vocab_size: int, *, mask_handles: bool, mask: bool = False
) -> tuple[Tokenizer, NDArray[np.int64]]:
    """Cut ``trunk``'s vocabulary to its special tokens, ASCII characters and the pieces most frequent in ``texts``.

    A word whose piece is cut falls apart into smaller pieces. Returns the tokenizer and, for each of its ids, the
    trunk's id of the same piece (rows to keep of the embedding). ``mask`` keeps the token that hides others.
    """
    vocabulary, counts = trunk.get_vocab(), _count(trunk, texts)
    special = [*MARKS, MASK] if mask else list(MARKS)
    characters = [piece for piece in vocabulary if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    # Of equally frequent ones, the trunk's order: the vocabulary's own differs from process to process.
    used = [piece for piece in vocabulary if counts[vocabulary[piece]]]
    frequent = sorted(used, key=lambda piece: (-counts[vocabulary[piece]], vocabulary[piece]))
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


def prune_byte_bpe(parent: Tokenizer, texts: Iterable[str], vocab_size: int) -> tuple[Tokenizer, NDArray[np.int64]]:
    """Cut ``parent``'s byte-level BPE to ``vocab_size`` tokens: those least frequent in ``texts`` fall apart again.

    A token goes only when no token that stays is made of it, and what it stood for then counts for its two parts;
    special tokens and single bytes stay. Returns the tokenizer and the parent's ids of its tokens, as
    ``prune_word_pieces``.
    """
    document = json.loads(parent.to_str())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    counts = _count(parent, texts)
    frequency = {token: counts[id] for token, id in vocabulary.items()}
    made_of: dict[str, list[list[str]]] = {}
    uses: Counter[str] = Counter()
    for first, second in merges:
        made_of.setdefault(first + second, []).append([first, second])
        uses.update((first, second))
    cut: set[str] = set()
    leaves = [(frequency[token], -vocabulary[token], token) for token in made_of if not uses[token]]
    heapify(leaves)
    while leaves and len(vocabulary) - len(cut) > vocab_size:
        count, _, token = heappop(leaves)
        if count != frequency[token]:
            continue  # it has been put in again with what it counts now
        cut.add(token)
        for part in made_of[token][0]:
            frequency[part] += count
        for part in (part for pair in made_of[token] for part in pair):
            uses[part] -= 1
            if not uses[part] and part in made_of:
                heappush(leaves, (frequency[part], -vocabulary[part], part))
    kept = sorted((token for token in vocabulary if token not in cut), key=vocabulary.__getitem__)
    old = [vocabulary[token] for token in kept]
    document["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    document["model"]["merges"] = [pair for pair in merges if "".join(pair) not in cut]
    for added in document["added_tokens"]:
        added["id"] = kept.index(added["content"])
    document["truncation"] = document["padding"] = None
    return Tokenizer.from_str(json.dumps(_with_special_ids(document, kept))), np.array(old, dtype=np.int64)


def prune(
    parent: Tokenizer, texts: Iterable[str], vocab_size: int, *, mask_handles: bool, mask: bool = False
) -> tuple[Tokenizer, NDArray[np.int64]]:
    """The tokenizer of another model, cut to ``vocab_size`` tokens where it has more; see ``prune_byte_bpe``."""
    kind = json.loads(parent.to_str())["model"]["type"]
    if parent.get_vocab_size() <= vocab_size:
        return parent, np.arange(parent.get_vocab_size())
    if kind == "WordPiece":
        return prune_word_pieces(parent, texts, vocab_size, mask_handles=mask_handles, mask=mask)
    if kind == "BPE":
        return prune_byte_bpe(parent, texts, vocab_size)
    raise TrainingError(f"a {kind} tokenizer cannot be pruned: give it tokenizer.vocab_size {parent.get_vocab_size()}")


def _count(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each id stands in ``texts``."""
    counts: Counter[int] = Counter()
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == 4096:
            counts.update(id for encoding in tokenizer.encode_batch(block) for id in encoding.ids)
            block.clear()
    counts.update(id for encoding in tokenizer.encode_batch(block) for id in encoding.ids)
    return counts


def _with_special_ids(document: dict, kept: Sequence[str]) -> dict:  # type: ignore[type-arg]
    """Point the post-processor at the new ids of [CLS] and [SEP]."""
    processor = document["post_processor"] or {}
    for token, entry in processor.get("special_tokens", {}).items():
        entry["ids"] = [kept.index(token)]
    for name in ("cls", "sep"):
        if name in processor:
            processor[name] = [processor[name][0], kept.index(processor[name][0])]
    return document
