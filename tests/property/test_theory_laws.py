"""Laws of the theory: invariances, symmetries, stationarity; nothing beats the frontier."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from ctrl_dpo import Identity, Log, match_kl, optimal_policy, policy_of
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.transformation import as_transformation

GRID = np.linspace(0, 1, 40_001)
BETAS = st.floats(0.05, 5.0)
NAMES = st.sampled_from(["single_draw", "best_of_3", "worst_of_3", "2nd_best_of_3", "best_of_8"])


def curve(seed: int):
    """A random increasing transformation: a mixture of smooth steps and a line."""
    rng = np.random.default_rng(seed)
    centres, widths, heights = rng.random(4), 0.05 + rng.random(4), rng.exponential(size=4)

    def smooth(u):
        u = np.asarray(u)[..., None]
        return (heights * np.tanh((u - centres) / widths)).sum(-1) + 0.1 * u[..., 0]

    return smooth


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), beta=BETAS, name=NAMES, shift=st.floats(-50, 50))
def test_constants_and_joint_scales_change_nothing(seed, beta, name, shift):
    base = curve(seed)
    one = policy_of(base, beta, name)
    moved = policy_of(lambda u: base(u) + shift, beta, name)
    scaled = policy_of(lambda u: 3.0 * base(u), 3.0 * beta, name)
    for other in (moved, scaled):
        assert other.win_rate == pytest.approx(one.win_rate, abs=1e-9)
        assert other.kl == pytest.approx(one.kl, abs=1e-9)
    lifted = as_transformation(lambda u: base(u) + shift).log_normaliser(beta)
    plain = as_transformation(base).log_normaliser(beta)
    assert lifted == pytest.approx(plain + shift / beta, rel=1e-9, abs=1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), beta=BETAS, n=st.integers(1, 9))
def test_worst_of_n_is_best_of_n_of_the_negated_reward(seed, beta, n):
    base = curve(seed)
    up = policy_of(base, beta, f"worst_of_{n}")
    # negating the reward maps u to 1 - u; a tilt toward large u is one toward small u, and what
    # served the worst serves the best: the policy loses where it won
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        down = policy_of(lambda u: base(1 - np.asarray(u)), beta, f"best_of_{n}")
    assert down.win_rate == pytest.approx(1 - up.win_rate, abs=1e-9)
    assert down.kl == pytest.approx(up.kl, abs=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), kl=st.floats(0.02, 2.0), name=NAMES)
def test_no_transformation_beats_the_frontier(seed, kl, name):
    base = curve(seed)
    beta = match_kl(base, name, kl)
    policy = policy_of(base, beta, name)
    best = optimal_policy(name, match_kl("optimal", name, kl))
    assert policy.win_rate <= best.win_rate + 1e-9


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), beta=st.floats(0.05, 2.0), name=NAMES)
def test_perturbing_the_optimum_never_helps(seed, beta, name):
    served = parse_procedure(name)
    policy = optimal_policy(name, beta)
    log_density = policy.log_density(GRID)
    direction = np.random.default_rng(seed).normal(size=6)
    wave = sum(c * np.cos(np.pi * k * GRID) for k, c in enumerate(direction, 1))

    def objective(size: float) -> float:
        moved = log_density + size * wave
        moved = moved - np.log(integrate.simpson(np.exp(moved), x=GRID))
        cdf = np.clip(integrate.cumulative_simpson(np.exp(moved), x=GRID, initial=0), 0, 1)
        win = 1 - integrate.simpson(served.distortion(cdf) * served.density(GRID), x=GRID)
        return float(win - beta * integrate.simpson(np.exp(moved) * moved, x=GRID))

    centre = objective(0.0)
    assert centre == pytest.approx(policy.win_rate - beta * policy.kl, abs=1e-6)
    for size in (-0.1, -0.01, 0.01, 0.1):
        assert objective(size) <= centre + 1e-8


@given(beta=BETAS, name=NAMES)
@settings(max_examples=30)
def test_policies_are_monotone_and_normalised(beta, name):
    policy = optimal_policy(name, beta)
    cdf = policy.cdf(GRID)
    assert cdf[0] == 0
    assert cdf[-1] == pytest.approx(1, abs=1e-12)
    assert (np.diff(cdf) >= -1e-15).all()
    assert (np.diff(policy.log_density(GRID)) >= -1e-9).all()
    assert policy.win_rate >= 0.5 - 1e-12
    assert policy.kl >= 0


@given(n=st.integers(1, 12), beta=BETAS)
@settings(max_examples=30)
def test_more_draws_help_a_tilted_policy_more_than_none(n, beta):
    # the log transformation's win rate against its own procedure does not depend on n
    rates = [policy_of(Log(), beta, f"best_of_{m}").win_rate for m in (1, n)]
    assert rates[0] == pytest.approx(rates[1], abs=1e-10)
    assert policy_of(Identity(), beta, f"best_of_{n}").win_rate > 0.5
