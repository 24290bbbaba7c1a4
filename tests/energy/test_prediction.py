"""Predictions against bills that follow a known law."""

import random

import pytest

from energy.attribution import DEFAULTS
from energy.carbon import Carbon
from energy.prediction import Followed, Forecast, Predictor, Text, Written
from energy.types import Bill, Bills, Quality, RequestRecord, SettledRecord

READ_UJ, WRITE_UJ = 3, 7
"""What a unit of work costs here."""
CARBON = Carbon("DEU")


def cost_uj(texts: list[Text], lengths: list[int]) -> int:
    """The affine cost: a fixed part for reading and for every step of writing, and a part per token."""
    read = DEFAULTS.fixed + DEFAULTS.prefill_token * sum(text.input_tokens for text in texts)
    write = DEFAULTS.fixed * max(lengths)
    for text, length in zip(texts, lengths, strict=True):
        write += DEFAULTS.decode_token * length * text.beams
        write += DEFAULTS.context_token * text.beams * (length * text.input_tokens + length * length // 2)
    return READ_UJ * read + WRITE_UJ * write


def record(
    request_id: str, allocated_uj: int | None, tokens: tuple[int, int] = (1, 1), **fields: str
) -> SettledRecord:
    request = RequestRecord(request_id, "translate", "tiny", "ok", *tokens)
    known = allocated_uj is not None
    bill = Bill(
        request_id,
        allocated_uj // 2 if known else None,
        allocated_uj,
        CARBON.gco2e(allocated_uj, 0) if known else None,
        Quality.ESTIMATED if known else Quality.UNAVAILABLE,
        settled=True,
    )
    return SettledRecord(request._replace(**fields), bill, 1_700_000_000.0, CARBON.assumptions)


def run(
    predictor: Predictor, number: int, texts: list[Text], lengths: list[int], factor: float = 1.0
) -> tuple[Forecast | None, float | None]:
    """One request from its prediction to its bill."""
    request_id = f"req-{number}"
    followed = predictor.begin(request_id, "translate", "tiny", lambda: texts)
    assert followed is not None
    followed.written = [Written(length, ended=True) for length in lengths]
    compared = predictor.settled([Bills.of(record(request_id, round(cost_uj(texts, lengths) * factor)))])
    return followed.forecast, compared[0][1] if compared else None


def test_nothing_is_predicted_before_there_is_a_bill() -> None:
    predictor = Predictor()
    assert predictor.predict("translate", "tiny", [Text(9, 64)]) is None
    forecast, error = run(predictor, 0, [Text(9, 64)], [9])
    assert (forecast, error) == (None, None)
    assert predictor.predict("translate", "another", [Text(9, 64)]) is None


def test_the_first_bill_predicts_its_like() -> None:
    predictor = Predictor()
    run(predictor, 0, [Text(9, 64)], [12])
    forecast = predictor.predict("translate", "tiny", [Text(9, 64)])
    assert forecast is not None
    assert forecast.output_tokens == 12
    assert forecast.allocated_uj == pytest.approx(cost_uj([Text(9)], [12]), rel=1e-6)
    assert forecast.active_uj == pytest.approx(forecast.allocated_uj / 2, rel=1e-4)
    assert forecast.gco2e == pytest.approx(CARBON.gco2e(forecast.allocated_uj, 0), rel=1e-4)
    assert (forecast.interval_uj, forecast.relative_error, forecast.compared) == (None, None, 0)


def test_what_reading_and_writing_cost_is_told_apart() -> None:
    chance = random.Random(1)
    predictor = Predictor()
    for number in range(100):
        tokens = chance.randint(5, 100)
        run(predictor, number, [Text(tokens, 200)], [2 * tokens + chance.randint(-4, 4)])
    # Lists, beams and short limits were never seen: they follow from the law of the cost.
    for texts, lengths in (
        ([Text(40, 200)], [80]),
        ([Text(40, 5)], [5]),
        ([Text(40, 200, beams=4)], [80]),
        ([Text(10, 200)] * 8, [20] * 8),
    ):
        forecast = predictor.predict("translate", "tiny", texts)
        assert forecast is not None
        assert forecast.output_tokens == pytest.approx(sum(lengths), rel=0.05)
        assert forecast.allocated_uj == pytest.approx(cost_uj(texts, lengths), rel=0.06)


def test_the_error_and_the_interval_are_those_of_the_past() -> None:
    chance = random.Random(2)
    predictor = Predictor()
    errors = []
    inside = 0
    for number in range(400):
        texts = [Text(chance.randint(5, 100))]
        factor = chance.uniform(0.8, 1.2)
        forecast, error = run(predictor, number, texts, [0], factor)
        if number >= 200:
            assert forecast is not None and forecast.interval_uj is not None and error is not None
            low_uj, high_uj = forecast.interval_uj
            inside += low_uj <= cost_uj(texts, [0]) * factor <= high_uj
            errors.append(error)
    forecast = predictor.predict("translate", "tiny", [Text(50)])
    assert forecast is not None
    assert forecast.compared == 200
    assert forecast.relative_error == pytest.approx(sorted(errors)[100], rel=0.02)
    assert 0.7 < inside / 200 < 0.9


def test_a_change_of_load_is_followed() -> None:
    predictor = Predictor()
    for number in range(300):
        run(predictor, number, [Text(10 + number % 7)], [0])
    for number in range(300, 700):
        run(predictor, number, [Text(10 + number % 7)], [0], factor=0.25)
    forecast = predictor.predict("translate", "tiny", [Text(12)])
    assert forecast is not None
    assert forecast.allocated_uj == pytest.approx(cost_uj([Text(12)], [0]) / 4, rel=0.06)


def test_a_text_cut_at_its_limit_does_not_teach_that_texts_are_short() -> None:
    predictor = Predictor()
    for number in range(20):
        run(predictor, number, [Text(20, 100)], [40])
    for number in range(20, 60):
        request_id = f"req-{number}"
        followed = predictor.begin(request_id, "translate", "tiny", lambda: [Text(20, 5)])
        assert followed is not None
        followed.written = [Written(5, ended=False)]
        predictor.settled([Bills.of(record(request_id, cost_uj([Text(20)], [5])))])
    forecast = predictor.predict("translate", "tiny", [Text(20, 100)])
    assert forecast is not None and forecast.output_tokens == 40


def test_of_many_at_once_some_are_followed_and_of_the_others_nothing_is_asked() -> None:
    predictor = Predictor()
    asked: list[str] = []

    def begin(number: int) -> Followed | None:
        def texts() -> list[Text]:
            asked.append(f"req-{number}")
            return [Text(9)]

        return predictor.begin(f"req-{number}", "translate", "tiny", texts)

    followed = [begin(number) is not None for number in range(20)]
    some = sum(followed)
    assert 0 < some < 20 and followed == [True] * some + [False] * (20 - some)
    predictor.settled([Bills.of(record("req-1", 500))])
    assert [begin(number) is not None for number in (20, 21)] == [True, False]
    assert asked == [*(f"req-{number}" for number in range(some)), "req-20"]


@pytest.mark.parametrize("how", ["refused", "failed", "unknown"])
def test_what_was_not_computed_or_not_billed_teaches_nothing(how: str) -> None:
    predictor = Predictor()
    if how != "refused":
        followed = predictor.begin("req-0", "translate", "tiny", lambda: [Text(9)])
        assert followed is not None
        if how == "unknown":
            followed.written = [Written(0, ended=True)]
    assert predictor.settled([Bills.of(record("req-0", None if how == "unknown" else 500))]) == []
    assert predictor.predict("translate", "tiny", [Text(9)]) is None


def test_an_earlier_process_taught_the_cost_but_counts_as_no_comparison() -> None:
    predictor = Predictor()
    past = [record(f"req-{n}", cost_uj([Text(n)], [n]), (n, n)) for n in range(5, 40)]
    odd = [record("req-x", None), record("req-y", 10**9, status="failed"), record("req-z", 10**9, (0, 0))]
    predictor.learn_past(past + odd)
    forecast = predictor.predict("translate", "tiny", [Text(30, 100)])
    assert forecast is not None
    assert forecast.allocated_uj == pytest.approx(cost_uj([Text(30)], [30]), rel=0.02)
    assert forecast.compared == 0


def test_no_prediction_is_negative() -> None:
    chance = random.Random(3)
    predictor = Predictor()
    for number in range(50):
        # Bills that have nothing to do with the work.
        run(predictor, number, [Text(chance.randint(1, 500), 100)], [chance.randint(0, 100)], 1 / (1 + number))
    for tokens in (1, 10, 500):
        forecast = predictor.predict("translate", "tiny", [Text(tokens, 1)])
        assert forecast is not None and forecast.active_uj >= 0 and forecast.allocated_uj >= forecast.active_uj
