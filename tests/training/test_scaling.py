"""A power law is found again from exact points; too few or too like points give a reason instead."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.test_report import stage
from training.scaling import Scaling, fit_scaling

DATA = ("sentiment/days",)
POINTS = [(1e5, 1e6), (1e5, 4e6), (3e5, 1e6), (2e6, 3e6), (5e6, 2e7)]


def stages(loss, points=POINTS, **changes):
    return [
        stage(f"run-{n}", parameters=int(parameters), tokens=int(tokens), loss=loss(parameters, tokens), **changes)
        for n, (parameters, tokens) in enumerate(points)
    ]


@given(a=st.floats(0.0, 0.5), b=st.floats(0.0, 0.5), factor=st.floats(0.5, 50.0))
def test_a_power_law_is_found_again(a, b, factor):
    found = fit_scaling(stages(lambda n, d: factor * n**-a * d**-b), DATA)
    assert isinstance(found, Scaling)
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-6)
    assert found.loss(1e6, 1e7) == pytest.approx(factor * 1e6**-a * 1e7**-b, rel=1e-4)
    assert found.error == pytest.approx(0, abs=1e-6) and found.stages == len(POINTS)


def test_noise_is_told():
    noisy = stages(lambda n, d: n**-0.1 * d**-0.2 * math.exp(0.1 * (-1) ** int(n / 1e5)))
    found = fit_scaling(noisy, DATA)
    assert isinstance(found, Scaling) and 0.01 < found.error < 0.1


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([], "4 runs on the same data are needed, and there are 0"),
        (stages(lambda n, d: 1.0, POINTS[:3]), "there are 3"),
        (stages(lambda n, d: 1.0, data=("qa/rivers",)), "there are 0"),
        (stages(lambda n, d: None), "there are 0"),
        (stages(lambda n, d: 1.0, [POINTS[0]] * 5), "there are 1"),
        (stages(lambda n, d: 1.0, [(1e5, d * 1e6) for d in range(1, 6)]), "do not differ in both"),
        (stages(lambda n, d: 1.0, [(n * 1e5, n * 1e6) for n in range(1, 6)]), "do not differ in both"),
    ],
)
def test_what_cannot_be_fitted_says_why(known, said):
    found = fit_scaling(known, DATA)
    assert isinstance(found, str) and said in found
