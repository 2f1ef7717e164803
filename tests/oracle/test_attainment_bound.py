"""What can be attained from a part of the reward, against its limit at small KL in closed form."""

from __future__ import annotations

import math

import pytest


@pytest.fixture(scope="module")
def attainment_bound(benchmarks):
    import attainment_bound

    return attainment_bound


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_small_kl_gains_by_the_correlation_of_ranks(attainment_bound, share):
    """The gain is sqrt(2 KL Var E[U | s]), and two ranks correlate by (6/pi) arcsin(r2 / 2)."""
    found = attainment_bound.attainment("single_draw", share, 1e-3)
    assert found == pytest.approx(math.sqrt(6 / math.pi * math.asin(share / 2)), abs=2e-3)


def test_the_share_that_an_attainment_needs(attainment_bound):
    exact = 2 * math.sin(math.pi / 6 * 0.6**2)
    found = attainment_bound.share_needed("single_draw", 0.6, 1e-3)
    assert found == pytest.approx(exact, abs=2e-3)
    assert attainment_bound.attainment("worst_of_4", 0.2, 2.0) > attainment_bound.attainment(
        "worst_of_4", 0.2, 1.0
    )
