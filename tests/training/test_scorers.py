import pytest

from training import scorers


def test_macro_recall_weighs_labels_alike():
    # 3 of 4 a's and 1 of 2 b's: (75 + 50) / 2.
    assert scorers.macro_recall(list("aaabba"), list("aaaabb")) == pytest.approx((75 + 50) / 2)


def test_accuracy():
    assert scorers.accuracy(["x", "y", "x", "x"], ["x", "x", "x", "y"]) == 50


def test_auc_is_the_share_of_pairs_in_order():
    # Of six pairs four are in order and one is a tie.
    assert scorers.auc([0.9, 0.4, 0.2], [0.4, 0.1]) == pytest.approx(100 * 4.5 / 6)
    assert scorers.auc([0.1], [0.2]) == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("tower in Paris", ["Eiffel Tower", "the tower"], 0, 0.5),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
    ],
)
def test_squad(prediction, answers, exact, f1):
    assert scorers.exact_match(prediction, answers) == exact
    assert scorers.token_f1(prediction, answers) == pytest.approx(f1)
    assert scorers.squad([prediction], [answers]) == {"EM": 100 * exact, "F1": pytest.approx(100 * f1)}


def test_bleu_and_rouge_are_the_known_packages():
    text = ["The quick brown fox jumps over the lazy dog."]
    assert scorers.bleu(text, text) == pytest.approx(100)
    assert scorers.bleu(["Something else entirely happened here today."], text) < 5
    assert scorers.rouge(text, [["No word of it", text[0]]]) == {
        "ROUGE-1": pytest.approx(100),
        "ROUGE-2": pytest.approx(100),
        "ROUGE-L": pytest.approx(100),
    }
    # Two of two words found among four: precision 1, recall 1/2.
    assert scorers.rouge(["a b"], [["a b c d"]])["ROUGE-1"] == pytest.approx(200 / 3)


def test_chinese_is_compared_character_by_character():
    said, meant = (
        ["\u6211\u559c\u6b22\u5403\u82f9\u679c\u548c\u68a8\u3002"],
        ["\u6211\u559c\u6b22\u5403\u82f9\u679c\u548c\u6843\u3002"],
    )
    assert scorers.bleu(said, meant) == 0  # one word, and another one
    # 8 of 9 characters, 6 of 8 pairs, 5 of 7 triples, 4 of 6 runs of four.
    wanted = 100 * (8 / 9 * 6 / 8 * 5 / 7 * 4 / 6) ** 0.25
    assert scorers.bleu(said, meant, "zh") == scorers.bleu(said, meant, "zh-Hant") == pytest.approx(wanted)


def test_bits_per_byte_counts_bytes_not_letters():
    assert scorers.bits_per_byte(4 * 0.6931471805599453, "\u00e4\u00f6") == pytest.approx(1.0)
