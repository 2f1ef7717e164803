"""The theory against closed forms, scipy quadrature, simulation and other optimisers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from ctrl_dpo import (
    BestOfN,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Optimal,
    frontier,
    match_kl,
    optimal_discrete_policy,
    optimal_policy,
    policy_of,
)
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.sensitivity import sensitivity
from ctrl_dpo.transform import transformed_rewards

U = np.array([0.0, 0.01, 0.3, 0.5, 0.8, 0.99, 1.0])
PROCEDURES = ["single_draw", "best_of_4", "worst_of_4", "2nd_best_of_4", "best_of_16"]
TRANSFORMATIONS = [Identity(), Log(), NormalQuantile(), Exponential(5.0), Exponential(-5.0)]


@pytest.mark.parametrize("beta", [0.03, 0.5, 4.0])
def test_identity_in_closed_form(beta):
    policy = policy_of(Identity(), beta, "single_draw")
    rate = 1 / beta
    assert policy.cdf(U) == pytest.approx(np.expm1(rate * U) / np.expm1(rate), abs=1e-12)
    mean = 1 / -np.expm1(-rate) - beta
    log_z = np.log(np.expm1(rate) / rate)
    assert policy.win_rate == pytest.approx(mean, abs=1e-11)
    assert policy.kl == pytest.approx(rate * mean - log_z, abs=1e-10)
    assert Identity().log_normaliser(beta) == pytest.approx(log_z, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.5, 4.0])
def test_log_in_closed_form(beta):
    power = 1 / beta + 1  # density power * u^(power - 1)
    policy = policy_of(Log(), beta, "single_draw")
    assert policy.cdf(U) == pytest.approx(U**power, abs=1e-12)
    assert policy.win_rate == pytest.approx(power / (power + 1), abs=1e-12)
    assert policy.kl == pytest.approx(np.log(power) - (power - 1) / power, abs=1e-11)
    best = policy_of(Log(), beta, "best_of_4")
    assert best.win_rate == pytest.approx(power / (power + 1), abs=1e-11)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_best_of_n_policy(n):
    # log u at beta 1 / (n - 1) is the policy of best-of-n sampling: density n u^(n-1)
    policy = policy_of(Log(), 1 / (n - 1), "single_draw")
    assert policy.win_rate == pytest.approx(n / (n + 1), abs=1e-12)
    assert policy.kl == pytest.approx(np.log(n) - (n - 1) / n, abs=1e-11)


def test_normal_quantile_in_closed_form():
    # exp(z / beta) tilts a normal to one of mean 1 / beta
    policy = policy_of(NormalQuantile(), 0.5, "single_draw")
    assert policy.kl == pytest.approx(2.0, abs=1e-10)
    assert policy.win_rate == pytest.approx(stats.norm.cdf(2 / np.sqrt(2)), abs=1e-10)
    assert NormalQuantile().log_normaliser(0.5) == pytest.approx(2.0, abs=1e-10)


def test_public_check_values():
    best, worst = optimal_policy("best_of_4", 0.3), optimal_policy("worst_of_4", 0.3)
    assert (best.win_rate, best.kl) == pytest.approx((0.84013652, 0.37007211), abs=1e-8)
    assert (worst.win_rate, worst.kl) == pytest.approx((0.92500050, 0.40894976), abs=1e-8)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize(
    "transformation", [t for t in TRANSFORMATIONS if t != NormalQuantile()], ids=str
)
def test_normalisers_by_quadrature(transformation, beta):
    # relative to the largest value, at u = 1; substitution u = 1 - exp(-x) spreads the peak out
    top = float(transformation(1.0)) / beta
    area, _ = integrate.quad(
        lambda x: np.exp(float(transformation(-np.expm1(-x))) / beta - top - x),
        0,
        60,
        points=[0.1, 1, 3, 6, 10, 15, 20],
        limit=500,
        epsabs=0,
        epsrel=1e-11,
    )
    found = transformation.log_normaliser(beta)
    assert found == pytest.approx(top + np.log(area), rel=1e-9, abs=1e-9)


def objective_on_grid(log_p, procedure, against, beta):
    """W - beta KL of a density given on a fine uniform grid, by cell sums."""
    cells = len(log_p)
    log_p = log_p - special.logsumexp(log_p) + np.log(cells)
    p = np.exp(log_p)
    cdf = np.concatenate(([0.0], np.cumsum(p) / cells))
    served = np.diff(procedure.distortion(np.clip(cdf, 0, 1)))
    beaten = against.distortion((np.arange(cells) + 0.5) / cells)
    return float(served @ beaten - beta * np.mean(p * log_p)), log_p


@pytest.mark.parametrize(
    ("procedure", "beta"),
    [("best_of_4", 0.3), ("worst_of_4", 0.3), ("worst_of_8", 0.05), ("2nd_best_of_4", 0.1)],
)
def test_no_optimiser_on_a_grid_does_better(procedure, beta):
    served, cells = parse_procedure(procedure), 400
    policy = optimal_policy(procedure, beta)
    exact = policy.win_rate - beta * policy.kl
    middle = (np.arange(cells) + 0.5) / cells
    starts = [np.zeros(cells), 3 * middle, np.where(middle > 0.5, 2.0, -2.0), -3 * middle]
    best = -np.inf
    for start in starts:
        found = optimize.minimize(
            lambda x: -objective_on_grid(x, served, served, beta)[0],
            start,
            jac=lambda x: -gradient(x, served, beta),
            method="L-BFGS-B",
            options={"maxiter": 3000, "maxfun": 10_000},
        )
        best = max(best, -found.fun)
    assert best == pytest.approx(exact, abs=2e-4)
    assert best < exact + 2e-5


def gradient(log_p, procedure, beta):
    """Differentiate objective_on_grid through the softmax, by hand."""
    cells = len(log_p)
    p = special.softmax(log_p)
    cdf = np.concatenate(([0.0], np.cumsum(p)))
    h = procedure.density(np.clip(cdf, 0, 1))
    beaten = procedure.distortion((np.arange(cells) + 0.5) / cells)
    # d served_i / d cdf_i = -h(cdf_i), d served_{i-1} / d cdf_i = h(cdf_i)
    by_cdf = np.zeros(cells + 1)
    by_cdf[:-1] -= h[:-1] * beaten
    by_cdf[1:] += h[1:] * beaten
    by_p = np.cumsum(by_cdf[:0:-1])[::-1] - beta * (np.log(p * cells) + 1)
    return p * (by_p - p @ by_p)


@pytest.mark.parametrize("procedure", ["best_of_4", "worst_of_4", "2nd_best_of_4"])
def test_win_rates_of_real_selection(procedure):
    """Draw from the optimum by inversion, select, compare: within four standard errors."""
    rng = np.random.default_rng(11)
    served = parse_procedure(procedure)
    policy = optimal_policy(procedure, 0.3)
    grid = np.linspace(0, 1, 20001)
    draws = np.interp(rng.random((200_000, served.n_draws)), policy.cdf(grid), grid)
    others = rng.random((200_000, served.n_draws))
    mine = np.take_along_axis(draws, served.select(draws)[:, None], 1)[:, 0]
    theirs = np.take_along_axis(others, served.select(others)[:, None], 1)[:, 0]
    won = np.mean(mine > theirs)
    assert won == pytest.approx(policy.win_rate, abs=4 * np.sqrt(0.25 / 200_000))


@pytest.mark.parametrize("against", ["single_draw", "best_of_2"])
def test_another_procedure_on_the_reference_side(against):
    policy = policy_of(Log(), 1.0, "best_of_8", against=against)
    # best of 8 of density 2u is u^16; the reference serves u or u^2
    n = 1 if against == "single_draw" else 2
    assert policy.win_rate == pytest.approx(16 / (16 + n), abs=1e-11)


def test_a_budget_whose_first_guess_is_exact():
    """The normal quantile's KL is 1 / (2 beta^2): the search starts at the answer."""
    assert match_kl(NormalQuantile(), "best_of_4", 0.5) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("kl", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("procedure", ["best_of_4", "worst_of_4"])
@pytest.mark.parametrize("transformation", ["optimal", *TRANSFORMATIONS[:4]], ids=str)
def test_the_budget_is_met(transformation, procedure, kl):
    beta = match_kl(transformation, procedure, kl)
    policy = (
        optimal_policy(procedure, beta)
        if transformation == "optimal"
        else policy_of(transformation, beta, procedure)
    )
    assert policy.kl == pytest.approx(kl, rel=1e-9)


def test_a_kl_out_of_reach_is_named():
    # -exp(-t u) is flat at the top only for large t: the KL still grows; a plateau does not let it
    with pytest.warns(UserWarning, match="must be increasing"):
        match_kl(lambda u: -u, "best_of_4", 0.5)

    def plateau(u):
        return np.minimum(u, 0.5)

    with pytest.raises(ValueError, match="kl must be one that the plateau policy reaches; got 2.0"):
        match_kl(plateau, "best_of_4", 2.0)
    (point,) = frontier("best_of_4", [plateau], [2.0])
    assert np.isnan(point.win_rate)


def test_a_large_rate_and_a_small_beta_stay_finite():
    steep = policy_of(Exponential(50.0), 1e-3 * np.exp(50.0), "best_of_8")
    assert 0.5 < steep.win_rate < 1
    assert 0 < steep.kl < 10
    assert Optimal("best_of_64", 0.01).log_normaliser(0.01) < 0


def brute_discrete(q, procedure, beta):
    """Maximise W - beta KL over the simplex by another route: softmax and Nelder-Mead."""
    served = parse_procedure(procedure)
    reference = np.concatenate(([0.0], np.cumsum(q)))
    beaten = (served.distortion(reference[1:]) + served.distortion(reference[:-1])) / 2

    def loss(x):
        p = special.softmax(np.concatenate(([0.0], x)) + np.log(q))
        cdf = np.clip(np.concatenate(([0.0], np.cumsum(p))), 0, 1)
        kl = np.sum(special.rel_entr(p, q))
        return beta * kl - np.diff(served.distortion(cdf)) @ beaten

    starts = [np.zeros(len(q) - 1), np.full(len(q) - 1, 4.0), np.full(len(q) - 1, -4.0)]
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20_000, "maxfev": 20_000}
    fits = [optimize.minimize(loss, x, method="Nelder-Mead", options=options) for x in starts]
    best = min(fits, key=lambda fit: fit.fun)
    return -min(best.fun, optimize.minimize(loss, best.x, method="Powell", tol=1e-14).fun)


