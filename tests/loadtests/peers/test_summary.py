from loadtests.peers.summary import Figure, Ratios, Spread, ratios, same_share, spread


def figure(peer: str, speed: float, agreement: float) -> Figure:
    return Figure(peer, Spread(speed, speed, speed, 1), agreement)


def test_a_spread() -> None:
    assert spread([3.0, 1.0, 8.0, 2.0]) == Spread(2.5, 1.0, 8.0, 4)


def test_the_best_peer_and_the_best_of_equal_agreement_are_told_apart() -> None:
    ours = figure("wattle", 100, 0.99)
    others = [figure("fast", 200, 0.5), figure("exact", 50, 0.988), figure("slow", 10, 1.0)]
    assert ratios(ours, others, 0.002) == Ratios(0.5, 2.0)


def test_our_own_other_variant_is_no_rival() -> None:
    assert ratios(figure("wattle", 1, 1), [figure("wattle", 5, 1)], 0) == Ratios(None, None)


def test_answers_are_compared_where_both_have_one() -> None:
    assert same_share({"0": "a", "1": "b", "2": "c"}, {"1": "b", "2": "x", "3": "y"}) == 0.5
    assert same_share({"0": "a"}, {}) is None
