"""The theory against solvers of another kind: boundary-value, initial-value, mirror ascent."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import integrate, special

from ctrl_dpo import (
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Optimal,
    frontier,
    match_kl,
    optimal_policy,
    policy_of,
)
from ctrl_dpo.theory import policies
from ctrl_dpo.theory.finite_sample import posterior_means
from ctrl_dpo.theory.optimum import NoOptimumError
from ctrl_dpo.theory.panels import Points
from ctrl_dpo.theory.procedures import parse_procedure

HALVES = "0.5*single_draw+0.5*best_of_8"


@pytest.fixture(autouse=True)
def fifty_digits():
    with mp.workdps(50):
        yield


@pytest.mark.parametrize(
    ("procedure", "against", "beta"),
    [
        ("best_of_4", None, 0.1),
        ("best_of_8", "single_draw", 0.3),
        ("worst_of_4", None, 0.5),
        ("worst_of_8", "single_draw", 1.0),
        ("3rd_best_of_5", None, 0.1),
        (HALVES, None, 0.2),
    ],
)
def test_a_boundary_value_solver_agrees(procedure, against, beta):
    served = parse_procedure(procedure)
    opponent = served if against is None else parse_procedure(against)

    def equation(u, state):
        cdf = np.clip(state[0], 0, 1)
        slope = served.density(cdf) * opponent.density(u) / beta
        p = np.exp(state[1])
        return np.stack((p, slope, served.distortion(cdf) * opponent.density(u), p * state[1]))

    def ends(low, high):
        return np.array([low[0], high[0] - 1, low[2], low[3]])

    u = np.linspace(0, 1, 201)
    # from the policy of the identity with about this beta: no hint of the answer
    start = np.stack((u, 2 * (u - 0.5), u / 2, 0 * u))
    found = integrate.solve_bvp(equation, ends, u, start, tol=1e-9, max_nodes=50_000)
    assert found.success
    policy = optimal_policy(procedure, beta, against)
    assert policy.win_rate == pytest.approx(1 - found.y[2, -1], abs=1e-9)
    assert policy.kl == pytest.approx(found.y[3, -1], abs=1e-9)
    assert policy.cdf(u) == pytest.approx(found.sol(u)[0], abs=1e-9)


@pytest.mark.parametrize(
    ("procedure", "against", "beta"),
    [
        ("8th_best_of_64", None, 0.01),
        ("57th_best_of_64", None, 0.01),
        ("4th_best_of_8", "best_of_64", 0.01),
        ("0.3*best_of_64+0.7*worst_of_64", None, 0.05),
        ("63rd_best_of_64", "best_of_8", 0.1),
    ],
)
def test_integrated_down_from_the_top_the_mass_is_one(procedure, against, beta):
    """Another integrator, told only log p(1), must arrive at F(0) = 0 with the same integrals."""
    served = parse_procedure(procedure)
    opponent = served if against is None else parse_procedure(against)
    policy = optimal_policy(procedure, beta, against)

    def equation(t, state):
        complement, u = special.expit(-t), special.expit(t)
        below = np.clip(1 - state[0], 0, 1)
        p, jacobian = np.exp(state[1]), u * complement
        rival = opponent.density_at(u, complement) * jacobian
        slope = served.density_at(below, 1 - below) * rival / beta
        return [-p * jacobian, slope, -served.distortion(below) * rival, -p * state[1] * jacobian]

    top, right = float(policy.log_density(1.0)), 40.0
    start = [np.exp(top - right), top, 0.0, top * np.exp(top - right)]
    path = integrate.solve_ivp(
        equation, (right, -38.0), start, "DOP853", rtol=1e-12, atol=1e-15, max_step=0.1
    )
    mass, _, loss, kl = path.y[:, -1]
    assert mass == pytest.approx(1, abs=1e-9)
    assert policy.loss_rate == pytest.approx(loss, abs=1e-9)
    assert policy.kl == pytest.approx(kl, abs=1e-9)
    u = special.expit(path.t[::20])
    assert policy.cdf(u) == pytest.approx(1 - path.y[0, ::20], abs=1e-9)


@pytest.mark.parametrize(
    ("procedure", "against", "beta", "error"),
    [
        ("worst_of_4", "worst_of_4", 0.02, 1e-10),
        ("worst_of_64", "worst_of_64", 0.3, 1e-10),
        ("3rd_best_of_5", "3rd_best_of_5", 0.02, 1e-10),
        # the density is steep next to u = 1, where cells of 1/4000 extrapolate less well
        ("worst_of_8", "best_of_8", 0.03, 1e-6),
        ("6th_best_of_8", "best_of_8", 0.03, 1e-6),
    ],
)
def test_no_mirror_ascent_ends_higher(procedure, against, beta, error):
    """W is not concave, and the best point is returned all the same; grids extrapolate to it."""
    coarse, fine = (ascended(procedure, against, beta, cells) for cells in (2000, 4000))
    # cells of width 1/n miss the optimum by a multiple of 1/n^2
    limit = fine + (fine - coarse) / 3
    assert optimal_policy(procedure, beta, against).objective == pytest.approx(limit, abs=error)


def ascended(procedure, against, beta, cells):
    """Maximise W - beta KL over cell masses by mirror ascent from several starts."""
    served, opponent = parse_procedure(procedure), parse_procedure(against)
    edges = opponent.distortion(np.arange(cells + 1) / cells)
    beaten = (edges[1:] + edges[:-1]) / 2
    middle = (np.arange(cells) + 0.5) / cells

    def value(log_p):
        p = np.exp(log_p)
        cdf = np.concatenate(([0.0], np.minimum(np.cumsum(p), 1.0)))
        return (
            np.diff(served.distortion(cdf)) @ beaten - beta * special.rel_entr(p, 1 / cells).sum()
        )

    best = -np.inf
    for start in (0 * middle, 20.0 * (middle > 0.5), 20.0 * (middle > 0.9)):
        log_p = start - special.logsumexp(start)
        step, reached = 0.5, value(log_p)
        while step > 1e-6:
            cdf = np.minimum(np.cumsum(np.exp(log_p)), 1.0)
            steps = served.density(cdf[:-1]) * np.diff(beaten)
            phi = np.concatenate((-np.cumsum(steps[::-1])[::-1], [0.0])) / beta
            tried = (1 - step) * log_p + step * phi
            tried -= special.logsumexp(tried)
            new = value(tried)
            # never downhill, so that each ascent stays with the maximum next to its start
            if new > reached + 1e-12:
                log_p, reached, step = tried, new, min(1.5 * step, 1.0)
            else:
                step /= 2
        best = max(best, reached)
    return best


@pytest.mark.parametrize("n", [8, 64])
def test_worst_of_n_over_the_whole_range_of_budgets(n):
    """At small beta the scaling law leaves W = 1 - beta / n, and log(1 / beta) / n nats of KL."""
    name = f"worst_of_{n}"
    betas = [match_kl("optimal", name, kl) for kl in (0.01, 1.0, 2.0, 5.0)]
    policies = [optimal_policy(name, beta) for beta in betas]
    for policy, kl in zip(policies, (0.01, 1.0, 2.0, 5.0), strict=True):
        assert policy.kl == pytest.approx(kl, rel=1e-9)
    for policy in policies[2:]:
        assert policy.loss_rate == pytest.approx(policy.beta / n, rel=1e-10)
    assert np.log(betas[2] / betas[3]) / n == pytest.approx(3.0, rel=1e-9)


def test_a_kl_beyond_floats_is_named_and_leaves_a_gap_in_a_frontier(monkeypatch):
    def solvable(procedure, beta, against):
        if beta < 1e-3:
            raise NoOptimumError
        return optimal_policy(procedure, beta, against)

    # a real failure lies beyond 300 nats and takes seconds to run into
    monkeypatch.setattr(policies, "optimal_policy", solvable)
    with pytest.raises(ValueError, match="kl must be one whose optimum float64 can hold; got 500"):
        match_kl("optimal", "best_of_4", 500.0)
    beyond, within = frontier("best_of_4", ["optimal"], [500.0, 1.0])
    assert np.isnan(beyond.beta)
    assert within.win_rate == pytest.approx(0.941123, abs=1e-6)


@pytest.mark.parametrize(("rate", "beta"), [(50.0, 1e-3), (10.0, 1e-3), (-50.0, 1e-3), (-5.0, 0.1)])
def test_steep_exponentials_against_fifty_digits(rate, beta):
    sign = mpf(np.sign(rate))
    top = sign * mpmath.exp(mpf(rate)) / mpf(beta)

    def log_p(d):
        return top * mpmath.expm1(-mpf(rate) * d)  # at u = 1 - d, relative to u = 1

    scale = min(mpf(1), 1 / abs(top * rate))
    pieces = [mpf(0), *(x for i in range(-3, 230) if (x := scale * mpf(2) ** i) < 1), mpf(1)]
    mass = mpmath.quad(lambda d: mpmath.exp(log_p(d)), pieces)
    entropy = mpmath.quad(lambda d: mpmath.exp(log_p(d)) * log_p(d), pieces) / mass
    loss = mpmath.quad(lambda d: mpmath.exp(log_p(d)) * d, pieces) / mass
    policy = policy_of(Exponential(rate), beta, "single_draw")
    assert policy.kl == pytest.approx(float(entropy - mpmath.log(mass)), rel=1e-12)
    assert policy.loss_rate == pytest.approx(float(loss), rel=1e-12)
    log_z = float(top + mpmath.log(mass))
    assert Exponential(rate).log_normaliser(beta) == pytest.approx(log_z, rel=1e-13)


@pytest.mark.parametrize("k", [2, 8, 64, 500])
def test_posterior_means_to_ten_digits(k):
    for j in sorted({1, (k + 1) // 2, k}):
        expected = {
            Identity(): mpf(j) / (k + 1),
            Log(): mpmath.digamma(j) - mpmath.digamma(k + 1),
            Exponential(5.0): mpmath.hyp1f1(j, k + 1, 5),
            Exponential(50.0): mpmath.hyp1f1(j, k + 1, 50),
            Exponential(-50.0): -mpmath.hyp1f1(j, k + 1, -50),
        }
        for transformation, value in expected.items():
            found = posterior_means(transformation, k)[j - 1]
            assert found == pytest.approx(float(value), rel=1e-12)
    # order statistics of the normal: the largest of two and of three
    assert posterior_means(NormalQuantile(), 2)[1] == pytest.approx(np.pi**-0.5, rel=1e-12)
    assert posterior_means(NormalQuantile(), 3)[2] == pytest.approx(1.5 * np.pi**-0.5, rel=1e-12)


@pytest.mark.parametrize("procedure", ["best_of_64", "worst_of_4"])
def test_posterior_means_of_the_optimum_to_twelve_digits(procedure):
    phi = Optimal(procedure, 0.05)
    for k, j in ((8, 1), (64, 32), (64, 63)):

        def integrand(t, k=k, j=j):
            points = Points(np.array(t))
            log_weight = j * points.log_u + (k + 1 - j) * points.log_complement
            return float(phi.at(points) * np.exp(log_weight - special.betaln(j, k + 1 - j)))

        pieces = [integrate.quad(integrand, t, t + 2, epsabs=1e-15)[0] for t in range(-40, 40, 2)]
        assert posterior_means(phi, k)[j - 1] == pytest.approx(sum(pieces), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("k", "j"), [(8, 3), (64, 1), (64, 64)])
def test_posterior_means_of_the_normal_quantile_to_twelve_digits(k, j):
    def integrand(z):
        return z * mpmath.ncdf(z) ** (j - 1) * mpmath.ncdf(-z) ** (k - j) * mpmath.npdf(z)

    pieces = [-40, -12, *range(-6, 7, 2), 12, 40]
    exact = mpmath.quad(integrand, pieces) / mpmath.beta(j, k + 1 - j)
    found = posterior_means(NormalQuantile(), k)[j - 1]
    assert found == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("name", ["worst_of_64", "best_of_64", "3rd_best_of_5", HALVES])
def test_small_rises_of_a_distortion_keep_their_digits(name):
    procedure = parse_procedure(name)
    t = np.array([-30.0, -8.0, -0.5, 0.3, 5.0, 30.0])
    rises = procedure.rise(Points(t), Points(t + 0.01))
    for low, found in zip(t, rises, strict=True):
        u = [1 / (1 + mpmath.exp(-mpf(float(x)))) for x in (low, low + 0.01)]
        value = sum(
            mpf(w) * mpmath.betainc(n - k + 1, k, *u, regularized=True)
            for w, k, n in procedure.order_statistics
        )
        assert found == pytest.approx(float(value), rel=1e-11)