@pytest.mark.parametrize("beta", [0.05, 0.3])
@pytest.mark.parametrize("procedure", ["single_draw", "best_of_4", "worst_of_4"])
@pytest.mark.parametrize("q", [[0.75, 0.25], [0.1, 0.6, 0.3], [0.2, 0.3, 0.4, 0.1]], ids=str)
def test_the_discrete_optimum(q, procedure, beta):
    policy = optimal_discrete_policy(q, range(len(q)), procedure, beta)
    found = policy.win_rate - beta * policy.kl
    brute = brute_discrete(np.array(q), procedure, beta)
    # the search without gradients stops a little short of the optimum, never above it
    assert brute - 1e-9 <= found <= brute + 1e-6
    log_ratio = np.log(policy.probs / q)
    assert log_ratio == pytest.approx(
        policy.transformed_rewards / beta - policy.log_normaliser, abs=1e-8
    )
    assert policy.kl == pytest.approx(np.sum(special.rel_entr(policy.probs, q)), abs=1e-12)


def test_pass_at_n():
    policy = optimal_discrete_policy([0.9, 0.1], [0, 1], "best_of_4", 0.1)
    passed, reference = 1 - policy.probs[0] ** 4, 1 - 0.9**4
    assert policy.win_rate == pytest.approx(
        passed * (1 - reference) + 0.5 * (passed * reference + (1 - passed) * (1 - reference))
    )


