"""What is kept of outputs is bounded, and what was used last stays."""

from service.engine.reuse import Reuse
from service.engine.types import ExtractItem, Sampling, Timing, WriteItem, WriteOutput


def item(number: int) -> WriteItem:
    return WriteItem(f"request-{number}", (number,) * 100, Sampling(max_tokens=9))


OUTPUT = WriteOutput((7, 8), "stop", Timing(5, 6))


def test_the_least_recently_used_is_forgotten() -> None:
    reuse = Reuse(3000)
    for number in range(2):
        reuse.keep("m", item(number), OUTPUT)
    assert reuse.find("m", item(0)) == WriteOutput((7, 8), "stop", Timing(0, 0))
    reuse.keep("m", item(2), OUTPUT)
    assert [reuse.find("m", item(number)) is not None for number in range(3)] == [True, False, True]


def test_an_output_that_is_too_large_is_not_kept() -> None:
    reuse = Reuse(600)
    reuse.keep("m", item(0), OUTPUT)
    assert reuse.find("m", item(0)) is None


def test_models_and_kinds_of_items_are_told_apart() -> None:
    reuse = Reuse(100_000)
    reuse.keep("m", item(0), OUTPUT)
    assert reuse.find("other", item(0)) is None
    assert reuse.find("m", ExtractItem("r", item(0).input_ids)) is None
