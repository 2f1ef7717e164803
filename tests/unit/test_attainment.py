"""Attainment where the optimum all but always wins, and the bound that says where that is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrl_dpo.measures.attainment import attainment, attainment_interval, optimal_points
from ctrl_dpo.measures.estimates import bootstrap_interval, mean_over_prompts
from ctrl_dpo.measures.planning import frontier_rows
from ctrl_dpo.theory.policies import frontier
from ctrl_dpo.theory.procedures import parse_procedure


@pytest.mark.parametrize(
    ("procedure", "against"),
    [
        ("single_draw", None),
        ("best_of_4", None),
        ("worst_of_4", None),
        ("2nd_best_of_4", None),
        ("worst_of_4", "best_of_16"),
        ("best_of_4", "single_draw"),
    ],
)
def test_the_optimum_loses_to_n_draws_less_than_n_exp_of_minus_the_kl(procedure, against):
    n = parse_procedure(against or procedure).n_draws
    exact = frontier(procedure, ["optimal"], [4.0, 7.0], against)
    for point in exact:
        assert -1e-15 <= 1 - point.win_rate <= n * math.exp(-point.kl)
    assert optimal_points(procedure, [4.0, 7.0], against) == exact


def test_where_it_is_no_longer_solved_it_is_right_to_nine_digits():
    (exact,) = frontier("single_draw", ["optimal"], [20.1])
    (point,) = optimal_points("single_draw", [20.1])
    assert (point.kl, point.win_rate) == (20.1, 1.0)
    assert 0 < point.win_rate - exact.win_rate < 2.1e-9
    assert attainment(0.9, 20.1, "single_draw") == pytest.approx(0.8, abs=1e-12)
    # one nat less is solved: 4 draws need log(4) = 1.39 more
    (below,) = optimal_points("best_of_4", [21.3])
    assert 0 < 1 - below.win_rate < 2.1e-9


@pytest.mark.parametrize("kl", [60.0, 300.0, 2e4, 1e9])
@pytest.mark.parametrize("procedure", ["best_of_4", "worst_of_16"])
def test_a_policy_far_from_the_reference_attains_what_it_wins(rng, kl, procedure):
    """With W* = 1 attainment is 2 W - 1, and its interval that of W."""
    wins = 0.7 + 0.2 * rng.random(12)
    spread = 1 + 0.1 * rng.random(12)
    made = mean_over_prompts(wins), mean_over_prompts(kl * spread)
    found = attainment_interval(*made, procedure)

    def gained(wins, kls, axis):
        return 2 * wins.mean(axis=axis) - 1

    low, high = bootstrap_interval((wins, kl * spread), gained, 0.95, 0)
    assert found["value"] == pytest.approx(2 * wins.mean() - 1, abs=1e-8)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-3)


def test_the_curves_of_a_large_kl_end_at_certainty():
    kls = [0.5, 30.0, 300.0]
    rows = [row for row in frontier_rows(["best_of_4"], kls) if row["transformation"] == "optimal"]
    assert [row["kl"] for row in rows] == kls
    assert [row["win_rate"] for row in rows[1:]] == [1.0, 1.0]
    assert np.isnan([row["beta"] for row in rows[1:]]).all()
    (exact,) = frontier("best_of_4", ["optimal"], kls[:1])
    assert (rows[0]["beta"], rows[0]["win_rate"]) == (exact.beta, exact.win_rate)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_kl_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="kls must be finite and > 0"):
        optimal_points("best_of_4", [1.0, bad])
