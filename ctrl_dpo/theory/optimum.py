"""The exact optimum of win rate minus beta times KL on the calibrated scale."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ctrl_dpo._validation import check_positive
from ctrl_dpo.theory.collocation import Solution, solve
from ctrl_dpo.theory.density import CalibratedPolicy, assemble
from ctrl_dpo.theory.panels import Panels, Points
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.shooting import ROUGH, Equation, stationary_starts

FloatArray = NDArray[np.float64]

SMALLEST_BETA = 1e-150
_FACTOR = 3.0  # between the betas of a continuation
_LEFTMOST = -42.0  # logit below which the reference policy has mass 6e-19


class NoOptimumError(ValueError):
    """Newton's method found no stationary point: beta is too small for float64."""


def optimal_policy(
    procedure: str | Procedure, beta: float, against: str | Procedure | None = None
) -> CalibratedPolicy:
    r"""Return the policy that maximises win rate minus beta times KL, exactly.

    .. math::

        \max_p \; W(p) - \beta \, \mathrm{KL}(p), \qquad
        (\log F')' = h'(F) \, g'(u) / \beta, \quad F(0) = 0, \; F(1) = 1,

    where the second equation is the first one's stationarity condition: F is the CDF of the
    policy's calibrated reward, h the distortion of its procedure, g that of the reference policy's.

    Parameters
    ----------
    procedure : str or Procedure
        Procedure applied to the policy, such as ``best_of_4``.
    beta : float
        Strength of the KL penalty, >= 1e-150. Smaller beta means a larger KL.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Returns
    -------
    CalibratedPolicy
        With ``win_rate``, ``kl`` (nats), ``cdf(u)`` and ``log_density(u)``; the last is the
        log-ratio of policy and reference policy that an ideally trained model has.

    Raises
    ------
    ValueError
        If ``beta`` is below 1e-150, or no solution was found.

    Notes
    -----
    Rough trajectories are shot from u = 1 down (`shooting`), then Newton's method on Gauss-Legendre
    panels, refined until resolved, makes them exact (`collocation`). Win rate, KL and F agree with
    50-digit arithmetic to 1e-9 for beta from 0.01 to 10 and up to 64 draws. A call takes about
    10 ms and is cached.

    The stationary point is the optimum where it is unique:

    * h convex (one draw, best-of-n, their mixtures), any ``against``: W is concave in p and the KL
      strictly convex.
    * worst-of-m against worst-of-n (or one draw): W is not concave. With G(v) = 1 - F(1 - v) the
      equation is :math:`(\log G')' = -(mn/\beta) G^{m-1} v^{n-1}`. Every solution with G(0) = 0 is
      :math:`G(v) = E(\kappa v) / E(\kappa)` for the one E with E(0) = 0, E'(0) = 1 and
      :math:`(\log E')' = -E^{m-1} x^{n-1}`, and :math:`mn/\beta = \kappa^n E(\kappa)^{m-1}`
      increases in kappa, so each beta has exactly one solution.

    For other order statistics and mixtures uniqueness is not proved: all solutions that a scan over
    log p(1) separates are found, and the one with the largest objective is returned.

    **Differs from the paper:** InfAlign approximates the optimum by exponential transformations.

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 3 (the coupled equations).

    Examples
    --------
    >>> best = optimal_policy("best_of_4", beta=0.3)
    >>> print(f"{best.win_rate:.8f} {best.kl:.8f}")
    0.84013652 0.37007211
    """
    procedure = parse_procedure(procedure)
    against = procedure if against is None else parse_procedure(against)
    beta = check_positive("beta", beta)
    if beta < SMALLEST_BETA:
        raise ValueError(f"beta must be >= {SMALLEST_BETA:g} for an exact optimum; got {beta!r}.")
    return _optimal(procedure, against, beta)


def is_proved_unique(procedure: Procedure, against: Procedure) -> bool:
    """Return whether the stationary point is proved to be unique; see `optimal_policy`."""
    pairs = [*procedure.order_statistics, *against.order_statistics]
    both_worst = len(pairs) == 2 and all(k == n for _, k, n in pairs)
    return procedure.is_convex or both_worst


@lru_cache(maxsize=1024)
def _optimal(procedure: Procedure, against: Procedure, beta: float) -> CalibratedPolicy:
    """Keep the best of the stationary points."""
    equation = Equation(procedure, against, beta)
    solutions = _stationary(equation, ROUGH) or _stationary(equation, ROUGH**2)
    policies = [_as_policy(equation, each) for each in solutions or _continued(equation)]
    if not policies:
        raise NoOptimumError(
            f"beta must allow an exact optimum; got {beta!r}, where Newton's method found none for "
            f"{procedure} against {against}. Use a larger beta."
        )
    return min(policies, key=lambda policy: policy.loss_rate + beta * policy.kl)


def _stationary(equation: Equation, tolerance: float) -> list[Solution]:
    """Return all stationary points a scan finds, or none if Newton's method missed one."""
    unique = is_proved_unique(equation.procedure, equation.against)
    starts = stationary_starts(equation, unique, tolerance)
    solutions = [solve(equation, start) for start in starts]
    found = [each for each in solutions if each is not None]
    return found if len(found) == len(starts) else []


def _continued(equation: Equation) -> list[Solution]:
    """Follow the optimum down from a larger beta, where shooting lacks the digits of log p(1)."""
    factor, larger = _FACTOR, equation
    while True:
        larger = replace(larger, beta=min(factor * larger.beta, 1.0))
        if solutions := _stationary(larger, ROUGH):
            break
        if larger.beta == 1.0:
            return []
        factor *= factor  # a beta that is far too small must not cost hundreds of scans
    solution = min(solutions, key=lambda each: -_as_policy(larger, each).objective)
    while larger.beta > equation.beta * (1 + 1e-9):
        larger = replace(larger, beta=max(larger.beta / _FACTOR, equation.beta))
        following = solve(larger, solution.trajectory)
        if following is None:
            return []
        solution = following
    return [solution]


def _as_policy(equation: Equation, solution: Solution) -> CalibratedPolicy:
    """Return the solution as a policy, its log-density continued beyond the solved range."""
    edges = solution.panels.edges
    series = solution.panels.coefficients(solution.log_density)
    steepness = float(equation.procedure.density_at(0.0, 1.0)) / equation.beta
    first = Points(np.asarray(edges[0]))

    def log_density(points: Points) -> FloatArray:
        inside = solution.panels.evaluate(series, np.clip(points.t, edges[0], edges[-1]))
        # below the first edge F is next to nothing, so the slope is h'(0) g'(u) / beta
        below = Points(np.minimum(points.t, edges[0]))
        return np.asarray(inside - steepness * equation.against.rise(below, first))

    n_more = int(np.ceil(max(edges[0] - _LEFTMOST, 0.0) / 2.0))
    more = np.linspace(_LEFTMOST, edges[0], n_more, endpoint=False)
    panels = Panels(np.concatenate((more, edges)))
    return assemble(log_density, panels, equation.procedure, equation.against, equation.beta)
