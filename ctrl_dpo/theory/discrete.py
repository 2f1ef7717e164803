"""The exact optimum where rewards take few values: binary verifiers, integer ratings, ties."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_banded

from ctrl_dpo._validation import check_positive
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.transformation import level_masses

FloatArray = NDArray[np.float64]

_SCAN = 257  # values of the top log-ratio tried at once
_ROUNDS = 4  # of narrowing a bracket by _SCAN - 1
_ITERATIONS = 60
_LARGEST_STEP = 3.0  # nats
_CONVERGED = 1e-10


@dataclass(frozen=True)
class DiscretePolicy:
    """The optimum over responses with given reference probabilities and rewards.

    Parameters
    ----------
    probs : (n,) ndarray
        Policy probability of each response.
    win_rate : float
        Inference-time win rate against the reference policy, ties one half.
    kl : float
        KL from the reference policy, nats.
    transformed_rewards : (n,) ndarray
        Phi of each response, zero at the highest reward; its log-ratio is Phi / beta - log Z.
    log_normaliser : float
        log Z, the log of the sum of reference probability times exp(Phi / beta).
    """

    probs: FloatArray
    win_rate: float
    kl: float
    transformed_rewards: FloatArray
    log_normaliser: float


@dataclass(frozen=True)
class _Solved:
    """The optimum by level."""

    log_ratio: FloatArray
    transformed: FloatArray
    win_rate: float
    kl: float


@dataclass(frozen=True)
class _Levels:
    """The discrete problem on distinct rewards in rising order, each with reference mass."""

    procedure: Procedure
    beta: float
    probs: FloatArray
    weights: FloatArray  # (g(Q_{m+1}) - g(Q_{m-1})) / (2 beta) between level m and m + 1
    ranks: FloatArray  # (g(Q_m) + g(Q_{m-1})) / 2: chance to beat what the reference policy serves


def optimal_discrete_policy(
    reference_probs: ArrayLike,
    rewards: ArrayLike,
    procedure: str | Procedure,
    beta: float,
    against: str | Procedure | None = None,
) -> DiscretePolicy:
    r"""Return the policy over discrete rewards that maximises win rate minus beta times KL.

    With levels l = 1..L of rising reward, reference mass q, policy mass p, cumulative Q and P,

    .. math::

        W = \sum_l [h(P_l) - h(P_{l-1})] \, \tfrac12 [g(Q_l) + g(Q_{l-1})], \qquad
        \Phi_l = -\sum_{m=l}^{L-1} \tfrac12 h'(P_m) [g(Q_{m+1}) - g(Q_{m-1})],

    and the optimum satisfies log(p / q) = Phi / beta - log Z.

    Parameters
    ----------
    reference_probs : (n,) array_like
        Probability of each response under the reference policy, >= 0, sums to 1.
    rewards : (n,) array_like
        Finite rewards; equal ones tie and form one level.
    procedure : str or Procedure
        Procedure applied to the policy.
    beta : float
        Strength of the KL penalty, > 0.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Returns
    -------
    DiscretePolicy
        With ``probs``, ``win_rate``, ``kl``, ``transformed_rewards`` and ``log_normaliser``.

    Notes
    -----
    For a binary verifier and best-of-N, h(P) is one minus pass@N. As levels are refined the result
    converges to `optimal_policy`. A response without reference mass gets probability 0 and still a
    transformed reward. Where the optimum is not unique (see `optimal_policy`) the best of all
    stationary points that a scan separates is returned.

    Examples
    --------
    A verifier that passes one response in four; served is the best of two.

    >>> policy = optimal_discrete_policy([0.75, 0.25], [0, 1], "best_of_2", beta=0.2)
    >>> print(policy.probs.round(4), round(policy.win_rate, 4), round(policy.kl, 4))
    [0.3466 0.6534] 0.7212 0.3603
    """
    mass, level = level_masses(reference_probs, rewards)
    procedure = parse_procedure(procedure)
    against = procedure if against is None else parse_procedure(against)
    beta = check_positive("beta", beta)
    solved = _solve_levels(procedure, against, beta, tuple(mass.tolist()))
    q = np.asarray(reference_probs, dtype=np.float64)
    probs = q / q.sum() * np.exp(solved.log_ratio[level])
    return DiscretePolicy(
        probs, solved.win_rate, solved.kl, solved.transformed[level], -float(solved.log_ratio[-1])
    )


@lru_cache(maxsize=65536)
def _solve_levels(
    procedure: Procedure, against: Procedure, beta: float, masses: tuple[float, ...]
) -> _Solved:
    """Return the best stationary point of a problem given by its levels' masses."""
    mass = np.array(masses)
    present = mass > 0
    q = mass[present]
    g = against.distortion(np.concatenate(([0.0], np.minimum(np.cumsum(q)[:-1], 1.0), [1.0])))
    weights = (g[2:] - g[:-2]) / (2 * beta)
    problem = _Levels(procedure, beta, q, weights, (g[1:] + g[:-1]) / 2)
    found = [_newton(problem, start) for start in _starts(problem)]
    solutions = [each for each in found if each is not None]
    if not solutions:
        raise ValueError(
            f"beta must allow an exact optimum; got {beta!r}, where Newton's method found none for "
            f"{procedure} on levels of probability {q.tolist()}. Use a larger beta."
        )
    log_ratio, cdf = max(solutions, key=lambda each: _objective(problem, *each))
    win_rate, kl = _win_rate_and_kl(problem, log_ratio, cdf)
    log_ratio, transformed = _all_levels(problem, against, mass, log_ratio, cdf)
    return _Solved(log_ratio, transformed, win_rate, kl)


