"""What methods can gain that see a part of the reward, against theory and quadrature."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from ctrl_dpo import match_kl
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.procedures import parse_procedure


@pytest.fixture(scope="module")
def partial_fit(benchmarks):
    import partial_fit

    return partial_fit


@pytest.mark.parametrize("name", ["best_of_4", "worst_of_4"])
def test_who_sees_all_of_the_reward_reaches_the_frontier(partial_fit, name):
    exact = optimal_policy(name, match_kl("optimal", name, 1.0)).win_rate
    view = partial_fit.PartialView(1.0, parse_procedure(name))
    assert view.bound(1.0) == pytest.approx(exact, abs=2e-4)
    fits = partial_fit.population_fits("optimal", view, partial_fit.EVERYTHING)
    assert exact - 0.003 < view.best(fits, 1.0)


@pytest.mark.parametrize(("name", "kl"), [("best_of_4", 2.0), ("worst_of_4", 2.0)])
def test_the_bound_does_not_depend_on_where_the_search_starts(partial_fit, name, kl):
    view = partial_fit.PartialView(0.5, parse_procedure(name))
    starts = [partial_fit.GRID, np.abs(partial_fit.GRID), np.sin(3 * partial_fit.GRID)]
    found = [view.bound(kl, start) for start in starts]
    assert max(found) - min(found) < 1e-5
    assert found[0] > view.best(partial_fit.population_fits("rebel", view), kl)


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
    fits = partial_fit.population_fits("rebel", view, partial_fit.EVERYTHING)
    found = view.best(fits, kl)
    assert found == pytest.approx(exact, abs=1e-4)
    assert found < view.bound(kl) < 1


def drawn_extremes(share: float, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw features and rewards of the two worst and two best of 16, ordered by reward."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(prompts, 16))
    z = np.sqrt(share) * s + np.sqrt(1 - share) * rng.normal(size=s.shape)
    order = z.argsort(axis=1)[:, [0, 1, 14, 15]]
    return np.take_along_axis(s, order, axis=1), np.take_along_axis(z, order, axis=1)


def assert_fit(partial_fit, method: str, weights: np.ndarray) -> None:
    """Compare a method's fit to extremes with a polynomial of s, up to a constant."""
    view = partial_fit.PartialView(0.4, parse_procedure("worst_of_4"))
    (fit,) = partial_fit.population_fits(method, view)
    inside = np.abs(partial_fit.GRID) < 2.5
    drawn = sum(w * partial_fit.GRID[inside] ** k for k, w in enumerate(weights, 1))
    gap = (fit[inside] - fit[inside].mean()) - (drawn - drawn.mean())
    assert np.abs(gap).max() < 0.05 * np.ptp(drawn)


def test_a_fit_to_extremes_is_that_of_drawn_groups(partial_fit):
    """The centred regression on polynomials of s, on 100,000 groups, against the joint laws."""
    s, z = drawn_extremes(0.4, 100_000)
    powers = np.stack([s**k for k in range(1, 8)], axis=-1)
    powers -= powers.mean(axis=1, keepdims=True)
    errors = z - z.mean(axis=1, keepdims=True)
    weights = np.linalg.lstsq(powers.reshape(-1, 7), errors.ravel(), rcond=None)[0]
    assert_fit(partial_fit, "rebel", weights)


def test_dpo_tends_to_the_odds_of_drawn_pairs(partial_fit):
    """Logistic regression of best against worst on polynomials of s, by scipy, on drawn groups."""
    s, _ = drawn_extremes(0.4, 50_000)
    differences = np.stack([s[:, 3] ** k - s[:, 0] ** k for k in range(1, 6)], axis=-1)
    scale = differences.std(axis=0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = differences / scale @ w
        slope = -special.expit(-margin)
        return np.logaddexp(0, -margin).mean(), (differences / scale).T @ slope / len(margin)

    weights = optimize.minimize(loss, np.zeros(5), jac=True, method="BFGS").x / scale
    assert_fit(partial_fit, "dpo", weights)
