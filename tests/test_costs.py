"""What a draft gains by costs, against computations by hand."""

import pytest

from costs import (
    break_even_acceptance,
    break_even_cost,
    predicted_speedup,
    predicted_speedups,
    recommend,
)


def test_cost_model_by_hand():
    assert predicted_speedup(3.0, 5, 0.1, 1.4, 0.1) == pytest.approx(1.5)
    assert predicted_speedup(1.0, 0, 0.3, 1.0) == 1  # no drafts: the target alone
    assert recommend({1: 1.2, 2: 1.5, 3: 1.5, 4: 0.9}) == 2
    c = break_even_cost(3.1, 5, 1.2, 0.3)
    assert c == pytest.approx((3.1 - 1.5) / 5)
    assert predicted_speedup(3.1, 5, c, 1.2, 0.3) == pytest.approx(1)


def test_speed_ups_of_a_row():
    row = {"tau_by_gamma": {"1": 1.8, "2": 2.4}, "cost_ratio": 0.25}
    row["scoring_ratio"] = {"1": 1.0, "2": 1.1}
    assert predicted_speedups(row) == pytest.approx({1: 1.8 / 1.25, 2: 2.4 / 1.6})
    assert predicted_speedups(row | {"cost_ratio": None}) == {}
    assert predicted_speedups({"cost_ratio": 0.25}) == {}


def test_break_even_acceptance():
    """gamma 1: 1 + a = c + v. gamma 2: 1 + a + a^2 = 2 c + v, first where v hardly rises."""
    assert break_even_acceptance(0.25, {1: 1.05}) == pytest.approx(0.3)
    assert break_even_acceptance(0.25, {"1": 1.5, "2": 1.06}) == pytest.approx(
        (-1 + (1 + 4 * 0.56) ** 0.5) / 2
    )
    assert break_even_acceptance(0.4, {1: 0.5, 2: 0.9}) == pytest.approx(0, abs=1e-9)
    assert break_even_acceptance(1.2, {gamma: 1.0 + gamma / 10 for gamma in range(1, 11)}) is None
    assert break_even_acceptance(1.0, {1: 1.0}) == pytest.approx(1), "always accepted, just"