@pytest.mark.parametrize("procedure", ["best_of_4", "worst_of_4"])
def test_many_levels_are_the_continuous_case(procedure):
    exact = optimal_policy(procedure, 0.3)
    gaps = []
    for levels in (20, 80, 320):
        policy = optimal_discrete_policy(np.full(levels, 1 / levels), range(levels), procedure, 0.3)
        gaps.append(abs(policy.win_rate - exact.win_rate) + abs(policy.kl - exact.kl))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("transformation", [*TRANSFORMATIONS, Optimal("best_of_8", 0.05)], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_posterior_means_by_quadrature(transformation, inside):
    k = 5
    below, tied = ([0, 1, 3, 4], [1, 2, 1, 1]) if inside else ([0, 1, 4, 5], [0, 2, 1, 0])
    found = transformed_rewards(transformation, below, tied, k, inside, "posterior")
    for value, b, t in zip(found, below, tied, strict=True):
        # ties share the ranks they occupy; a new response adds a rank
        ranks = range(b + 1, b + t + 1) if inside else range(b + 1, b + t + 2)
        size = k if inside else k + 1
        means = []
        for j in ranks:
            law = stats.beta(j, size + 1 - j)
            mean, _ = integrate.quad(
                lambda u, law=law: law.pdf(u) * float(transformation(u)),
                0,
                1,
                epsabs=1e-13,
                epsrel=1e-12,
                limit=400,
            )
            means.append(mean)
        assert value == pytest.approx(np.mean(means), rel=1e-8, abs=1e-9)


def test_serving_another_n_than_trained_for():
    rows = sensitivity(["best_of_2", "best_of_8"], kl=0.5)
    by_pair = {(row.trained_for, row.served_with): row for row in rows}
    assert by_pair["best_of_2", "best_of_2"].lost == 0
    crossed = by_pair["best_of_2", "best_of_8"]
    assert crossed.lost > 0
    # the density of the optimum for best-of-2, put through best-of-8 by quadrature
    policy = optimal_policy("best_of_2", match_kl("optimal", "best_of_2", 0.5))
    u = np.linspace(0, 1, 20001)
    beaten = 1 - integrate.simpson(policy.cdf(u) ** 8 * 8 * u**7, x=u)
    assert crossed.win_rate == pytest.approx(beaten, abs=1e-7)
    assert BestOfN(8).distortion(0.5) == 0.5**8
