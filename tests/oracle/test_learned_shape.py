"""Shape of learned log-ratios: closed forms, and drawn groups against the sums of the model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ctrl_dpo.theory.procedures import parse_procedure


@pytest.fixture(scope="module")
def learned_shape(benchmarks):
    import learned_shape

    return learned_shape


def test_polynomials_are_orthonormal_and_rise_with_the_reward(learned_shape):
    bases = learned_shape.polynomials(np.arange(1.0, 17))
    np.testing.assert_allclose(bases @ bases.T / 16, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(bases.sum(axis=1), 0, atol=1e-12)
    assert np.all(np.diff(bases[0]) > 0)
    # a normal variable's own, (z^2 - 1) / sqrt 2 and (z^3 - 3z) / sqrt 6, as draws become many
    many = learned_shape.polynomials(np.arange(1.0, 200_001))
    z = stats.norm.ppf((np.arange(1, 200_001) - 0.5) / 200_000)
    hermite = np.stack((z, (z**2 - 1) / np.sqrt(2), (z**3 - 3 * z) / np.sqrt(6)))
    np.testing.assert_allclose(np.square(many - hermite).mean(axis=1), 0, atol=1e-3)


def test_a_policy_that_is_a_polynomial_of_the_ranks_is_read_off(learned_shape):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(8, 16))
    one, two, three = learned_shape.polynomials(stats.rankdata(rewards, axis=1))
    found = learned_shape.measured(1.5 * one - 0.3 * two + 0.6 * three + 7.0, rewards)
    assert found["bend"] == pytest.approx(-0.2)
    assert found["flattening"] == pytest.approx(0.4)
    assert found["share"] == pytest.approx(2.25 / (2.25 + 0.09 + 0.36), abs=1e-4)
    assert found["share_low"] == found["share_high"] == found["share"]
    for name in learned_shape.NUMBERS:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


@pytest.mark.parametrize(
    ("method", "procedure"),
    [("optimal", "best_of_4"), ("rebel", "worst_of_4"), ("dpo", "best_of_4")],
)
def test_what_is_read_off_draws_is_what_the_model_sums(learned_shape, method, procedure):
    seen, draws, rng = 0.4, 16, np.random.default_rng(1)
    from partial_fit import GRID, KL, PartialView, population_fits

    view = PartialView(seen, parse_procedure(procedure))
    fit = view.best_fit(population_fits(method, view), KL)
    feature = rng.normal(size=(3000, draws))
    rewards = np.sqrt(seen) * feature + np.sqrt(1 - seen) * rng.normal(size=feature.shape)
    found = learned_shape.measured(np.interp(feature, GRID, fit), rewards)
    model = learned_shape.modelled(method, procedure, seen, draws)
    # within-prompt centring takes 1 / 16 of the variance: moments of the model are of all draws
    for name in ("bend", "flattening"):
        width = found[f"{name}_high"] - found[f"{name}_low"]
        assert abs(found[name] - model[name]) < width, name
    assert found["share"] * (draws - 1) / draws == pytest.approx(model["share"], rel=0.02)
    assert found["skewness"] == pytest.approx(model["skewness"], abs=0.05)
    assert found["kurtosis"] == pytest.approx(model["kurtosis"], rel=0.15)


@pytest.mark.parametrize("procedure", ["best_of_4", "worst_of_4"])
def test_a_straight_line_is_a_shift_of_a_normal_reward(learned_shape, procedure):
    found = learned_shape.modelled(learned_shape.STRAIGHT, procedure, 0.35, 16)
    assert (found["bend"], found["skewness"], found["kurtosis"]) == pytest.approx((0, 0, 3))
    # a nat shifts the feature by sqrt 2, the reward by sqrt(2 r2)
    mine, its = np.random.default_rng(0).normal(size=(2, 4, 400_000))
    served = np.max if procedure == "best_of_4" else np.min
    wins = served(mine + np.sqrt(0.7), axis=0) > served(its, axis=0)
    assert found["win_rate"] == pytest.approx(wins.mean(), abs=0.003)
