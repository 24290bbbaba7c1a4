"""Corpora on disk: what is dropped, and that every token comes back."""

import numpy as np
import pytest

from training.corpus import find_unique, keys_of, open_corpus, unique_texts, write_corpus
from training.errors import TrainingError
from training.tokenizer import learn_byte_bpe

WORDS = [f"word{n}" for n in range(200)]
LONG = " ".join(WORDS)


def near(share):
    """A text that has lost the last part of its words."""
    return " ".join(WORDS[: round(len(WORDS) * share)])


@pytest.mark.parametrize(
    ("texts", "kept", "dropped"),
    [
        (["one text", "another text", "One  TEXT "], [True, True, False], (0, 0, 1, 0)),
        ([LONG, near(0.97), LONG + " and more"], [True, False, False], (0, 0, 0, 2)),
        ([LONG, " ".join(reversed(WORDS)), near(0.3)], [True, True, True], (0, 0, 0, 0)),
        (["", " \n", "a"], [False, False, True], (2, 0, 0, 0)),
        (["!", "?"], [True, True], (0, 0, 0, 0)),
    ],
)
def test_the_first_of_what_is_alike_stays(texts, kept, dropped):
    keep, found = find_unique(np.stack([keys_of(text) for text in texts]), 0)
    assert keep.tolist() == kept
    assert (found.empty, found.evaluated, found.exact, found.near) == dropped


def test_texts_to_evaluate_on_are_not_trained_on(tmp_path):
    sets = {"a": lambda: [LONG, "first", "second"], "b": lambda: ["second", "third"]}
    kept, dropped = unique_texts(sets, ["first", near(0.98)], tmp_path)
    assert {title: list(texts()) for title, texts in kept.items()} == {"a": ["second"], "b": ["third"]}
    assert (dropped.evaluated, dropped.exact) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_comes_back_in_blocks(tmp_path):
    tokenizer = learn_byte_bpe(["some words of some texts"], 280, end_every_text=True, chat=False)
    texts = {"a": [f"text {n}" for n in range(9)], "b": ["words"]}
    corpus = write_corpus(
        {title: lambda each=each: each for title, each in texts.items()}, tokenizer, 2, tmp_path, "x"
    )
    assert corpus.rows == {"a": 9, "b": 1}
    parts = tokenizer.decode(corpus.ids.tolist(), skip_special_tokens=False).split("</s>")
    assert [part.strip() for part in parts] == [*texts["a"], "words", ""]
    first, second = corpus.starts(4)
    assert first.tolist() == list(range(0, corpus.tokens["a"] - 4, 4))
    assert second.tolist() in ([], [corpus.tokens["a"]])
    assert np.array_equal(open_corpus(tmp_path, "x").ids, corpus.ids)
    with pytest.raises(TrainingError, match="were made from other data or with another tokenizer; delete the folder"):
        open_corpus(tmp_path, "y")
