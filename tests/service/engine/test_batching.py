"""Which sequences are computed together."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.batching import fair_share, form_batch, padded_width


def test_widths_are_whole_fours() -> None:
    assert [padded_width(length) for length in (1, 4, 5, 17)] == [4, 4, 8, 20]


def test_neighbours_in_length_join_and_outliers_wait() -> None:
    assert form_batch([20, 90, 21, 300, 19, 20, 88], most=8, max_tokens=2048) == [0, 2, 4, 5]
    assert form_batch([90, 21, 300, 19, 20, 88], most=8, max_tokens=2048) == [0, 5]


def test_short_sequences_join_sooner_than_a_step_of_their_own_would_pay() -> None:
    assert form_batch([3, 7, 5, 9], most=8, max_tokens=2048) == [0, 1, 2, 3]


def test_equals_join_in_the_order_of_their_arrival() -> None:
    assert form_batch([50] * 6, most=4, max_tokens=2048) == [0, 1, 2, 3]


def test_the_budget_counts_padding() -> None:
    # 30 tokens make rows of 32: three of them are 96.
    assert form_batch([30, 30, 30, 30], most=8, max_tokens=96) == [0, 1, 2]
    assert form_batch([30, 30, 30, 30], most=8, max_tokens=95) == [0, 1]


def test_one_over_the_budget_goes_alone() -> None:
    assert form_batch([500, 500], most=8, max_tokens=100) == [0]


def test_a_share_is_met_as_nearly_as_whole_texts_do() -> None:
    lengths = [11, 5, 21, 14, 15, 35, 7, 26]
    # With the one of 21 they are 73 tokens, without it 52.
    assert form_batch(lengths, most=8, max_tokens=512, padding_share=1.0, share_tokens=67) == [0, 1, 2, 3, 4, 6]
    assert form_batch(lengths, most=8, max_tokens=512, padding_share=1.0, share_tokens=62) == [0, 1, 3, 4, 6]
    assert form_batch([35, 5], most=8, max_tokens=512, padding_share=1.0, share_tokens=20) == [0]


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    most=st.integers(1, 40),
    max_tokens=st.integers(1, 4000),
)
def test_a_batch_holds_the_first_and_keeps_all_limits(lengths: list[int], most: int, max_tokens: int) -> None:
    batch = form_batch(lengths, most, max_tokens)
    assert batch[0] == 0 and batch == sorted(set(batch))
    assert len(batch) <= most
    chosen = [lengths[place] for place in batch]
    assert len(batch) == 1 or padded_width(max(chosen)) * len(chosen) <= max_tokens
    assert max(chosen) * len(chosen) - sum(chosen) <= 0.15 * sum(chosen) + 4 * len(chosen)
    # Nobody between the shortest and the longest is passed over, but for an equal of one of them.
    left = [length for place, length in enumerate(lengths) if place not in batch]
    assert not any(min(chosen) < length < max(chosen) for length in left)


def test_executors_share_what_waits() -> None:
    assert fair_share(waiting=8, running_here=0, running=0, executors=2) == 4
    assert fair_share(waiting=4, running_here=0, running=4, executors=2) == 4
    assert fair_share(waiting=1, running_here=3, running=4, executors=2) == 0
    assert fair_share(waiting=1, running_here=1, running=4, executors=2) == 2
    assert fair_share(waiting=5, running_here=9, running=9, executors=1) == 5


@given(waiting=st.integers(1, 50), running=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_somebody_may_always_take_what_waits(waiting: int, running: list[int]) -> None:
    shares = [fair_share(waiting, here, sum(running), len(running)) for here in running]
    assert sum(shares) >= waiting
    assert max(shares) >= 1