def _all_levels(
    problem: _Levels, against: Procedure, mass: FloatArray, log_ratio: FloatArray, cdf: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return log-ratio and transformed reward of all levels, those without mass included."""
    below = np.concatenate(([0], np.cumsum(mass > 0)))  # levels with mass up to each
    g = against.distortion(np.minimum(np.concatenate(([0.0], np.cumsum(mass))), 1.0))
    policy = np.concatenate(([0.0], cdf))[below]
    steps = problem.procedure.density_at(policy[1:-1], 1 - policy[1:-1]) * (g[2:] - g[:-2]) / 2
    transformed = np.concatenate((-np.cumsum(steps[::-1])[::-1], [0.0]))
    highest = int(np.flatnonzero(mass > 0)[-1])
    log_normaliser = transformed[highest] / problem.beta - log_ratio[-1]
    return transformed / problem.beta - log_normaliser, transformed


def _starts(problem: _Levels) -> list[tuple[FloatArray, FloatArray]]:
    """Return log-ratios and CDF near every stationary point, by shooting from the top level."""
    starts = []
    for low, high in _brackets(problem, 0.0, -float(np.log(problem.probs[-1]))):
        for _ in range(_ROUNDS):
            low, high = _brackets(problem, low, high)[0]
        # too much mass rather than too little: Newton's method in log p comes down safely
        log_ratio, cdf = _shoot(problem, np.array([high]))
        starts.append((log_ratio[:, 0], cdf[1:, 0]))
    return starts


def _brackets(problem: _Levels, low: float, high: float) -> list[tuple[float, float]]:
    """Return neighbouring top log-ratios with too little and with too much total mass."""
    grid = np.linspace(low, high, _SCAN)
    too_much = _shoot(problem, grid)[1][0] < 0
    too_much[0], too_much[-1] = False, True
    changes = np.flatnonzero(too_much[1:] != too_much[:-1])
    return [(float(grid[i]), float(grid[i + 1])) for i in changes]


def _shoot(problem: _Levels, log_top: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Go down the levels: log-ratios (L, n) and CDF (L + 1, n), its first row 0 if all fits."""
    n_levels = len(problem.probs)
    log_ratio = np.empty((n_levels, len(log_top)))
    cdf = np.empty((n_levels + 1, len(log_top)))
    log_ratio[-1], cdf[-1] = log_top, 1.0
    for level in range(n_levels - 1, -1, -1):
        cdf[level] = cdf[level + 1] - problem.probs[level] * np.exp(log_ratio[level])
        if level:
            below = np.clip(cdf[level], 0.0, 1.0)
            density = problem.procedure.density_at(below, 1.0 - below)
            log_ratio[level - 1] = log_ratio[level] - problem.weights[level - 1] * density
    return log_ratio, cdf


def _newton(
    problem: _Levels, start: tuple[FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray] | None:
    """Solve p = dP and the optimality equations exactly; None if the iteration does not settle."""
    log_ratio, cdf = start
    cdf[-1] = 1.0
    for _ in range(_ITERATIONS):
        step, step_cdf = _step(problem, log_ratio, cdf)
        log_mass = np.log(problem.probs) + log_ratio
        depth = log_mass.max() - log_mass
        # a rise may bring a level up to the peak; a fall is free where there is no mass anyway
        allowed = _LARGEST_STEP + np.where(step > 0, depth, 10.0 * np.maximum(depth - 5.0, 0.0))
        share = 1.0 / max(1.0, float(np.max(np.abs(step) / allowed)))
        log_ratio = log_ratio + share * step
        cdf = cdf + share * step_cdf
        if not np.isfinite(log_ratio).all():
            return None
        if (np.abs(step) * np.exp(-np.maximum(depth - 5.0, 0.0))).max() < _CONVERGED:
            return log_ratio, cdf
    return None


def _step(
    problem: _Levels, log_ratio: FloatArray, cdf: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Solve the linearised equations: tridiagonal in (log-ratio, CDF) level by level."""
    probs = problem.probs * np.exp(log_ratio)
    inner = np.clip(cdf[:-1], 0.0, 1.0)
    band = np.zeros((3, 2 * len(probs) - 1))  # row 1 + i - j holds entry (i, j)
    right = np.empty(band.shape[1])
    # even rows: P_l - P_{l-1} = q_l exp(log-ratio)
    band[1, 0::2] = -probs
    band[0, 1::2] = 1.0
    band[2, 1::2] = -1.0
    right[0::2] = probs - np.diff(cdf, prepend=0.0)
    # odd rows: the log-ratio rises by weight times h'(P)
    band[0, 2::2] = 1.0
    band[2, 0:-1:2] = -1.0
    band[1, 1::2] = -problem.weights * problem.procedure.slope_at(inner, 1.0 - inner)
    density = problem.procedure.density_at(inner, 1.0 - inner)
    right[1::2] = problem.weights * density - np.diff(log_ratio)
    step = solve_banded((1, 1), band, right, check_finite=False)
    return step[0::2], np.append(step[1::2], 0.0)


def _win_rate_and_kl(
    problem: _Levels, log_ratio: FloatArray, cdf: FloatArray
) -> tuple[float, float]:
    """Return win rate, ties one half, and KL in nats."""
    served = np.diff(problem.procedure.distortion(np.clip(cdf, 0.0, 1.0)), prepend=0.0)
    # q (r log r - r + 1) is never negative
    excess = np.exp(log_ratio) * log_ratio - np.expm1(log_ratio)
    return float(served @ problem.ranks), float(problem.probs @ excess)


def _objective(problem: _Levels, log_ratio: FloatArray, cdf: FloatArray) -> float:
    """Return win rate minus beta times KL."""
    win_rate, kl = _win_rate_and_kl(problem, log_ratio, cdf)
    return win_rate - problem.beta * kl
