"""What methods can gain that see a part of the reward, against theory and quadrature."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scipy import integrate, stats

import ctrl_dpo
from ctrl_dpo import match_kl
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.procedures import parse_procedure

BENCHMARKS = str(Path(ctrl_dpo.__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def partial_fit():
    sys.path.insert(0, BENCHMARKS)
    import partial_fit

    yield partial_fit
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("name", ["best_of_4", "worst_of_4"])
def test_who_sees_all_of_the_reward_reaches_the_frontier(partial_fit, name):
    exact = optimal_policy(name, match_kl("optimal", name, 1.0)).win_rate
    row = partial_fit.rates(name, 1.0, 1.0)
    assert row["bound"] == pytest.approx(exact, abs=2e-4)
    assert row["optimal"] == pytest.approx(exact, abs=2e-4)
    for method in ("dpo", "qrpo_log", "rebel", "identity"):
        assert row[method] < exact - 0.005


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_raw_differences_shift_a_normal_reward(partial_fit, share):
    """Raw rewards tilt s to N(sqrt(2 KL), 1), so z is N(sqrt(2 KL r2), 1): one integral is left."""
    kl = 0.6
    shift = (2 * kl * share) ** 0.5

    def density(z: float) -> float:
        mine = 4 * stats.norm.cdf(z - shift) ** 3 * stats.norm.pdf(z - shift)
        return mine * stats.norm.cdf(z) ** 4

    exact = integrate.quad(density, -10, 12)[0]
    view = partial_fit.PartialView(share, parse_procedure("best_of_4"))
    found = view.best(partial_fit.population_fits("rebel", view), kl)
    assert found == pytest.approx(exact, abs=1e-4)
    assert found < view.bound(kl) < 1
