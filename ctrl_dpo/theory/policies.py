"""The policy of any transformation, the beta of a KL budget, and the frontier between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ctrl_dpo._validation import check_positive
from ctrl_dpo.theory.budget import Budget, is_exact
from ctrl_dpo.theory.density import CalibratedPolicy, FloatArray, assemble, kl_of
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.panels import Points
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.transformation import (
    UserFunction,
    as_transformation,
    normalise,
    standard_deviation,
)

_SIDE = 1e-6
_UNRESOLVED = 1e-9


def policy_of(
    transformation: Any,
    beta: float,
    procedure: str | Procedure,
    against: str | Procedure | None = None,
) -> CalibratedPolicy:
    r"""Return the policy that KL-regularised alignment with a transformation leads to.

    .. math:: p(u) = \exp(\Phi(u) / \beta) / Z, \qquad Z = \int_0^1 \exp(\Phi(u) / \beta) du.

    Parameters
    ----------
    transformation : Transformation or callable
        Phi; a callable maps an array of calibrated rewards in (0, 1) to numbers of the same shape.
    beta : float
        Strength of the KL penalty, > 0.
    procedure : str or Procedure
        Procedure applied to the policy; decides the win rate only.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Returns
    -------
    CalibratedPolicy
        With ``win_rate``, ``kl`` (nats), ``cdf(u)`` and ``log_density(u)``.

    Raises
    ------
    ValueError
        If a callable's policy lies closer to u = 1 than floats can tell.

    Warns
    -----
    UserWarning
        If a callable decreases somewhere.

    Notes
    -----
    Adding a constant to Phi changes nothing, and (Phi, beta) is the same as (c Phi, c beta).

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 3.

    Examples
    --------
    The density of the logarithm is (1 + 1 / beta) u^(1 / beta); at beta = 1, best of two draws.

    >>> from ctrl_dpo import Log
    >>> policy = policy_of(Log(), beta=1.0, procedure="single_draw")
    >>> print(f"{policy.win_rate:.6f} {policy.kl:.6f} {policy.cdf(0.5):.6f}")
    0.666667 0.193147 0.250000
    """
    procedure = parse_procedure(procedure)
    against = procedure if against is None else parse_procedure(against)
    beta = check_positive("beta", beta)
    given = as_transformation(transformation)
    panels, shift = normalise(given, beta)

    def log_density(points: Points) -> FloatArray:
        return given.score(points) / beta - shift

    policy = assemble(log_density, panels, procedure, against, beta)
    unresolved = 1.0 - float(policy.cdf(1.0 - 2.0**-53))
    if isinstance(given, UserFunction) and unresolved > _UNRESOLVED:
        raise ValueError(
            f"beta must leave the policy of a function of u off the last float below u = 1; got "
            f"beta = {beta!r}, with a share of {unresolved:.3g} there. Use a larger beta, thus a "
            "smaller KL."
        )
    return policy


def match_kl(
    transformation: Any,
    procedure: str | Procedure,
    kl: float,
    against: str | Procedure | None = None,
) -> float:
    r"""Return the beta at which a transformation's policy has a given KL.

    Parameters
    ----------
    transformation : Transformation, callable or "optimal"
        ``"optimal"`` is the exact optimum of the procedure at the beta returned.
    procedure : str or Procedure
        Procedure applied to the policy; decides what is optimal.
    kl : float
        KL budget, nats per response, > 0.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Returns
    -------
    float
        beta > 0; the policy's KL equals ``kl`` to a relative 1e-9.

    Raises
    ------
    ValueError
        If no beta gives that KL: a transformation that is flat at the top reaches a largest KL,
        an optimum that is not unique may jump over some, and the policy of a callable may lie
        closer to u = 1 than floats can tell.

    Examples
    --------
    >>> beta = match_kl("optimal", "best_of_4", kl=1.0)
    >>> print(f"{beta:.6f} {optimal_policy('best_of_4', beta).kl:.6f}")
    0.083050 1.000000
    """
    kl = check_positive("kl", kl)
    procedure = parse_procedure(procedure)
    against = procedure if against is None else parse_procedure(against)
    budget = _budget(transformation, procedure, against)
    beta, reached = budget.nearest(kl)
    if math.isnan(beta):
        raise ValueError(
            f"kl must be one whose optimum float64 can hold; got {kl!r} for {procedure} against "
            f"{against}. Choose a smaller KL."
        )
    if not is_exact(reached, kl):
        low, high = sorted(budget.kl_at(beta * side) for side in (1 - _SIDE, 1 + _SIDE))
        found = (
            f"where the KL goes from {low:.6g} to {high:.6g} at beta = {beta:.6g}"
            if low < kl < high
            else f"beyond the {high:.6g} nats at beta = {beta:.3g}, the last one tried"
        )
        raise ValueError(
            f"kl must be one that the {budget.name} policy reaches; got {kl!r}, {found}. "
            "Choose another KL."
        )
    budget.policy_at(beta)  # refuses where floats cannot tell the policy from its last one
    return beta


@dataclass(frozen=True)
class FrontierPoint:
    """One row of a frontier; beta and win rate are NaN where the KL cannot be reached.

    Parameters
    ----------
    transformation : str
        Name of the transformation.
    kl : float
        KL from the reference policy, nats.
    beta : float
        Strength of the KL penalty that leads there.
    win_rate : float
        Inference-time win rate against the reference policy.
    """

    transformation: str
    kl: float
    beta: float
    win_rate: float


def frontier(
    procedure: str | Procedure,
    transformations: Iterable[Any],
    kls: Sequence[float],
    against: str | Procedure | None = None,
) -> list[FrontierPoint]:
    """Return the win rate of each transformation at each KL.

    Parameters
    ----------
    procedure : str or Procedure
        Procedure applied to the policy.
    transformations : iterable of Transformation, callable or "optimal"
        What to compare.
    kls : sequence of float
        KL budgets, nats, > 0.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Returns
    -------
    list of FrontierPoint
        One row for each transformation and KL, in the order given.

    Examples
    --------
    >>> from ctrl_dpo import Exponential
    >>> for row in frontier("best_of_8", ["optimal", Exponential(10)], [1.0]):
    ...     print(f"{row.transformation:15} {row.beta:8.4f} {row.win_rate:.4f}")
    optimal           0.0466 0.9760
    exponential:10.0 5315.2500 0.9482
    """
    procedure = parse_procedure(procedure)
    against = procedure if against is None else parse_procedure(against)
    kls = [check_positive("kls", kl) for kl in kls]
    rows = []
    for transformation in transformations:
        budget = _budget(transformation, procedure, against)
        for kl in kls:
            beta, reached = budget.nearest(kl)
            if not is_exact(reached, kl):
                rows.append(FrontierPoint(budget.name, kl, math.nan, math.nan))
                continue
            rows.append(FrontierPoint(budget.name, kl, beta, budget.policy_at(beta).win_rate))
    return rows


def _budget(transformation: Any, procedure: Procedure, against: Procedure) -> Budget:
    """Return the policies of a transformation, or of the exact optimum, by beta."""
    if isinstance(transformation, str):
        if transformation != "optimal":
            raise ValueError(
                f"transformation must be a Transformation, a function or 'optimal'; got "
                f"{transformation!r}. Other names: ctrl_dpo.transform.parse_transformation."
            )

        def optimum(beta: float) -> CalibratedPolicy:
            return optimal_policy(procedure, beta, against)

        return Budget("optimal", optimum, lambda beta: optimum(beta).kl, 0.3)
    given = as_transformation(transformation)

    def kl_at(beta: float) -> float:
        panels, log_normaliser = normalise(given, beta)
        return kl_of(given.score(panels.points) / beta - log_normaliser, panels)

    # KL is about Var(Phi) / (2 beta^2) while small
    guess = standard_deviation(given) or 1.0
    return Budget(str(given), lambda beta: policy_of(given, beta, procedure, against), kl_at, guess)
