import pytest

from loadtests.peers.agreement import Agreement, of_texts, of_vectors


def test_a_text_counts_up_to_its_first_difference() -> None:
    assert of_texts([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == Agreement(mean=0.75, least=0.5)


def test_a_text_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 tokens and not 4"):
        of_texts([[1, 2, 3]], [[1, 2, 3, 4]])


def test_a_missing_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        of_texts([[1]], [[1], [2]])


def test_vectors_are_compared_by_direction() -> None:
    found = of_vectors([[2.0, 0.0], [1.0, 1.0]], [[4.0, 0.0], [1.0, 0.0]])
    assert found.mean == pytest.approx((1 + 0.5**0.5) / 2)
    assert found.least == pytest.approx(0.5**0.5)
