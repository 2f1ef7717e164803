"""Attainment: the share of the attainable gain in win rate that a policy reached at its KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from ctrl_dpo._validation import check_positive
from ctrl_dpo.measures.estimates import Estimate, bootstrap_interval
from ctrl_dpo.measures.win_rates import untrained_win_rate
from ctrl_dpo.theory.policies import FrontierPoint, frontier
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

_ENOUGH = 20.0  # nats after which one draw of the reference policy wins less than 2.1e-9


def attainment(
    win_rate: float, kl: float, procedure: str | Procedure, against: str | Procedure | None = None
) -> float:
    r"""Return the share of the possible gain in inference-time win rate that a policy reached.

    .. math:: \frac{W - W_0}{W^*(\mathrm{KL}) - W_0}

    Parameters
    ----------
    win_rate : float
        Measured inference-time win rate W, a fraction.
    kl : float
        Measured KL from the reference policy, nats per response, > 0.
    procedure : str or Procedure
        Inference-time procedure of the win rate.
    against : str or Procedure, optional
        Procedure on the reference side, where it is another one.

    Returns
    -------
    float
        1 on the exact frontier, 0 at the win rate :math:`W_0` of the untrained policy, which is 1/2
        unless ``against`` differs from ``procedure``.

    Raises
    ------
    ValueError
        If ``win_rate`` is not in [0, 1], or no optimum has that KL.

    Notes
    -----
    The frontier holds for continuous rewards. Where many rewards tie, no policy reaches it.

    Examples
    --------
    >>> round(attainment(0.84013652, 0.37007211, "best_of_4"), 6)
    1.0
    """
    if not 0 <= win_rate <= 1:
        raise ValueError(f"win_rate must be in [0, 1]; got {win_rate!r}.")
    start = untrained_win_rate(procedure, against)
    (point,) = optimal_points(procedure, [check_positive("kl", kl)], against)
    if math.isnan(point.win_rate):
        raise ValueError(f"kl must be one that an optimum of {procedure} has; got {kl!r}.")
    return (win_rate - start) / (point.win_rate - start)


def optimal_points(
    procedure: str | Procedure, kls: Sequence[float], against: str | Procedure | None = None
) -> list[FrontierPoint]:
    r"""Return the frontier of the exact optimum, without solving where it is all but 1.

    Parameters
    ----------
    procedure : str or Procedure
        Inference-time procedure of the win rate.
    kls : sequence of float
        KLs from the reference policy, nats per response, > 0.
    against : str or Procedure, optional
        Procedure on the reference side, where it is another one.

    Returns
    -------
    list of FrontierPoint
        As of :func:`~ctrl_dpo.theory.policies.frontier`; a win rate of 1 without a beta where it is
        not solved for.

    Notes
    -----
    The policy that draws from the best :math:`e^{-k}` of the reference policy's responses has a KL
    of ``k`` nats and loses only if one of the reference side's ``n`` draws is among them, so

    .. math:: 1 - W^*(k) \le n e^{-k}.

    From ``k = 20 + log n`` on, where floats hardly hold the optimum and solving takes minutes, 1 is
    right to 2.1e-9.

    Examples
    --------
    >>> [round(p.win_rate, 6) for p in optimal_points("best_of_4", [0.37007211, 1000.0])]
    [0.840137, 1.0]
    """
    theirs = parse_procedure(procedure if against is None else against)
    enough = _ENOUGH + math.log(theirs.n_draws)
    solved = iter(frontier(procedure, ["optimal"], [k for k in kls if not k >= enough], against))
    return [
        FrontierPoint("optimal", kl, math.nan, 1.0) if kl >= enough else next(solved) for kl in kls
    ]


def attainment_interval(
    win_rate: Estimate,
    kl: Estimate,
    procedure: str | Procedure,
    against: str | Procedure | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float] | None:
    """Return the attainment with an interval, win rate and KL resampled together by prompt.

    Parameters
    ----------
    win_rate, kl : Estimate
        Results of :func:`inference_win_rate` and of ``kl_divergence`` on the same prompts.
    procedure : str or Procedure
        Inference-time procedure of the win rate.
    against : str or Procedure, optional
        Procedure on the reference side, where it is another one.
    confidence : float
        Nominal coverage of the interval, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict or None
        ``value``, ``low`` and ``high``; None where the interval of the KL reaches 0, at which
        attainment is 0/0.
    """
    if kl.low <= 0:
        return None
    start = untrained_win_rate(procedure, against)
    above = 1 + 6 * kl.standard_error / kl.value
    steps = np.concatenate((np.geomspace(1 / 32, 1, 13), np.geomspace(1, above, 5)))
    points = optimal_points(procedure, (kl.value * np.unique(steps)).tolist(), against)
    kls, best = np.array([(p.kl, p.win_rate) for p in points if not math.isnan(p.win_rate)]).T
    # the gain grows nearly as the root of the KL, so their ratio is smooth in the root
    roots = np.sqrt(kls)
    slope = PchipInterpolator(roots, (best - start) / roots)

    def share(wins: NDArray[np.float64], kls: NDArray[np.float64], axis: int) -> Any:
        root = np.sqrt(np.clip(kls.mean(axis=axis), roots[0] ** 2, roots[-1] ** 2))
        return (wins.mean(axis=axis) - start) / (slope(root) * root)

    samples = win_rate.per_prompt, kl.per_prompt
    low, high = bootstrap_interval(samples, share, confidence, seed)
    return {"value": float(share(*samples, axis=-1)), "low": low, "high": high}
