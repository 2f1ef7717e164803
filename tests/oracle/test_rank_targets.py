"""Rank targets against simulation, closed forms and another optimiser."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasets import Dataset
from scipy import integrate, optimize

from ctrl_dpo import BestOfN, Identity, match_kl, optimal_policy, policy_of, relabel
from ctrl_dpo.theory.rank_targets import (
    RankOptimal,
    expected_log_density,
    match_rank_kl,
    rank_targets,
)

PROCEDURES = ["single_draw", "best_of_4", "worst_of_4", "best_of_8"]


def by_quadrature(values, n, points=20001):
    """Win rate of best-of-n, KL and normaliser of the fitted policy, by scipy."""
    u = np.linspace(0, 1, points)
    log_density = expected_log_density(values, u)
    mass = integrate.simpson(np.exp(log_density), x=u)
    cdf = integrate.cumulative_simpson(np.exp(log_density), x=u, initial=0)
    win = 1 - integrate.simpson(cdf**n * n * u ** (n - 1), x=u)
    kl = integrate.simpson(np.exp(log_density) * log_density, x=u)
    return win, kl, mass


@pytest.mark.parametrize(("k", "inside"), [(2, True), (8, True), (32, True), (8, False)])
def test_win_rate_kl_and_normaliser(k, inside):
    found = rank_targets("best_of_4", k, 0.1, inside=inside)
    assert found.values.size == (k if inside else k + 1)
    win, kl, mass = by_quadrature(found.values, 4)
    assert found.win_rate == pytest.approx(win, abs=1e-9)
    assert found.kl == pytest.approx(kl, abs=1e-9)
    assert mass == pytest.approx(1, abs=1e-9)


def test_a_regression_on_ranks_fits_the_claimed_log_ratio():
    """Simulate groups, regress targets on the calibrated reward: no formula of the library."""
    rng = np.random.default_rng(0)
    k, bins, groups = 8, 40, 200_000
    values = rank_targets("best_of_4", k, 0.1).values
    u = rng.random((groups, k))
    target = values[u.argsort(axis=1).argsort(axis=1)]
    cell = np.minimum((u * bins).astype(int), bins - 1)
    count = np.bincount(cell.ravel(), minlength=bins)
    mean = np.bincount(cell.ravel(), target.ravel(), minlength=bins) / count
    fine = (np.arange(bins * 50) + 0.5) / (bins * 50)
    claimed = expected_log_density(values, fine).reshape(bins, 50).mean(axis=1)
    square = expected_log_density(values**2, fine).reshape(bins, 50).mean(axis=1)
    # a low bin may never see its rare top rank, so the spread is not taken from the sample
    error = np.sqrt((square - claimed**2) / count)
    assert np.abs((mean - claimed) / error).max() < 4.5


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [2, 8])
def test_the_loss_that_labels_are_meant_for_pays_the_budget(k, anchor):
    """Minimise sum (e - mean e)^2 + w K (mean e)^2 over simulated groups, in bins of the reward."""
    bins, groups, budget = 40, 40_000, 0.7
    u = np.random.default_rng(3).random((groups, k))
    data = Dataset.from_dict({"responses": [["x"] * k] * groups, "rewards": u.tolist()})
    data = relabel(data, procedure="best_of_4", target_kl=budget, anchor=anchor)
    targets = np.array(data["transformed_rewards"]) / data[0]["beta"]
    assert set(data["anchor"]) == {anchor}
    weights = np.eye(k) - (1 - anchor) / k
    cell = np.minimum((u * bins).astype(int), bins - 1)
    design, right = np.zeros((bins, bins)), np.zeros(bins)
    for i, j in itertools.product(range(k), repeat=2):
        np.add.at(design, (cell[:, i], cell[:, j]), weights[i, j])
        np.add.at(right, cell[:, i], weights[i, j] * targets[:, j])
    log_density = np.linalg.lstsq(design, right, rcond=1e-10)[0]
    density = np.exp(log_density) / np.exp(log_density).mean()
    kl = np.mean(density * np.log(density))
    # of the fitted policy, constant within a bin: 40 bins lose 0.1 to 0.3 %
    assert kl == pytest.approx(budget, rel=0.02)
    if anchor > 0:  # the loss that sees the mean finds the normaliser too
        assert np.exp(log_density).mean() == pytest.approx(1, abs=0.02)


def test_two_draws_are_the_identity():
    # with two ranks the fitted log-density is linear in u, so it is a policy of the identity
    for kl in (0.1, 1.0):
        found = rank_targets("best_of_4", 2, match_rank_kl("best_of_4", 2, kl))
        policy = policy_of(Identity(), match_kl(Identity(), BestOfN(4), kl), BestOfN(4))
        assert found.kl == pytest.approx(kl, rel=1e-4)
        assert found.win_rate == pytest.approx(policy.win_rate, abs=1e-5)


@pytest.mark.parametrize("k", [3, 6])
def test_no_other_increasing_targets_do_better(k):
    beta = 0.1
    found = rank_targets("best_of_4", k, beta)
    best = found.win_rate - beta * found.kl

    def loss(steps):
        values = np.concatenate(([0.0], np.cumsum(np.abs(steps))))
        values -= np.log(by_quadrature(values, 4, 2001)[2])
        win, kl, _ = by_quadrature(values, 4, 2001)
        return beta * kl - win

    options = {"maxiter": 3000, "fatol": 1e-10, "xatol": 1e-6}
    other = optimize.minimize(loss, np.full(k - 1, 0.5), method="Nelder-Mead", options=options)
    assert -other.fun == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_more_draws_come_closer_to_the_exact_optimum(procedure):
    kl = 0.5
    exact = optimal_policy(procedure, match_kl("optimal", procedure, kl)).win_rate
    rates = [
        rank_targets(procedure, k, match_rank_kl(procedure, k, kl)).win_rate for k in (2, 4, 8, 32)
    ]
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(rates))
    assert exact - 2e-3 < rates[-1] < exact + 1e-4


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("kl", [0.05, 2.0])
def test_the_budget_is_met(procedure, kl):
    beta = match_rank_kl(procedure, 6, kl)
    found = rank_targets(procedure, 6, beta)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert (np.diff(found.values) >= 0).all()


def test_relabelling_uses_them_and_ties_share():
    rewards = [[0.0, 2.0, 2.0, 5.0]]
    groups = Dataset.from_dict({"responses": [list("abcd")], "rewards": rewards})
    row = relabel(groups, procedure="best_of_4", target_kl=1.0, anchor=1.0)[0]
    values = (
        RankOptimal(BestOfN(4), BestOfN(4), row["beta"], 1.0, 1.0).targets(4, inside=True).values
    )
    shared = (values[1] + values[2]) / 2
    wanted = np.array([values[0], shared, shared, values[3]])
    assert row["log_normaliser"] == 0.0
    assert np.array(row["transformed_rewards"]) / row["beta"] == pytest.approx(wanted, abs=1e-9)

    fresh = groups.add_column("reference_rewards", [[1.0, 2.0, 3.0]])
    row = relabel(fresh, procedure="best_of_4", beta=0.2)[0]
    values = rank_targets("best_of_4", 3, 0.2, inside=False).values
    shared = (values[1] + values[2]) / 2
    wanted = np.array([values[0], shared, shared, values[3]])
    assert np.array(row["transformed_rewards"]) / 0.2 == pytest.approx(wanted, abs=1e-9)


def test_a_draw_alone_has_no_target():
    groups = Dataset.from_dict({"responses": [["a"]], "rewards": [[3.0]]})
    assert relabel(groups, procedure="best_of_4", beta=0.2)[0]["transformed_rewards"] == [0.0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="anchor must be finite and >= 0; got -1"):
        relabel(
            Dataset.from_dict({"responses": [["a"]], "rewards": [[1.0]]}),
            procedure="best_of_4",
            beta=0.2,
            anchor=-1,
        )
    with pytest.raises(ValueError, match="k must be an integer >= 2; got 1"):
        rank_targets("best_of_4", 1, 0.1)
    with pytest.raises(ValueError, match="kl must be within reach of k=2 draws; got 9"):
        match_rank_kl("best_of_4", 2, 9.0)
    groups = Dataset.from_dict({"responses": [["a", "b"]], "rewards": [[3.0, 4.0]]})
    options = {"transformation": "identity", "estimator": "rank_optimal"}
    with pytest.raises(ValueError, match="transformation must be 'optimal' .*; got 'identity'"):
        relabel(groups, procedure="best_of_4", beta=0.2, **options)
