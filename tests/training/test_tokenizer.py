import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from training.errors import TrainingError
from training.tokenizer import (
    BOS,
    CHAT_TOKENS,
    EOS,
    PAD,
    learn_byte_bpe,
    learn_word_pieces,
    prune,
    prune_word_pieces,
    special_ids,
    token_id,
)
from training.trunk import trunk_tokenizer

TEXTS = ["Ein kleiner Junge spielt.", "A small boy plays.", "A boy and a boy."] * 3


CHAT = learn_byte_bpe(TEXTS, 300, end_every_text=False, chat=True)
CHAT.encode_special_tokens = True  # a mark in a text is text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_bpe_writes_every_text(text):
    assert CHAT.decode(CHAT.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_byte_bpe_ends_a_source_and_knows_its_marks():
    tokenizer = learn_byte_bpe(TEXTS, 300, end_every_text=True, chat=False)
    assert [token_id(tokenizer, mark) for mark in (PAD, BOS, EOS)] == [0, 1, 2]
    ids = tokenizer.encode("A boy.").ids
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "A boy."
    with pytest.raises(TrainingError, match=r"has no <\|user\|>"):
        token_id(tokenizer, CHAT_TOKENS[0])


def test_pruning_keeps_the_frequent_and_splits_the_rest(trunk_package):
    _, folder = trunk_package
    trunk = trunk_tokenizer(folder)
    assert len(trunk.encode("a " * 30).ids) == 32, "the trunk's own truncation is off"
    # Room for the marks, the characters and two words.
    characters = sum(len(piece.removeprefix("##")) == 1 for piece in trunk.get_vocab())
    tokenizer, kept = prune_word_pieces(trunk, ["river river happy"], 4 + characters + 2, mask_handles=False)
    assert tokenizer.get_vocab_size() == len(kept) == 4 + characters + 2
    assert tokenizer.encode("river happy").tokens == ["[CLS]", "river", "happy", "[SEP]"]
    assert tokenizer.encode("sad").tokens == ["[CLS]", "s", "##a", "##d", "[SEP]"]
    assert tokenizer.encode("river", "happy").type_ids == [0, 0, 0, 1, 1]
    vocabulary = trunk.get_vocab()
    for piece, index in tokenizer.get_vocab().items():
        assert kept[index] == vocabulary[piece]
    assert kept.dtype == np.int64


def test_handles_and_addresses_are_masked(trunk_package):
    _, folder = trunk_package
    tokenizer, _ = prune_word_pieces(trunk_tokenizer(folder), ["happy"], 250, mask_handles=True)
    masked = tokenizer.encode("@someone it\\u2019s http://t.co/xyz").tokens
    assert masked == tokenizer.encode("@user it's http").tokens


BPE = learn_byte_bpe(TEXTS, 300, end_every_text=True, chat=False)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(259, 300))
def test_pruned_bpe_writes_every_text(text, words):
    pruned, kept = prune(BPE, TEXTS, words, mask_handles=False)
    assert pruned.get_vocab_size() == len(kept) == min(words, BPE.get_vocab_size())
    assert {BPE.id_to_token(old): new for new, old in enumerate(kept.tolist())} == pruned.get_vocab()
    ids = pruned.encode(text).ids
    assert ids[-1] == token_id(pruned, EOS) == 2
    plain = BPE.decode(BPE.encode(text).ids)
    assert pruned.decode(ids) == plain


def test_pruned_bpe_keeps_what_is_frequent_and_splits_the_rest_into_its_parts():
    parent = learn_byte_bpe(["low lower lowest"] * 9 + ["new newer newest"] * 9, 300, end_every_text=True, chat=False)
    pruned, _ = prune(parent, ["low lower"] * 5, 267, mask_handles=False)
    for word in ("low", "lower"):
        assert pruned.encode(word).tokens == parent.encode(word).tokens
    assert len(pruned.encode("newest").ids) > len(parent.encode("newest").ids)
    # Every merge that is left makes a token that is left, of two that are left.
    model = json.loads(pruned.to_str())["model"]
    assert all({*pair, "".join(pair)} <= model["vocab"].keys() for pair in model["merges"])


def test_what_is_small_enough_stays_and_what_cannot_be_pruned_is_said(trunk_package):
    assert prune(BPE, [], 300, mask_handles=False)[0] is BPE
    trunk = trunk_tokenizer(trunk_package[1])
    assert prune(trunk, ["river"], 100, mask_handles=False)[0].get_vocab_size() == 100
    with pytest.raises(TrainingError, match="a Unigram tokenizer cannot be pruned"):
        prune(tiny_tokenizer(), [], 20, mask_handles=False)


def test_word_pieces_are_learned_and_any_plain_word_can_be_read():
    tokenizer = learn_word_pieces(["The river rises", "the rain"] * 9, 200)
    assert tokenizer.get_vocab_size() <= 200
    assert tokenizer.encode("The river").tokens == ["[CLS]", "the", "river", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("Q&A, 7xyz?").ids) == "q & a, 7xyz?"
    assert special_ids(tokenizer) == {0, 1, 2, 3, 4}
