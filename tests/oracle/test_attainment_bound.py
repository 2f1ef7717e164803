"""What can be attained from a part of the reward, against its limit at small KL in closed form."""

from __future__ import annotations

import math

import pytest

from ctrl_dpo import match_kl
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.procedures import parse_procedure


@pytest.fixture(scope="module")
def attainment_bound(benchmarks):
    import attainment_bound

    return attainment_bound


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_small_kl_gains_by_the_correlation_of_ranks(attainment_bound, share):
    """The gain is sqrt(2 KL Var E[U | s]); ranks of two rewards of one s correlate by arcsin."""
    found = attainment_bound.largest_attainment("single_draw", share, 1e-3)
    assert found == pytest.approx(math.sqrt(6 / math.pi * math.asin(share / 2)), abs=2e-3)


def test_the_share_that_a_small_kl_needs(attainment_bound):
    exact = 2 * math.sin(math.pi / 6 * 0.6**2)
    found = attainment_bound.share_needed("single_draw", 0.6, 1e-3)
    assert found == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("name", ["best_of_4", "worst_of_4"])
def test_attainment_is_of_the_optimum_and_is_reached_at_the_share_needed(attainment_bound, name):
    exact = optimal_policy(name, match_kl("optimal", name, 1.0)).win_rate
    bound = attainment_bound.PartialView(0.5, parse_procedure(name)).bound(1.0)
    gained = attainment_bound.largest_attainment(name, 0.5, 1.0) * (exact - 0.5)
    assert gained == pytest.approx(bound - 0.5, abs=1e-6)
    assert attainment_bound.largest_attainment(name, 1.0, 1.0) == pytest.approx(1.0, abs=1e-3)
    share = attainment_bound.share_needed(name, 0.6, 1.0)
    assert attainment_bound.largest_attainment(name, share, 1.0) == pytest.approx(0.6, abs=1e-3)
